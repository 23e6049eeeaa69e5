"""Speed of every head beside its own matrix products: what is lost to gates, activations, copies and Python.

    nice .venv/bin/python -m benchmarks.heads data/wide/mmoe.yaml [section.key=value …] [--only HEAD …] [--rounds 5] [--out DIR]

Forward and backward of the head alone, down to the gradient of random features, one thread, all heads at the sizes they have by default
(as the common model's MMoE, 4 × [256, 128]) over the config's features; STAR and PEPNet with one feature more, of three domains. The
limit is every product of one such step (gemms.py), each by its fastest kernel. Rounds are interleaved; CPU seconds, medians.
Products and parameters are also given relative to the shared bottom's, so that a head that multiplies more than docs/models.md says
is seen, however fast. Writes heads.json and heads.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gemms import DTYPES, Gemms, cpu_seconds, head_step, watched
from benchmarks.limit import keep_memory
from benchmarks.record import Record
from distmtl.config import Config
from distmtl.config_file import load_config, parse_config
from distmtl.distributed.matmul import fastest_fp32

HEADS: dict[str, dict[str, Any]] = {  # what they need beside their defaults
    "shared_bottom": {},
    "single_task": {},
    "omoe": {},
    "mmoe": {},
    "cgc": {},
    "ple": {},
    "esmm": {},
    "escm2": {"method": "dr"},
    "aitm": {},
    "dbmtl": {},
    "stem": {},
    "home": {},
    "star": {"domain": "domain"},
    "pepnet": {"domain_features": ["domain"]},
}
BASELINE = "shared_bottom"
TARGET = 0.65  # of the limit, in float32


def with_head(config: Config, kind: str) -> Config:
    """The config with another head; its second task follows the first, as funnels want it."""
    raw = json.loads(config.model_dump_json())
    raw["model"] = {"kind": kind} | HEADS[kind]
    raw["tasks"][1] |= {"parents": [raw["tasks"][0]["name"]], "space": None}
    if "domain" in json.dumps(raw["model"]):
        raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": config.embedded[0].dim})
    if kind == "pepnet":
        raw["model"]["gate_features"] = [f.name for f in config.embedded[:2]]
    return parse_config(raw)


def measure(config: Config, kinds: Iterable[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Head → samples per CPU second of it and of its limit, their ratio, and its size relative to the shared bottom's."""
    rows, out = config.train.global_batch_size, dict[str, dict[str, Any]]()
    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    sizes: dict[str, tuple[int, int]] = {}  # parameters, FLOPs
    for kind in dict.fromkeys((BASELINE, *kinds)):
        head, step = head_step(with_head(config, kind), rows)
        products = watched(step)
        work[kind] = step, Gemms(products, DTYPES[config.train.precision])
        sizes[kind] = sum(p.numel() for p in head.parameters()), sum(p.flops for p in products)
    for kind in kinds:
        parameters, flops = (round(a / b, 2) for a, b in zip(sizes[kind], sizes[BASELINE], strict=True))
        out[kind] = {"parameters": parameters, "products": flops, "rounds": {"ours": [], "limit": []}}
    for _ in range(rounds):
        for kind, head in out.items():
            for speeds, step in zip(head["rounds"].values(), work[kind], strict=True):
                speeds.append(round(rows / cpu_seconds(step)))
    for head in out.values():
        speeds = head["rounds"]
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["limit"], strict=True)]
        head |= {who: round(statistics.median(s)) for who, s in speeds.items()}
        head |= {"ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}
    return out


def markdown(report: dict[str, Any]) -> str:
    lines = ["| head | products | parameters | samples per CPU second | limit | ratio, median | lowest … highest |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for kind, head in report["heads"].items():
        lines.append(
            f"| {kind} | {head['products']:.2f} | {head['parameters']:.2f} | {head['ours']:,} | {head['limit']:,} | {head['ratio']:.2f} | "
            f"{head['lowest']:.2f} … {head['highest']:.2f} |"
        )
    below = [kind for kind, head in report["heads"].items() if head["ratio"] < TARGET]
    lines += ["", f"below {TARGET:.0%} of the limit: {', '.join(below) or 'none'}", ""]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    p.add_argument("--only", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help="heads; the results have no others then")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    record, float32, config = Record(), fastest_fp32(), load_config(a.config, a.overrides)
    heads = measure(config, a.only, a.rounds)
    own = {"float32": float32, "precision": config.train.precision, "rows": config.train.global_batch_size, "rounds": a.rounds}
    record.write(a.out, "heads", {"heads": heads}, markdown, cpu=torch.backends.cpu.get_cpu_capability(), **own)


if __name__ == "__main__":
    main()
