"""Plot a training's log.jsonl, a panel for each figure it holds.

python examples/reference_model/plot_log.py RUN/log.jsonl [MORE ...] --out log.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

AXIS = "step"
UNPLOTTED = {AXIS, "minutes", "tokens", "length"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("logs", type=Path, nargs="+")
    p.add_argument("--out", type=Path, default=Path("log.png"))
    args = p.parse_args()
    runs = {
        str(log): [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        for log in args.logs
    }
    keys = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
    shown = [key for key in keys if key not in UNPLOTTED]
    if not shown:
        p.error("these logs hold no figures yet")
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(lines, columns, squeeze=False).flat, shown, strict=False):
        for name, rows in runs.items():
            points = [(row[AXIS], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(title=key, xlabel=AXIS)
    if len(runs) > 1:
        figure.axes[0].legend(fontsize="small")
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
