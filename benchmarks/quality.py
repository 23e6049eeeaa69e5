"""Quality of heads, features and losses where the truth is planted: `distmtl synth`'s logs, on which the best reachable metrics are known.

    .venv/bin/python -m benchmarks.quality [funnel domains cold sampled] [--seeds 5] [--rows N] [--out benchmarks/results]

funnel    the conversion of every impression: AUC below the best possible (entire_auc), Σp / Σr (entire_calibration); no confounder
domains   click AUC in each of three domains: STAR and PEPNet against shared bottom, all with the domain as a feature
cold      click AUC on test rows whose user or item was seen 1 to 4 times in training: id dropout and PEPNet against neither
sampled   a tenth of the negatives kept: calibration of the click on all of them, with the correction of kept_negatives and without
Every figure is the mean over the seeds of data and weights alike, ± its standard error; differences are of the same seed, paired.
Writes quality.json and quality.md; about 40 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import Record
from distmtl.config_file import parse_config
from distmtl.data.synthetic import World, write_log
from distmtl.evaluation import evaluate
from distmtl.loop import train

DOMAINS, RARE, KEPT = 3, 5, 0.1
EXPERTS = {"kind": "mmoe", "num_experts": 4, "expert": [128, 64]}
BOTTOM = {"kind": "shared_bottom", "bottom": [128, 64]}
PEPNET = {"kind": "pepnet", "domain_features": ["domain"], "gate_features": ["user_id", "item_id", "age", "category"], "tower": [128, 64]}
Figures = dict[str, float]
Study = Callable[[int, int, Path], Iterator[tuple[str, Figures]]]


def run(world: World, log: Path, folder: Path, **sections: Any) -> tuple[str, dict[str, Any]]:
    """Train on a log; the run's folder and its test metrics."""
    raw = world.config() | sections
    raw["data"] = raw["data"] | {split: str(log / split) for split in ("train", "validation", "test")}
    where = str(folder / f"run-{len(list(folder.glob('run-*')))}")
    result = train(parse_config(raw | {"name": "quality", "run": {"dir": where, "seed": world.seed}}), report=lambda record: None)
    return where, result["metrics"]["test"]


def funnel(seed: int, rows: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    world = World(seed)
    write_log(folder / "log", world, rows=rows)
    heads: dict[str, dict[str, Any]] = {
        "clicks only, nothing shared": {"kind": "single_task", "bottom": [128, 64]},
        "clicks only, shared bottom": BOTTOM,
        "clicks only, MMoE": EXPERTS,
        "ESMM": {"kind": "esmm", "network": BOTTOM},
        "ESMM on MMoE": {"kind": "esmm", "network": EXPERTS},
        "ESCM²-IPW": {"kind": "escm2", "network": BOTTOM},
        "ESCM²-DR": {"kind": "escm2", "method": "dr", "network": BOTTOM},
    }
    for name, model in heads.items():
        of = run(world, folder / "log", folder, model=model)[1]["conversion"]
        gap = of["entire_best_possible_auc"] - of["entire_auc"]
        yield name, {"below the best AUC": gap, "calibration": of["entire_calibration"], "AUC of the clicked": of["auc"]}


def domains(seed: int, rows: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    world = World(seed, domains=DOMAINS)
    write_log(folder / "log", world, rows=rows)
    shared: Figures = {}
    for name, model in {
        "shared bottom": BOTTOM,
        "STAR": {"kind": "star", "domain": "domain", "bottom": [128, 64]},
        "PEPNet": PEPNET,
    }.items():
        of = sliced(run(world, folder / "log", folder, model=model)[0], "domain=")["slices"]["domain"]
        figures = {f"domain {d}": of[str(d)]["auc"] for d in range(DOMAINS)}
        shared = shared or figures
        yield name, {f"{k} {what}": v for k in figures for what, v in (("AUC", figures[k]), ("gain", figures[k] - shared[k]))}


def cold(seed: int, rows: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    world = World(seed, users=200_000, items=50_000, domains=DOMAINS)
    write_log(folder / "log", world, rows=rows)
    plain: Figures = {}
    features = world.config()["features"]
    dropped = [f | ({"out_of_range": "oov", "id_dropout": 0.2} if f["name"] in ("user_id", "item_id") else {}) for f in features]
    for name, sections in {
        "shared bottom": {"model": BOTTOM},
        "shared bottom, id dropout": {"model": BOTTOM, "features": dropped},
        "PEPNet": {"model": PEPNET},
        "PEPNet, id dropout": {"model": PEPNET, "features": dropped},
    }.items():
        of = sliced(run(world, folder / "log", folder, **sections)[0], f"user_id:1,{RARE}", f"item_id:1,{RARE}")
        rare = {f"rare {name}": of["slices"][f"{name}_id"][f"1-{RARE - 1}"]["auc"] for name in ("user", "item")}
        figures = {"all": of["auc"], **rare}
        plain = plain or figures
        yield name, {f"{k} {what}": v for k in figures for what, v in (("AUC", figures[k]), ("gain", figures[k] - plain[k]))}


def sampled(seed: int, rows: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    world = World(seed, kept_negatives=KEPT)
    write_log(folder / "log", world, rows=rows)
    for name, kept in (("corrected", KEPT), ("not corrected", 1.0)):
        tasks = [t | ({"kept_negatives": kept} if t["name"] == "click" else {}) for t in world.config()["tasks"]]
        of = run(world, folder / "log", folder, model=BOTTOM, tasks=tasks)[1]["click"]
        yield name, {"calibration": of["calibration"], "below the best AUC": of["best_possible_auc"] - of["auc"]}


STUDIES: dict[str, tuple[Study, int]] = {  # and the rows of its log
    "funnel": (funnel, 3_000_000),
    "domains": (domains, 1_500_000),
    "cold": (cold, 1_500_000),
    "sampled": (sampled, 1_500_000),
}


def sliced(where: str, *slices: str) -> dict[str, Any]:
    """The click's metrics of a run's best checkpoint on the test split, and on slices of it."""
    return evaluate(where, slices=slices)["test"]["click"]


def summary(runs: list[Figures]) -> dict[str, dict[str, float]]:
    """Figure → mean and standard error over the seeds."""
    out = {}
    for name in runs[0]:
        values = [r[name] for r in runs]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        out[name] = {"mean": round(statistics.mean(values), 5), "error": round(error, 5)}
    return out


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Quality where the truth is known", "", "`python -m benchmarks.quality`; mean over the seeds ± standard error.", ""]
    for study, of in report["studies"].items():
        figures = list(next(iter(of["results"].values())))
        lines += [
            f"## {study}: {of['rows']:,} rows, {of['seeds']} seeds",
            "",
            f"| | {' | '.join(figures)} |",
            "|---" * (len(figures) + 1) + "|",
        ]
        for name, values in of["results"].items():
            cells = [f"{values[f]['mean']:.4f} ± {values[f]['error']:.4f}" for f in figures]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--rows", type=int, help="of every log; default: each study's own")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    if unknown := set(a.studies) - STUDIES.keys():
        p.error(f"no study {unknown.pop()!r}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    record, file = Record(), a.out / "quality.json"
    report = {"studies": json.loads(file.read_text())["studies"] if file.exists() else {}}
    for name in a.studies or STUDIES:
        study, rows = STUDIES[name]
        rows = a.rows or rows
        results: dict[str, list[Figures]] = {}
        for seed in range(a.seeds):
            with TemporaryDirectory() as folder:
                for case, figures in study(seed, rows, Path(folder)):
                    results.setdefault(case, []).append(figures)
                    print(f"{name}, seed {seed}: {case:30}", "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
        report["studies"][name] = {"rows": rows, "seeds": a.seeds, "results": {case: summary(runs) for case, runs in results.items()}}
    record.write(a.out, "quality", report, markdown)


if __name__ == "__main__":
    main()
