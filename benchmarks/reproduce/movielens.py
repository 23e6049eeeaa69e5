"""MovieLens-1M: the rating, and whether it is 4 stars or more, learnt alone, by a shared bottom and by MMoE.

    .venv/bin/python -m benchmarks.reproduce.movielens --source ~/ml-1m [--seeds 3] [--processes 2] [--out …]

The published fifth fold is the test split. Heads, widths and optimizer are those of `distmtl prepare movielens-1m`, without the task
love; alone is a run per task, with a shared bottom's network. Checkpoints are chosen on the validation split.

Prepared data lie in data/movielens, single results in build/reproduce/movielens.jsonl: start it again and it goes on. Writes
movielens.json and movielens.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.intervals import difference, table
from benchmarks.reproduce.heads import prepared, train_and_test
from benchmarks.reproduce.kept import Case, arguments, measured, write

DATA = "data/movielens"
BOTTOM = {"kind": "shared_bottom", "bottom": [256, 128], "dropout": 0.3}
RATING, LIKE = {"kind": "regression", "name": "rating", "bias": 3.58}, {"kind": "binary", "name": "like"}
HEADS: dict[str, dict[str, Any]] = {
    "alone: rating": {"model": BOTTOM, "tasks": [RATING]},
    "alone: like": {"model": BOTTOM, "tasks": [LIKE]},
    "shared bottom": {"model": BOTTOM, "tasks": [RATING, LIKE]},
    "MMoE": {"tasks": [RATING, LIKE]},
}
FIGURES = {"rating": "rmse", "like": "auc"}


def measure(case: Case) -> dict[str, float]:
    """Head, seed → RMSE of the rating, AUC of the like."""
    head, seed = case
    metrics = train_and_test(f"{DATA}/mmoe.yaml", seed, HEADS[head])
    return {f"{task} {FIGURES[task].upper()}": of[FIGURES[task]] for task, of in metrics.items() if task in FIGURES}


def main() -> None:
    p = arguments(__doc__, "movielens", seeds=3)
    p.add_argument("--source", type=Path, help="folder with the raw files, to prepare the data from")
    a = p.parse_args()
    prepared("movielens-1m", a.source, Path(DATA))
    found, commits = measured(a.kept, measure, [(h, s) for s in range(a.seeds) for h in HEADS], a.processes)
    runs = {h: [found[h, s] for s in range(a.seeds)] for h in HEADS}
    alone = [runs.pop(f"alone: {t}") for t in FIGURES]
    runs = {"alone": [first | second for first, second in zip(*alone)], **runs}
    report, rows = table(runs, "alone")
    lines = [
        "# MovieLens-1M",
        "",
        f"`python -m benchmarks.reproduce.movielens`; fold 5, {a.seeds} seeds, mean with its 95 % interval; differences are paired.",
        "",
        *rows,
        "",
        "MMoE less the shared bottom: "
        + ", ".join(
            f"{n} {difference(*([f[n] for f in runs[h]] for h in ('MMoE', 'shared bottom'))).text(4, '+')}" for n in runs["alone"][0]
        ),
    ]
    write(a.out, "movielens", {"seeds": a.seeds, "heads": report}, lines, commits)


if __name__ == "__main__":
    main()
