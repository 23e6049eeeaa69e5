"""What balancing costs: a step of every weighting method, relative to one of static weights.

    nice .venv/bin/python -m benchmarks.weighting data/wide/mmoe.yaml [section.key=value …] [--rounds 5] [--out DIR]

Our loop on batches in memory (suite.py), one process, one thread, in float32 and in bfloat16, with the config's own tasks and with them
twice. Every method takes turns with static weights; CPU seconds, medians of the rounds' quotients. Every method that reads gradients at
its own cut, one of them at the features too (`cut: features`). `static, looking` reads the gradients in every step, as static weights do
every train.log_every steps, for the log: a log_every-th of what that costs is theirs. Writes weighting.json and weighting.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gemms import cpu_seconds
from benchmarks.limit import keep_memory, real_batches
from benchmarks.record import Record
from benchmarks.suite import STEPS, Distmtl
from distmtl.config import Config, WeightingConfig
from distmtl.config_file import load_config, parse_config
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.process import process_group

KINDS = {kind: c for c in get_args(get_args(WeightingConfig)[0]) for kind in get_args(c.model_fields["kind"].annotation)}
READING = [kind for kind, method in KINDS.items() if method.reads_gradients]
TARGET = 1.10  # times static weights, at the methods' own cut


def methods(config: Config) -> dict[str, Config]:
    """Name → the config with that way of weighting; static weights first."""
    raw = config.model_dump(mode="json")
    never = {"log_every": 10**9}
    out = {"static": {"weighting": {"kind": "static"}, "train": raw["train"] | never}}
    out["static, looking"] = {"weighting": {"kind": "static"}, "train": raw["train"] | {"log_every": 1}}
    out |= {kind: {"weighting": {"kind": kind}} for kind in READING}
    out[f"{READING[0]}, cut: features"] = {"weighting": {"kind": READING[0], "cut": "features"}}
    return {name: parse_config(raw | sections) for name, sections in out.items()}


def twice(config: Config) -> Config:
    """Every task once more, under another name: twice as many towers and gates over the same labels."""
    raw = config.model_dump(mode="json")
    raw["tasks"] += [t | {"name": f"{t['name']}_again", "label": t["label"] or t["name"]} for t in raw["tasks"]]
    return parse_config(raw)


def measure(config: Config, rounds: int) -> dict[str, dict[str, Any]]:
    """Method → ms of a step, and its rounds' quotients by static weights."""
    out: dict[str, dict[str, Any]] = {}
    with process_group(config) as process:
        batches, configs = real_batches(config, STEPS), methods(config)
        static = Distmtl(configs.pop("static"), process)
        static.train(batches)
        for name, own in configs.items():
            loop = Distmtl(own, process)  # one at a time: each has tables of its own
            loop.train(batches)
            seconds = [[cpu_seconds(lambda one=one: one.train(batches)) for one in (static, loop)] for _ in range(rounds)]
            ratios = [round(b / a, 3) for a, b in seconds]
            ms = [round(1e3 * statistics.median(s) / len(batches), 1) for s in zip(*seconds, strict=True)]
            out[name] = {"ms": ms[1], "static ms": ms[0], "ratio": round(statistics.median(ratios), 3), "rounds": ratios}
    return out


def markdown(report: dict[str, Any]) -> str:
    every = report["cases"]
    lines = [f"| a step, in steps of static weights | {' | '.join(every)} |", f"|---|{'---:|' * len(every)}"]
    for name in next(iter(every.values())):
        cells = [(case[name]["ratio"], *sorted(case[name]["rounds"])) for case in every.values()]
        lines.append(f"| {name} | {' | '.join(f'{c[0]:.3f} ({c[1]:.2f} … {c[-1]:.2f})' for c in cells)} |")
    static = [f"{statistics.median(m['static ms'] for m in case.values()):.1f} ms" for case in every.values()]
    above = [f"{name} ({case})" for case, found in every.items() for name in READING if found[name]["ratio"] > TARGET]
    lines += [f"| static | {' | '.join(static)} |", "", f"above {TARGET}: {', '.join(above) or 'none'}", ""]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    record, float32, cases = Record(), fastest_fp32(), {}
    for precision in ("fp32", "bf16"):
        config = load_config(a.config, [*a.overrides, f"train.precision={precision}"])
        for own in (config, twice(config)):
            cases[f"{len(own.tasks)} tasks, {precision}"] = measure(own, a.rounds)
    own = {"float32": float32, "model": config.model.kind, "rows": config.train.global_batch_size, "rounds": a.rounds}
    own |= {"log_every": config.train.log_every, "cpu": torch.backends.cpu.get_cpu_capability()}
    record.write(a.out, "weighting", {"cases": cases}, markdown, **own)


if __name__ == "__main__":
    main()
