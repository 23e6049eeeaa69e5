"""Training throughput as curves: our pipeline beside the machine's limit of the same size, one thing varied at a time.

    nice .venv/bin/python -m benchmarks.curves [--only NAME …] [--rounds 3] [--out benchmarks/results/curves.json]

One process, one thread, float32, batches in memory. Samples per CPU second, medians of interleaved rounds, new ids in each. The base:
26 features of one id (Zipf) over 1e6 rows in all, dim 16, 8 numbers, MMoE 4 × [256, 128], 2 towers [64], batch 4,096, row-wise Adagrad
and Adam. The limit is limit.py's: the head's products and raw FBGEMM. `bag` varies every feature; `features` shares the 1e6 rows out;
`lookup` is raw FBGEMM's forward; `initialise` compares initialise_tables(), and all of shard(), with filling as much fresh memory.
Every point is a process of its own, with the malloc settings of distmtl's workers; 1e8 rows need 15 GB. Also writes OUT.md and plots/.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.gemms import Gemms, cpu_seconds, products
from benchmarks.limit import RawTables
from benchmarks.plot import draw
from benchmarks.record import Record
from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.planted import scattered
from distmtl.distributed import sharding
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.process import Process, process_group
from distmtl.model.multitask import TrainModel, initialise_dense
from distmtl.optim import Optimizers
from distmtl.pipeline import make_pipeline

SECONDS = 0.5  # of a loop in one round, about
CLIFF = 0.25  # less of the limit than at a neighbouring point
ROWS = (10**4, 10**5, 10**6, 10**7, 10**8)
VARIED: dict[str, tuple[int, ...]] = {"rows": ROWS, "dim": (8, 16, 32, 64, 128), "bag": (1, 5, 10, 20, 50)}
VARIED |= {"features": (10, 50, 100, 200, 500), "tasks": (2, 4, 8, 16), "batch": (512, 1024, 4096, 16384, 65536)}
Point = dict[str, Any]


@dataclass(frozen=True)
class Size:
    rows: int = 10**6  # of all tables
    dim: int = 16
    bag: int = 1  # ids of a feature and sample
    features: int = 26
    tasks: int = 2
    batch: int = 4096

    def config(self) -> Config:
        ids = [{"kind": "id", "name": f"f{i}", "rows": self.rows // self.features, "dim": self.dim} for i in range(self.features)]
        raw = {
            "features": [*ids, *({"kind": "numeric", "name": f"x{i}"} for i in range(8))],
            "model": {"kind": "mmoe", "num_experts": 4, "expert": [256, 128]},
            "tasks": [{"kind": "binary", "name": f"t{i}", "tower": [64]} for i in range(self.tasks)],
            "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}, "dense": {"kind": "adam", "lr": 0.001}},
            "train": {"global_batch_size": self.batch},
        }
        return parse_config({"name": "curves", "data": {"train": "none"}} | raw)

    def ids(self, kind: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and offsets, as FBGEMM wants them."""
        rows, count = self.rows // self.features, self.features * self.batch * self.bag
        drawn = rng.integers(0, rows, count) if kind == "uniform" else scattered(rng.random(count), rows, 1.0)
        return torch.from_numpy(drawn), torch.arange(0, count + 1, self.bag)

    def make_batch(self, values: torch.Tensor) -> Batch:
        keys, lengths = [f"f{i}" for i in range(self.features)], torch.full((self.features * self.batch,), self.bag, dtype=torch.int32)
        labels = torch.randint(2, (self.batch, self.tasks)).float()
        sparse = KeyedJaggedTensor(keys, values, lengths=lengths)
        return Batch(sparse, torch.randn(self.batch, 8), labels, torch.ones_like(labels), torch.arange(self.batch))


def our_loop(config: Config, process: Process) -> Callable[[list[Batch]], None]:
    """loop.Training without its data sets: model, tables, optimizers and pipeline."""
    model = TrainModel(config, process.device)
    initialise_dense(model, config.run.seed)
    sharded, planned = sharding.shard(model, config, process)
    dense = sharding.dense_parameters(sharded, planned)
    optimizers = Optimizers(config.optimizer, sharded.fused_optimizer, dense, 10**6, trained=lambda: model.loss.trained)

    def train(batches: list[Batch]) -> None:
        pipeline, source = make_pipeline(sharded, optimizers, process.device), iter(batches)
        for _ in batches:
            optimizers.set_step(0)
            pipeline.progress(source)

    return train


def training(size: Size, kinds: list[str], rounds: int) -> dict[str, Point]:
    """Kind of ids → ours, limit, their ratio."""
    config, rng, out = size.config(), np.random.default_rng(0), {}
    with process_group(config) as process:
        batches = [size.make_batch(size.ids("zipf", rng)[0])]
        ours, tables = our_loop(config, process), RawTables(config, batches)
        gemm = Gemms(products(config, size.batch), torch.float32)
        ours(batches)
        steps = min(max(round(SECONDS / cpu_seconds(lambda: ours(batches))), 1), 64)
        for kind in kinds:
            rows, speeds = steps * size.batch, {"ours": list[int](), "limit": list[int]()}
            for _ in range(rounds):
                tables.inputs, tables.next = [size.ids(kind, rng) for _ in range(steps)], 0
                batches = [size.make_batch(values) for values, _ in tables.inputs]
                speeds["ours"].append(round(rows / cpu_seconds(lambda: ours(batches))))  # noqa: B023
                speeds["limit"].append(round(rows / sum(cpu_seconds(gemm) + cpu_seconds(tables) for _ in batches)))
            ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
            out[kind] = {who: round(statistics.median(s)) for who, s in speeds.items()} | {"ratio": round(ratio, 3), "rounds": speeds}
    return out


def lookup(size: Size, kinds: list[str], rounds: int, precision: str) -> dict[str, Point]:
    """Precision and kind of ids → samples per CPU second."""
    tables = [(size.rows // size.features, size.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * size.features
    tbe = SplitTableBatchedEmbeddingBagsCodegen(tables, weights_precision=SparseType(precision), bounds_check_mode=BoundsCheckMode.NONE)
    for weights in tbe.split_embedding_weights():
        weights.fill_(0.01)  # memory that was never written may be one page of zeros
    rng, out = np.random.default_rng(0), {}
    with torch.no_grad():
        for kind in kinds:
            inputs = [size.ids(kind, rng) for _ in range(32)]
            tbe(*inputs[0])
            speeds = [round(32 * size.batch / cpu_seconds(lambda: [tbe(*i) for i in inputs])) for _ in range(rounds)]  # noqa: B023
            out[f"{precision}, {kind}"] = {"limit": round(statistics.median(speeds)), "rounds": speeds}
    return out


def initialise(rows: int, rounds: int) -> dict[str, Point]:
    """Seconds, and their ratios; the median of each."""
    config, initialise_tables = Size(rows=rows, features=1).config(), sharding.initialise_tables
    seconds: dict[str, list[float]] = {"initialise": [], "shard": [], "write": []}
    sharding.initialise_tables = lambda *a: seconds["initialise"].append(cpu_seconds(lambda: initialise_tables(*a)))
    with process_group(config) as process:
        for _ in range(rounds):
            seconds["shard"].append(cpu_seconds(lambda: sharding.shard(TrainModel(config, process.device), config, process)))
            gc.collect()  # of the tables
            fresh = torch.empty(rows, Size.dim)
            seconds["write"].append(cpu_seconds(lambda: fresh.fill_(0.01)))  # noqa: B023
    ratios = {f"{name} / write": [a / b for a, b in zip(seconds[name], seconds["write"], strict=True)] for name in ("initialise", "shard")}
    return {"CPU seconds": {k: round(statistics.median(v), 2) for k, v in (seconds | ratios).items()} | {"rounds": seconds}}


def curve(name: str, rounds: int) -> dict[str, list[Point]]:
    """Name and kind → points, each from a process of its own, which owns no memory yet."""
    kinds = ["uniform", "zipf"] if name in ("rows", "lookup") else ["zipf"]
    jobs: list[tuple[Any, ...]] = [(x, training, replace(Size(), **{name: x}), kinds, rounds) for x in VARIED.get(name, ())]
    if name == "lookup":
        jobs = [(x, lookup, Size(rows=x), kinds, rounds, precision) for precision in ("fp32", "fp16") for x in ROWS]
    elif name == "initialise":
        jobs = [(10**8, initialise, 10**8, rounds)]
    context, series = mp.get_context("forkserver"), dict[str, list[Point]]()
    context.set_forkserver_preload(["benchmarks.limit"])
    for x, *job in jobs:
        with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for kind, point in pool.submit(*job).result().items():
                series.setdefault(f"{name}, {kind}", []).append({"x": x} | point)
                print(f"{name:10} {x:>11,}  {kind:14}" + "  ".join(f"{k} {v:,}" for k, v in point.items() if k != "rounds"), flush=True)
    return series


def markdown(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, points in report["curves"].items():
        keys = [k for k in points[0] if k not in ("x", "rounds")]
        lines += [f"| {name} | " + " | ".join(keys) + " |", "|---:" * (len(keys) + 1) + "|"]
        lines += [f"| {p['x']:,} | " + " | ".join(f"{p[k]:,}" for k in keys) + " |" for p in points] + [""]
    lines += [f"1e8 rows / 1e6 rows, {name}: {ratio}  " for name, ratio in report["1e8 rows / 1e6 rows"].items()]
    lines += ["", "cliffs: " + ("; ".join(report["cliffs"]) or "none"), ""]
    return "\n".join(lines)


def main() -> None:
    from distmtl.cluster.trainer import KEEP_MEMORY

    every = [*VARIED, "lookup", "initialise"]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help="curves; OUT has no others then")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/curves.json"))
    a, record = p.parse_args(), Record()
    os.environ |= {"OMP_NUM_THREADS": "1"} | KEEP_MEMORY  # malloc reads them where a process begins: not here, but in those of curve()
    curves: dict[str, list[Point]] = {}
    for name in a.only:
        curves |= curve(name, a.rounds)
    rows = {name: {p["x"]: p for p in points} for name, points in curves.items() if name.startswith("rows")}
    slowdown = {f"{n}, {w}": round(p[10**8][w] / p[10**6][w], 2) for n, p in rows.items() for w in ("ours", "limit")}
    pairs: list[Any] = [(n, *sorted(q, key=lambda p: p["ratio"])) for n, ps in curves.items() for q in pairwise(ps) if "ratio" in q[0]]
    text = "{}: {:.2f} of the limit at {:,}, {:.2f} at {:,}"
    steep = [text.format(n, p["ratio"], p["x"], q["ratio"], q["x"]) for n, p, q in pairs if p["ratio"] < (1 - CLIFF) * q["ratio"]]
    report = {"curves": curves, "1e8 rows / 1e6 rows": slowdown, "cliffs": steep}
    cpu = torch.backends.cpu.get_cpu_capability()
    record.write(a.out.parent, a.out.stem, report, markdown, cpu=cpu, float32=fastest_fp32(), rounds=a.rounds)
    draw(curves, a.out.parent / "plots")


if __name__ == "__main__":
    main()
