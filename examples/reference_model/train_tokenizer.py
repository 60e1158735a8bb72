"""Train the reference model's byte-pair encoding and write it in tiktoken's format.

Numbers are cut into groups of at most three digits, and all 1,110 groups are tokens (as in
GPT-4's encoding), so a seven-digit needle costs three tokens and no digit repeats within it.

    python examples/reference_model/train_tokenizer.py BOOKS OUT
"""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from still_agent.evaluation import facts

PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-4's shape
)
SPECIAL = (
    "<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>",
    "<think>", "</think>",
)  # fmt: skip
HELD_OUT_BOOKS = ("wizard_of_oz", "treasure_island", "alice_in_wonderland")
RANKS = 4096 - 16


def byte_of() -> dict[str, int]:
    """The GPT-2 alphabet: one printable character per byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in printable]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


def main(books: Path, out: Path) -> None:
    texts = [p.read_text() for p in sorted(books.glob("*.txt")) if p.stem not in HELD_OUT_BOOKS]
    numbers = [str(n).zfill(w) for w in (1, 2, 3) for n in range(10**w)]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS - 1100,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    rng = random.Random(0)
    told = [f for _ in range(400) for f in facts.facts(rng, "train", 50)]
    spoken = [" ".join((f.state(rng, 0, "train"), *f.ask(rng, "train"))) for f in told]
    letters = ("".join(c for c in t if not c.isdigit()) for t in (*texts, *spoken))
    tok.train_from_iterator((p for t in letters for p in t.split("\n\n")), trainer)
    byte = byte_of()
    order = sorted(tok.get_vocab().items(), key=lambda kv: kv[1])
    ranks = [bytes(byte[c] for c in s) for s, _ in order]
    single = [b for b in ranks if len(b) == 1]
    merged = [b for b in ranks if len(b) > 1]
    # tiktoken wants the 256 bytes first; digit groups come last, pairs before triples
    ranks = sorted(single) + merged + [n.encode() for n in numbers if len(n) > 1]
    assert len(set(ranks)) == len(ranks) == RANKS, (len(set(ranks)), len(ranks))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.tiktoken").write_text(
        "".join(f"{base64.b64encode(b).decode()} {i}\n" for i, b in enumerate(ranks))
    )
    config = {
        "pattern": PATTERN,
        "special_tokens": {s: RANKS + i for i, s in enumerate(SPECIAL)},
        "bos_token": "<|bos|>",
        "eos_tokens": ["<|end|>"],
        "chat_template": {"prefix": "<|{role}|>", "suffix": "<|end|>"},
        "think": ["<think>", "</think>"],
    }
    (out / "tiktoken_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
