"""A model that follows its data against one that is frozen, and one trained from scratch every day, on `distmtl synth --drift`.

    .venv/bin/python -m benchmarks.drift [--seeds 8] [--days 14] [--frozen-after 4] [--rows-per-day 32768] [--out benchmarks/results]

Every day is predicted before anything is trained on it. followed: `distmtl train --follow`, every day once. frozen: the same model as it
was after the first days. anew: a new model every day, one epoch over the last `--frozen-after` days before it: as many rows as the frozen
one has seen. Figures are means over the days that follow; log, initial weights and order of rows go by the seed, and differences are
paired, with 95 % intervals by Student's t over seeds. Writes drift.json, drift.md and plots/drift.svg; about 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.intervals import difference, interval
from benchmarks.record import Record
from distmtl.config_file import load_config
from distmtl.data.drift import TASKS, DriftWorld, write_partitions
from distmtl.evaluation import evaluate
from distmtl.following import Until, follow
from distmtl.loop import train

WAYS = ("followed", "frozen", "anew")
FIGURES = {"auc": "AUC", "logloss": "log loss", "calibration": "Σp/Σy"}

Day = dict[str, dict[str, Any]]  # task → metrics


def study(folder: Path, seed: int, days: int, first: int, rows: int) -> dict[str, list[Day]]:
    """Way → its metrics on every day from the `first` on."""
    log = folder / "log"
    write_partitions(log, DriftWorld(seed), partitions=days, rows=days * rows)
    names = [f"day={d:03d}" for d in range(days)]
    config = load_config(log / "mmoe.yaml", [f"run.dir={folder / 'run'}", f"run.seed={seed}", "train.log_every=1000"])
    silent: dict[str, Any] = {"report": lambda record: None}
    follow(config, str(log), train, Until(partitions=first), **silent)
    frozen = [evaluate(str(folder / "run"), str(log / name))["data"] for name in names[first:]]
    follow(config, str(log), train, Until(partitions=days), **silent)
    lines = [json.loads(line) for line in (folder / "run" / "follow.jsonl").read_text().splitlines()]
    anew = []
    for d in range(first, days):
        of = window(folder / f"window-{d}", [log / name for name in names[d - first : d]])
        run = config.run.model_copy(update={"dir": str(folder / f"anew-{d}")})
        train(config.model_copy(update={"data": config.data.model_copy(update={"train": str(of)}), "run": run}), **silent)
        anew.append(evaluate(str(folder / f"anew-{d}"), str(log / names[d]))["data"])
    return {"followed": [line["metrics"] for line in lines[first:]], "frozen": frozen, "anew": anew}


def window(folder: Path, days: list[Path]) -> Path:
    """A folder with the rows of some days."""
    folder.mkdir()
    for day in days:
        (folder / f"{day.name}.parquet").symlink_to(day / "part-00000.parquet")
    return folder


def summary(seeds: list[dict[str, list[Day]]], days: int, first: int, rows: int) -> dict[str, Any]:
    """Task → figure → way: means over the days of every seed, their interval, and that of followed minus it."""
    out: dict[str, Any] = {}
    for task in TASKS:
        for figure in FIGURES:
            means = {way: [float(np.mean([day[task][figure] for day in seed[way]])) for seed in seeds] for way in WAYS}
            out.setdefault(task, {})[figure] = {
                way: {
                    "mean": round(interval(values).mean, 5),
                    "followed minus it": [round(x, 5) for x in bounds(difference(means["followed"], values))]
                    if way != "followed"
                    else None,
                    "seeds": [round(v, 5) for v in values],
                }
                for way, values in means.items()
            }
        out[task]["best_possible_auc"] = round(float(np.mean([d[task]["best_possible_auc"] for s in seeds for d in s["followed"]])), 5)
        out[task]["auc by day"] = {way: [round(float(np.mean(d)), 5) for d in by_day(seeds, way, task, "auc")] for way in WAYS}
        out[task]["auc by day"]["best possible"] = [
            round(float(np.mean(d)), 5) for d in by_day(seeds, "followed", task, "best_possible_auc")
        ]
    return {"days": days, "frozen_after": first, "rows_per_day": rows, "seeds": len(seeds), "tasks": out}


def by_day(seeds: list[dict[str, list[Day]]], way: str, task: str, figure: str) -> list[list[float]]:
    """Of every day, the figures of all seeds."""
    return [[seed[way][i][task][figure] for seed in seeds] for i in range(len(seeds[0][way]))]


def bounds(of: Any) -> tuple[float, float, float]:
    return of.mean, of.low, of.high


def better(tasks: dict[str, Any], than: str) -> list[str]:
    """The tasks on which following is better in AUC and log loss, beyond both intervals."""
    return [t for t in TASKS if tasks[t]["auc"][than]["followed minus it"][1] > 0 and tasks[t]["logloss"][than]["followed minus it"][2] < 0]


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Following drifting data",
        "",
        f"`python -m benchmarks.drift`. {report['days']} days of {report['rows_per_day']:,} rows, {report['seeds']} seeds. Every day is "
        "predicted before it is trained;",
        f"means over the days from day {report['frozen_after']} on. followed: every day trained once. frozen: after the first "
        f"{report['frozen_after']} days. anew: a new model every day, on the",
        f"{report['frozen_after']} days before. In brackets: followed minus it, of the same seeds, paired [95 % interval].",
        "",
    ]
    for task, figures in report["tasks"].items():
        lines += [f"## {task}: best possible AUC {figures['best_possible_auc']:.4f}", ""]
        lines += ["| | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
        for way in WAYS:
            cells = []
            for figure in FIGURES:
                of = figures[figure][way]
                gain = of["followed minus it"]
                cells.append(f"{of['mean']:.4f}" + ("" if gain is None else " ({:+.4f} [{:+.4f}, {:+.4f}])".format(*gain)))
            lines.append(f"| {way} | {' | '.join(cells)} |")
        days = range(report["frozen_after"], report["days"])
        lines += ["", "| AUC of day | " + " | ".join(map(str, days)) + " |", "|---" * (len(days) + 1) + "|"]
        lines += [f"| {way} | " + " | ".join(f"{v:.3f}" for v in values) + " |" for way, values in figures["auc by day"].items()]
        lines.append("")
    for than in WAYS[1:]:
        tasks = better(report["tasks"], than)
        on = "every task" if len(tasks) == len(TASKS) else ", ".join(tasks) or "no task"
        lines.append(f"Followed beats {than}, in AUC and log loss beyond both intervals, on {on}.")
    return "\n".join(lines)


def draw(report: dict[str, Any], folder: Path) -> None:
    """plots/drift.svg: AUC by day; where matplotlib is missing, say so."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing; .venv/bin/pip install matplotlib")
        return
    matplotlib.rcParams |= {"backend": "svg", "svg.hashsalt": "distmtl"}
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, len(TASKS), figsize=(5 * len(TASKS), 4), layout="constrained")
    for axes, task in zip(panels, TASKS, strict=True):
        for way, values in report["tasks"][task]["auc by day"].items():
            days = range(report["frozen_after"], report["days"])
            axes.plot(days, values, "k--" if way == "best possible" else "o-", label=way)
        axes.set(title=task, xlabel="day, predicted before it is trained", ylabel="AUC")
    panels[0].legend()
    figure.savefig(folder / "drift.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=8)
    p.add_argument("--days", type=int, default=14)
    p.add_argument("--frozen-after", type=int, default=4, metavar="DAYS")
    p.add_argument("--rows-per-day", type=int, default=32_768)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    record, seeds = Record(), []
    for seed in range(1, a.seeds + 1):
        with TemporaryDirectory() as folder:
            seeds.append(study(Path(folder), seed, a.days, a.frozen_after, a.rows_per_day))
        print(f"seed {seed}: done after {time.time() - record.began:.0f} s", flush=True)
    report = summary(seeds, a.days, a.frozen_after, a.rows_per_day)
    record.write(a.out, "drift", report, markdown)
    draw(report, a.out / "plots")


if __name__ == "__main__":
    main()
