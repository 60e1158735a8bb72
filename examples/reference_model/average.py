"""The mean of two models' weights, one trained on from the other (model soups, arXiv 2203.05482).

    python examples/reference_model/average.py BEFORE AFTER OUT [--share 0.5] [--whole]

What a run learns anew and what it forgets on the way both count half. The attention of the layer
before the last, which `look_again.py` laid down anew in between, is AFTER's alone; `--whole` if it
was laid before both.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from train_base import RESTATED


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--share", type=float, default=0.5, help="of AFTER")
    p.add_argument("--whole", action="store_true", help="also what look_again.py laid, in both")
    args = p.parse_args()
    before, after = (
        Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (args.before, args.after)
    )
    laid_anew = f"layers.{after.config.num_hidden_layers - 2}.self_attn."
    old, new = before.state_dict(), after.state_dict()
    after.load_state_dict(
        {
            n: t if laid_anew in n and not args.whole else torch.lerp(old[n], t, args.share)
            for n, t in new.items()
        }
    )
    after.save_pretrained(args.out)
    if (known := args.after / RESTATED).exists():
        shutil.copy(known, args.out)


if __name__ == "__main__":
    main()
