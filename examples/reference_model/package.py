"""Put a trained model, or its compactor, into the package, as bf16 safetensors.

    python examples/reference_model/package.py FOLDER [still_agent/reference/model]
    python examples/reference_model/package.py FOLDER still_agent/reference/still

A compactor must be trained against what is packaged, since rounding changes the identity.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM


def package_model(source: Path, target: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)  # decoding is the agent's


def package_compactor(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in weights.items()}, target / "model.safetensors")
    shutil.copy(source / "config.json", target)


def main(source: Path, target: Path) -> None:
    compactor = '"still"' in (source / "config.json").read_text("utf-8")
    (package_compactor if compactor else package_model)(source, target)
    print(f"{(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2] if len(sys.argv) > 2 else "still_agent/reference/model"),
    )
