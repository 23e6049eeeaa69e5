"""The curves of curves.py as SVG, one per curve: ours, and the limit dashed.

.venv/bin/python -m benchmarks.plot [benchmarks/results/curves.json] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LABELS = {
    "rows": "rows of all tables",
    "dim": "embedding dimension",
    "bag": "ids per feature and sample",
    "features": "id features",
    "tasks": "tasks",
    "batch": "batch size",
    "lookup": "rows of all tables; lookup only",
}


def draw(curves: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write FOLDER/NAME.svg of every curve; where matplotlib is missing, say so."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is missing; .venv/bin/pip install matplotlib, then .venv/bin/python -m benchmarks.plot")
        return
    matplotlib.rcParams |= {"backend": "svg", "svg.hashsalt": "distmtl"}  # the same figures, the same file
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name in [n for n in LABELS if any(key.startswith(f"{n}, ") for key in curves)]:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for i, (key, points) in enumerate((k, p) for k, p in curves.items() if k.startswith(f"{name}, ")):
            kind, xs = key.removeprefix(f"{name}, "), [p["x"] for p in points]
            for who in [w for w in ("ours", "limit") if w in points[0]]:
                label = kind if name == "lookup" else f"{who}, {kind} ids"
                axes.plot(xs, [p[who] for p in points], "o-" if who == "ours" else "x--", color=f"C{i}", label=label)
        axes.set(xscale="log", xlabel=LABELS[name], ylabel="samples per CPU second, one thread", ylim=(0, None))
        if name not in ("rows", "lookup"):
            axes.set_xticks(xs, [f"{x:,}" for x in xs])
            axes.minorticks_off()
        axes.legend()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("curves", type=Path, nargs="?", default=Path("benchmarks/results/curves.json"))
    p.add_argument("--out", type=Path, help="default: plots/ beside the curves")
    a = p.parse_args()
    draw(json.loads(a.curves.read_text())["curves"], a.out or a.curves.parent / "plots")


if __name__ == "__main__":
    main()
