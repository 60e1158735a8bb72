"""A frozen model by name: the reference model, a folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen3ForCausalLM
from transformers.utils.hub import cached_file

from still_agent.models.frozen import FrozenModel
from still_agent.models.tokenizers import HubTokenizer, TiktokenTokenizer, Tokenizer
from still_memory.errors import InputError

REFERENCE = Path(__file__).parent.parent / "reference" / "model"
ARCHITECTURE = "Qwen3ForCausalLM"


def load_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> FrozenModel:
    """Load "reference", a folder, or a hub id, frozen and ready to run.

    `device`: a GPU where there is one. `dtype`: fp32 on a CPU, and for the reference model
    anywhere, whose compactor was trained so; the file's own elsewhere.
    Weights are read from safetensors only, never from pickles, and no code that comes with a
    model is run. Raises InputError for what is not there, not whole, or not a Qwen3.
    """
    source, label = _source(name)
    where = _device(device)
    precision = _precision(dtype, exact=where.type == "cpu" or source == REFERENCE)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if ARCHITECTURE not in (config.architectures or ()):
            found = ", ".join(config.architectures or ()) or config.model_type
            raise InputError(f"{label!r} is a {found}; only {ARCHITECTURE} is supported so far")
        loaded: Any = Qwen3ForCausalLM.from_pretrained(
            source, dtype=precision, use_safetensors=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # a broken file can fail anywhere in transformers
        raise InputError(
            f'{label!r} cannot be loaded ({error}); give "reference", a folder with '
            "config.json and model.safetensors, or a hub id that can be reached"
        ) from error
    model, report = loaded
    # transformers fills what a file lacks with random numbers and only warns.
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise InputError(
            f"the weights of {label!r} are not whole ({absent[0]} and {len(absent) - 1} more "
            "are missing or of another shape); fetch or save the model again"
        )
    tokenizer = _tokenizer(source, model)
    if tokenizer.size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer of {label!r} has ids up to {tokenizer.size - 1} and the model embeds "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    model.to(device=where)
    return FrozenModel(model, tokenizer, label, files=_weights(source))


def _source(name: str | Path) -> tuple[str | Path, str]:
    """Where to read from, and the name for people."""
    if name == "reference":
        if not (REFERENCE / "model.safetensors").exists():
            raise InputError(
                "this copy of still-agent has no reference model; "
                "train one with examples/reference_model/train_base.py, or name a folder"
            )
        return REFERENCE, "reference"
    folder = Path(name)
    if folder.is_dir():
        return folder, folder.resolve().name
    if isinstance(name, Path) or folder.is_absolute() or str(name).startswith((".", "~")):
        raise InputError(f"there is no folder {str(name)!r}; check the path")
    return name, str(name)


def _weights(source: str | Path) -> list[Path]:
    """The files that the weights came from, and that say how; none if that is not to be told."""
    if not isinstance(source, Path):
        try:
            source = Path(str(cached_file(source, "config.json", local_files_only=True))).parent
        except OSError:
            return []
    return [*source.glob("*.safetensors"), *source.glob("*.json")]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {str(device)!r} cannot be used ({reason}); try cpu") from error


def _precision(dtype: str | torch.dtype | None, *, exact: bool) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if exact else "auto"
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if known not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype {dtype!r} is not supported; use float32, bfloat16 or float16")
    return known


def _tokenizer(source: str | Path, model: Qwen3ForCausalLM) -> Tokenizer:
    if isinstance(source, Path) and (source / "tiktoken_config.json").exists():
        return TiktokenTokenizer(source)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends or []
    return HubTokenizer(source, eos_ids=ends)
