"""A tokenizer as the hub's Qwen ones, built here: byte-level BPE, NFC, a ChatML template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_model

# As Qwen3's: an empty reasoning block before a reply that comes last, and a default system
# prompt where none is given. Neither may reach a message.
CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content
    + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n'
    + m.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".strip()
# As Qwen3's: a reply may reason, unless an empty block before it says that it has.
HYBRID = CHATML.replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
# As Qwen3-Thinking's: every reply reasons, whatever is asked for.
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def build_hub(folder: Path, template: str | None = CHATML) -> Path:
    """A tokenizer as Qwen2's, byte-level BPE with NFC, trained on a few lines."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = "You are brief. My sister lives in Porto, and I think that she likes the user.\n"
    backend.train_from_iterator([corpus] * 20, trainer)
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False) for t in PLAIN_ADDED])
    hub = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    hub.chat_template = template
    hub.save_pretrained(folder)
    return folder


def build_model(folder: Path, template: str, seed: int = 0) -> Path:
    """A tiny random Qwen3 with that tokenizer, as the hub has them."""
    tiny_model(seed, vocab_size=448).save_pretrained(folder)
    return build_hub(folder, template)
