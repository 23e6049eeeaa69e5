"""Whether what `distmtl tune` found is better than what it began with: both trained with seeds that the search did not see.

    .venv/bin/distmtl tune configs/tuning/census.yaml
    .venv/bin/python -m benchmarks.tuned tunes/census [--seeds 1 2 3] [--parallel 2] [--out benchmarks/results/tune_census]

The search's trials have one seed, and the best of many is better there than it is: only other seeds tell. Every run is a run directory in
TUNE/compared: an interrupted comparison goes on. The checkpoint is chosen on the validation split, the figures are the test split's; means
and differences, paired by seed, with 95 % intervals (Student's t). Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import difference, interval
from distmtl.config import Config
from distmtl.config_file import load_config
from distmtl.loop import train
from distmtl.metrics import higher_is_better
from distmtl.versions import git_commit, versions


def run(config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(config, report=lambda record: None)


def compare(results: dict[str, list[dict[str, Any]]], monitor: str, headlines: dict[str, str]) -> dict[str, Any]:
    """Figure → both means, and the difference best - shipped."""
    figures = {f"validation {monitor}": {name: [r["best_value"] for r in of] for name, of in results.items()}}
    for task, metric in headlines.items():
        figures[f"test {task} {metric}"] = {name: [r["metrics"]["test"][task][metric] for r in of] for name, of in results.items()}
    return {
        figure: {name: asdict(interval(v)) | {"values": v} for name, v in values.items()}
        | {"difference": asdict(difference(values["best"], values["shipped"]))}
        for figure, values in figures.items()
    }


def verdict(figures: dict[str, Any]) -> str:
    """In words, figure by figure."""
    words = []
    for figure, of in figures.items():
        sign = 1 if higher_is_better(figure.rpartition(" ")[2]) else -1
        low, high = sorted((sign * of["difference"]["low"], sign * of["difference"]["high"]))
        words.append(f"{figure}: {'better' if low > 0 else 'worse' if high < 0 else 'not told apart'}")
    return "; ".join(words)


def markdown(result: dict[str, Any], searched: str) -> str:
    def shown(of: dict[str, Any], sign: str = "") -> str:
        return f"{of['mean']:{sign}.5f} ± {of['high'] - of['mean']:.5f}"

    lines = [
        f"| {f} | {shown(of['shipped'])} | {shown(of['best'])} | {shown(of['difference'], '+')} |" for f, of in result["figures"].items()
    ]
    return "\n".join(
        [
            "# What a search finds on Census-Income",
            "",
            f"The best against the config that the search began with; seeds {', '.join(map(str, result['seeds']))}, new to it.",
            "",
            "| | shipped | best | best − shipped, paired |",
            "| --- | ---: | ---: | ---: |",
            *lines,
            "",
            f"Best − shipped: {result['verdict']}.",
            "",
            *(f"- {c}" for c in result["conditions"]),
            "",
            f"#{searched}",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tune", type=Path)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--parallel", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/tune_census"))
    a = p.parse_args()

    search = json.loads((a.tune / "tune.json").read_text())
    monitor = f"train.monitor={search['metric']}"
    paths = {"shipped": Path(search["tuning"]["config"]), "best": a.tune / "best.yaml"}
    configs = {
        (name, seed): load_config(path, [f"run.seed={seed}", f"run.dir={a.tune}/compared/{name}-{seed}", "cluster.workers=1", monitor])
        for seed in a.seeds
        for name, path in paths.items()
    }
    with ProcessPoolExecutor(a.parallel, mp.get_context("spawn")) as pool:
        runs = dict(zip(configs, pool.map(run, configs.values()), strict=True))
    results = {name: [runs[name, seed] for seed in a.seeds] for name in paths}
    figures = compare(results, search["metric"], {t.name: t.metrics[0] for t in configs["best", a.seeds[0]].tasks})
    search["tuning"]["config"] = "/".join(paths["shipped"].parts[-2:])
    result = {
        "figures": figures,
        "verdict": verdict(figures),
        "seeds": a.seeds,
        "seconds": {name: [r["seconds"] for r in of] for name, of in results.items()},
        "conditions": [
            f"command: python -m benchmarks.tuned {shlex.join(sys.argv[1:])}",
            f"commit: {git_commit()}",
            f"versions: {', '.join(f'{k} {v}' for k, v in versions().items())}",
            f"machine: {os.cpu_count()} CPUs ({platform.machine()})",
        ],
        "search": search,
    }
    a.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    a.out.with_suffix(".md").write_text(markdown(result, (a.tune / "tune.md").read_text()))
    print(a.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
