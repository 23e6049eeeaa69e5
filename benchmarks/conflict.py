"""Every weighting against static weights on `distmtl synth --conflict`, and on the same log without conflict.

    .venv/bin/python -m benchmarks.conflict [--heads shared_bottom mmoe] [--seeds 8] [--rows 400000] [--jobs 2] [--out benchmarks/results]

Two sets of the tasks' own weights: all 1, with watch in seconds as the log has it, and by hand, with the weight of watch at which static
weights do best. Every weighting, static among them, has the learning rate (of tables and network together, three times less or more than
the config's) that is best for it, and the weight by hand is, on the validation splits of seeds of their own, by the mean over tasks of the
share of what can be known that is. Test figures of the other seeds: AUC of click and like; of watch the share of the variance of its true
expectation that is explained. Differences to static are of the same seed, paired, with 95 % intervals by Student's t.
Writes conflict.json and conflict.md; all of it about two hours on 2 quiet cores (six kinds, one head, six seeds: 20 minutes).
"""

from __future__ import annotations

import argparse
import json
import logging
import typing
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.intervals import difference, interval
from benchmarks.record import Record
from distmtl.config import WeightingConfig
from distmtl.config_file import parse_config
from distmtl.data.conflict import TASKS, ConflictWorld
from distmtl.data.synthetic import write_log
from distmtl.loop import train

LOGS = {"conflict": 1.0, "control": 0.0}
RATES, WATCH_WEIGHTS = (1 / 3, 1.0, 3.0), (1.0, 0.1, 0.03, 0.01, 0.003, 0.001)
TUNING = (1000, 1001)  # seeds that nothing but choices is made on
FIRST = 1  # seed that is measured: the log was designed by looking at seed 0
EVALUATIONS = 10  # of a run, of which the best is tested; the bandit learns by them
PAIRS = ("click.like", "click.watch", "like.watch")
KINDS = [typing.get_args(k.model_fields["kind"].annotation)[0] for k in typing.get_args(typing.get_args(WeightingConfig)[0])]


@dataclass(frozen=True)
class Run:
    log: str
    head: str
    kind: str = "static"
    watch_weight: float = 1.0
    rate: float = 1.0
    seed: int = 0

    def make(self, folder: Path) -> dict[str, float]:
        """Train; test figures, `reached` of the validation split, and the mean cosines of the tasks' gradients."""
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        world, log = ConflictWorld(self.seed, LOGS[self.log]), folder / f"{self.log}-{self.seed}"
        raw = world.config() | world.heads[self.head]
        raw["data"] = {split: str(log / split) for split in ("train", "validation", "test")}
        raw["tasks"][TASKS.index("watch")]["weight"] = self.watch_weight
        for of in ("tables", "dense"):
            raw["optimizer"][of]["lr"] *= self.rate
        truth = json.loads((log / "truth.json").read_text())
        raw["train"] |= {"log_every": 10, "eval_every": -(-truth["steps"] // EVALUATIONS)}
        records: list[dict[str, Any]] = []
        with TemporaryDirectory() as where:
            run = {"dir": f"{where}/run", "seed": self.seed}
            metrics = train(parse_config(raw | {"name": "c", "weighting": {"kind": self.kind}, "run": run}), report=records.append)[
                "metrics"
            ]
        test, validation = metrics["test"], metrics["validation"]
        reached = [(validation[t]["auc"] - 0.5) / (validation[t]["best_possible_auc"] - 0.5) for t in ("click", "like")]
        reached.append((truth["variance"] - validation["watch"]["rmse"] ** 2) / (truth["variance"] - truth["best"]))
        cosines = [r["health"]["cosine"] for r in records if r["kind"] == "train" and "cosine" in r["health"]]
        out = {"click": test["click"]["auc"], "like": test["like"]["auc"], "watch": 1 - test["watch"]["rmse"] ** 2 / truth["expected"]}
        out |= {pair: float(np.mean([c[pair.split(".")[0]][pair.split(".")[1]] for c in cosines])) for pair in PAIRS}
        return out | {"reached": float(np.mean(reached))}


def write(folder: Path, log: str, seed: int, rows: int) -> None:
    """A log whose test split has the true expectation for the label of watch: what is left of an error is the model's."""
    world = ConflictWorld(seed, LOGS[log])
    write_log(folder / f"{log}-{seed}", world, rows=rows)
    file = folder / f"{log}-{seed}" / "test" / "part-00000.parquet"
    test, validation = pq.read_table(file), pq.read_table(file.parents[1] / "validation")
    pq.write_table(test.set_column(test.column_names.index("watch"), "watch", test["e_watch"]), file)
    watch, expected = validation["watch"].to_numpy(), validation["e_watch"].to_numpy()
    steps = -(-pq.read_metadata(file.parents[1] / "train" / file.name).num_rows // world.config()["train"]["global_batch_size"])
    truth = {"variance": watch.var(), "best": ((watch - expected) ** 2).mean(), "expected": test["e_watch"].to_numpy().var()}
    (file.parents[1] / "truth.json").write_text(json.dumps({"steps": steps} | {k: float(v) for k, v in truth.items()}))


class Lab:
    """Makes runs, `jobs` at a time, each once."""

    def __init__(self, pool: ProcessPoolExecutor, folder: Path):
        self.pool, self.folder = pool, folder
        self.done: dict[Run, Any] = {}

    def __call__(self, runs: Iterable[Run]) -> dict[Run, dict[str, float]]:
        runs = list(runs)
        for run in runs:
            if run not in self.done:
                self.done[run] = self.pool.submit(run.make, self.folder)
        return {run: self.done[run].result() for run in runs}

    def best(self, candidates: list[Run]) -> Run:
        """By the mean of what is reached on the validation splits of the seeds for tuning."""
        results = self([replace(c, seed=s) for c in candidates for s in TUNING])
        return max(candidates, key=lambda c: sum(results[replace(c, seed=s)]["reached"] for s in TUNING))


def study(lab: Lab, log: str, head: str, kinds: list[str], seeds: range) -> dict[str, Any]:
    """Weights of the tasks' own → kind → figures."""
    by_hand = lab.best([Run(log, head, "static", w, r) for w in WATCH_WEIGHTS for r in RATES])
    out: dict[str, Any] = {}
    for name, weight in {"seconds": 1.0, "by hand": by_hand.watch_weight}.items():
        chosen = {kind: lab.best([Run(log, head, kind, weight, r) for r in RATES]) for kind in kinds}
        if name == "seconds":
            chosen["static, by hand"] = by_hand
        runs = lab([replace(run, seed=s) for run in chosen.values() for s in seeds])
        figures = {k: {f: [runs[replace(run, seed=s)][f] for s in seeds] for f in (*TASKS, *PAIRS)} for k, run in chosen.items()}
        out[name] = {"watch_weight": weight, "kinds": {}}
        for kind, run in chosen.items():
            of, static = figures[kind], figures["static"]
            out[name]["kinds"][kind] = {
                "rate": run.rate,
                "watch_weight": run.watch_weight,
                "mean": {t: round(interval(of[t]).mean, 5) for t in TASKS},
                "difference": {t: [round(x, 5) for x in bounds(difference(of[t], static[t]))] for t in TASKS if kind != "static"},
                "cosine": {p: round(interval(of[p]).mean, 4) for p in PAIRS},
                "seeds": {f: [round(v, 5) for v in values] for f, values in of.items()},
            }
        print(f"{log}, {head}, {name}: done", flush=True)
    return out


def bounds(of: Any) -> tuple[float, float, float]:
    return of.mean, of.low, of.high


def verdict(difference: dict[str, list[float]]) -> str:
    """better on every task, better, worse: beyond the interval."""
    better, worse = [t for t in TASKS if difference[t][1] > 0], [t for t in TASKS if difference[t][2] < 0]
    if len(better) == len(TASKS):
        return "**better on every task**"
    told = [f"{what} on {', '.join(tasks)}" for what, tasks in (("better", better), ("worse", worse)) if tasks]
    return "; ".join(told) or "the same"


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Weightings where conflict is planted",
        "",
        "`python -m benchmarks.conflict`. AUC of click and like; of watch the share of the variance of its true expectation that is",
        "explained. Mean, and difference to static [95 % interval], of the same seeds, paired. Verdicts: an interval beyond 0. cosine: the",
        "mean over steps and seeds between the tasks' gradients, of click and like, click and watch, like and watch. rate: the factor on",
        "the learning rates that was best for it, of 1/3, 1 and 3.",
        "",
    ]
    for log, of_log in report["studies"].items():
        for head, of in of_log.items():
            for name, own in of["weights"].items():
                weight = "every weight 1, watch in seconds" if name == "seconds" else f"watch weighted by hand, {own['watch_weight']:g}"
                lines += [f"## {log}, {head}: {weight}", "", f"{of['rows']:,} rows, {of['seeds']} seeds.", ""]
                lines += ["| weighting | rate | click | like | watch | cosine | against static |", "|---" * 7 + "|"]
                for kind, r in own["kinds"].items():
                    cells = [f"{r['mean'][t]:.4f}" for t in TASKS]
                    if r["difference"]:
                        cells = [f"{c} {d:+.4f} [{a:+.4f}, {b:+.4f}]" for c, (d, a, b) in zip(cells, r["difference"].values(), strict=True)]
                    cosine = " ".join(f"{c:+.2f}" for c in r["cosine"].values())
                    cells += [cosine, verdict(r["difference"]) if r["difference"] else ""]
                    lines.append(f"| {kind} | {r['rate']:.2g} | {' | '.join(cells)} |")
                lines.append("")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", nargs="*", default=["shared_bottom", "mmoe"], choices=list(ConflictWorld.heads))
    p.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    p.add_argument("--seeds", type=int, default=8)
    p.add_argument("--rows", type=int, default=400_000)
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    record, file = Record(), a.out / "conflict.json"
    report = {"studies": json.loads(file.read_text())["studies"] if file.exists() else {}}
    seeds = range(FIRST, FIRST + a.seeds)
    kinds = ["static", *(k for k in a.kinds if k != "static")]
    with TemporaryDirectory() as folder, ProcessPoolExecutor(a.jobs, mp_context=get_context("spawn")) as pool:
        lab = Lab(pool, Path(folder))
        for log in LOGS:
            for seed in (*seeds, *TUNING):
                write(Path(folder), log, seed, a.rows)
        for head in a.heads:
            for log in LOGS:
                weights = study(lab, log, head, kinds, seeds)
                report["studies"].setdefault(log, {})[head] = {"rows": a.rows, "seeds": a.seeds, "weights": weights}
                record.write(a.out, "conflict", report, markdown)


if __name__ == "__main__":
    main()
