"""Put a trained model into the package, as bf16 safetensors.

    python examples/reference_model/package.py FOLDER [still_agent/reference/model]

A compactor must be trained against what is packaged, since rounding changes the identity.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM


def main(source: Path, target: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)  # decoding is the agent's
    print(f"{(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2] if len(sys.argv) > 2 else "still_agent/reference/model"),
    )
