"""distmtl against the machine's limit, an in-memory loop, bare TorchRec, plain PyTorch and peers, side by side.

    .venv/bin/python -m benchmarks.suite data/wide/mmoe.yaml [--rounds 5] [--out benchmarks/results]

One thread per process. Rounds are interleaved, so that a busy machine is busy for all of them; every figure is a ratio to the limit
(limit.py) of the same round, of the two workers' to twice the limit. The limit and the loops run with the malloc settings of
distmtl's workers, what is measured end to end (baselines.py, the peers) as its user would run it; the runs of `distmtl train` of one
round share a Ray, which is gone before anything else is measured. Writes suite.json and suite.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.baselines import measure
from benchmarks.gemms import DTYPES, cpu_seconds
from benchmarks.limit import Limit, keep_memory, reader_of, real_batches
from benchmarks.loops import InMemory, OverGloo, PyTorch, TorchRec
from benchmarks.record import Record
from distmtl.batch import Batch
from distmtl.cluster.trainer import KEEP_MEMORY, session, train_on_ray
from distmtl.config import Config
from distmtl.config_file import load_config
from distmtl.data.splits import open_splits
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.process import process_group
from distmtl.loop import Training
from distmtl.progress import Progress

STEPS = 6  # of a loop in one round
Ratios = dict[str, list[float]]


class Distmtl:
    """Our loop's pipeline, without the reader."""

    def __init__(self, config: Config, process: Any):
        self.training = Training(config, process, open_splits(config, checked=True), Progress(None, False, print))
        self.training.model.train()

    def train(self, batches: list[Batch]) -> None:
        t = self.training
        pipeline, source = type(t.pipeline)(t.model, t.optimizers, t.process.device), iter(batches)
        for _ in batches:
            t.optimizers.set_step(0)
            pipeline.progress(source)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """As for who does not know of the other float32 kernel."""
    chosen = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = chosen


def with_defaults(train: Callable[[list[Batch]], None]) -> Callable[[list[Batch]], None]:
    def go(batches: list[Batch]) -> None:
        with torch_defaults():
            train(batches)

    return go


def loops(config: Config, process: Any, batches: list[Batch]) -> dict[str, Callable[[list[Batch]], None]]:
    """Name → loop, of one precision; the ones of torch's defaults in float32 only."""
    out = {"distmtl, no reader": Distmtl(config, process).train, "TorchRec, our head": TorchRec(config, tuned=True).train}
    if config.train.precision == "fp32":
        out["TorchRec, textbook head, torch's defaults"] = with_defaults(TorchRec(config, tuned=False).train)
    if process.world_size == 1:
        out["in memory, raw FBGEMM"] = InMemory(config, batches).train
        if config.train.precision == "fp32":
            out["plain PyTorch"] = with_defaults(PyTorch(config).train)
    else:
        out["in memory, raw FBGEMM over gloo"] = OverGloo(config, batches).train
    return out


def one_process(config: Config, rounds: int, ratios: Ratios) -> None:
    """CPU seconds of one thread, every loop against the limit."""
    with process_group(config) as process:
        batches = real_batches(config)[:STEPS]
        rows = config.train.global_batch_size * len(batches)
        precision = config.train.precision
        limit = Limit(config, batches)
        every = loops(config, process, batches)
        for train in every.values():
            train(batches)
        read = reader_of(config, config.data.train)
        for _ in range(rounds):
            best = limit(precision)
            if precision == "fp32":
                speed = read.dataset.rows / cpu_seconds(lambda: [0 for _ in read.batches(0, read.steps_per_epoch)])
                ratios.setdefault("reader / pyarrow's decoding of the same columns", []).append(speed / limit.speed("decode"))
            for name, train in every.items():
                ratios.setdefault(f"1 process, {precision}: {name}", []).append(rows / cpu_seconds(lambda t=train: t(batches)) / best)


def _two(rank: int, store: str, configs: dict[str, Config], rounds: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    every: dict[str, Callable[[list[Batch]], None]] = {}
    for precision, own in configs.items():
        with process_group(own) as process:
            batches = real_batches(own, STEPS)
            every |= {f"2 processes, {precision}: {name}": train for name, train in loops(own, process, batches).items()}
            every[f"2 processes, {precision}: the limit, in both at once"] = Limit(own, batches).step(precision)
    for train in every.values():
        train(batches)
    for _ in range(rounds):
        for name, train in every.items():
            dist.barrier()
            began = time.perf_counter()
            train(batches)
            dist.barrier()
            if rank == 0:
                out.append((name, 2 * own.train.global_batch_size * len(batches) / (time.perf_counter() - began)))
    dist.destroy_process_group()


def two_processes(configs: dict[str, Config], rounds: int, limits: dict[str, float], ratios: Ratios) -> None:
    """Wall-clock seconds of two processes of one thread each, `global_batch_size` rows per process."""
    with TemporaryDirectory() as folder, mp.Manager() as manager:
        out = manager.list()
        mp.spawn(_two, (str(Path(folder) / "store"), configs, rounds, out), nprocs=2)
        for name, speed in out:
            precision = "bf16" if "bf16" in name else "fp32"
            ratios.setdefault(name, []).append(speed / (2 * limits[precision]))


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


def settle() -> None:
    """Wait, at most 15 s, until what was ended is gone: Ray's processes take their time, and cores."""
    for _ in range(15):
        if psutil.cpu_percent(1) < 10:
            return


def as_its_user_would() -> None:
    """What is started from here on has one thread and torch's own settings of memory. This process has long read its own."""
    for name in KEEP_MEMORY:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"


def scaled(path: str, workers: int, precision: str, *overrides: str) -> Config:
    """A config whose batch is each worker's."""
    batch = workers * load_config(path, []).train.global_batch_size
    return load_config(path, [f"train.precision={precision}", f"train.global_batch_size={batch}", f"cluster.workers={workers}", *overrides])


def end_to_end(path: str, runs: list[tuple[int, str]], whole: bool) -> list[dict[str, Any]]:
    """What `distmtl train` does, from Parquet to updated tables, once for each run, in one Ray; result.json of each.

    Args:
        whole: one worker trains an epoch and evaluates it, instead of 56 steps.
    """
    results = []
    with TemporaryDirectory() as folder, session(scaled(path, 2, "fp32").cluster):
        for workers, precision in runs:
            overrides = [f"run.dir={folder}/{workers}-{precision}", "train.log_every=10", "data.test=null"]
            overrides += [] if whole and workers == 1 else [f"train.steps={56 // workers}", "data.validation=null"]
            results.append(train_on_ray(scaled(path, workers, precision, *overrides), report=lambda record: None))
    return results


BASELINES = [("torchrec", 1, "fp32"), ("torchrec", 1, "bf16"), ("torchrec", 2, "fp32"), ("torchrec", 2, "bf16")]
BASELINES += [("textbook", 1, "fp32"), ("textbook", 2, "fp32"), ("pytorch", 1, "fp32")]


def peers(data: Path) -> dict[str, dict[str, Any]]:
    """What benchmarks/peers print, with their default Adam and with torch's fused one, if `make peers` has installed them."""
    python, folder = Path("build/peers/bin/python"), Path(__file__).parent / "peers"
    if not python.exists():
        return {}
    lines: list[dict[str, Any]] = []
    for name in ("rechub", "deepctr"):
        command = [str(python), str(folder / f"{name}.py"), str(data), "--rows", "65536"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        lines += map(json.loads, done.stdout.splitlines())
    return {f"{line['peer']}, {line['adam']} Adam": line for line in lines}


def plain_auc(config: Config) -> dict[str, float]:
    """Validation AUC of plain PyTorch after one epoch of the same batches. Not timed: on every core."""
    from sklearn.metrics import roc_auc_score

    torch.manual_seed(config.run.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    plain = PyTorch(config)
    reader = reader_of(config, config.data.train)
    plain.train(reader.batches(0, reader.steps_per_epoch))
    reader = reader_of(config, config.data.validation)
    scores, labels = [], []
    with torch.no_grad():
        for batch in reader.batches(0, reader.steps_per_epoch):
            known = batch.rows >= 0
            scores.append(plain.logits(batch)[known])
            labels.append(batch.labels[known])
    torch.set_num_threads(1)
    s, y = torch.cat(scores).numpy(), torch.cat(labels).numpy()
    return {t.name: float(roc_auc_score(y[:, i], s[:, i])) for i, t in enumerate(config.tasks)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    record, seconds = Record(), dict[str, float]()
    configs = {precision: load_config(a.config, [f"train.precision={precision}"]) for precision in DTYPES}
    config, ratios = configs["fp32"], Ratios()
    with timed("one process", seconds):
        for own in configs.values():
            one_process(own, a.rounds, ratios)
    limit = Limit(config, real_batches(config))
    limits = {precision: limit(precision) for precision in DTYPES}
    with timed("two processes", seconds):
        two_processes(configs, a.rounds, limits, ratios)
    with timed("plain PyTorch's epoch", seconds):
        auc: dict[str, dict[str, float]] = {"plain PyTorch": plain_auc(config)}
    as_its_user_would()
    samples: dict[str, list[float]] = {}

    def note(name: str, speed: float, best: float) -> None:
        samples.setdefault(name, []).append(speed)
        ratios.setdefault(name, []).append(speed / best)

    runs = list(product((1, 2), DTYPES))
    for i in range(a.rounds):
        best = {precision: limit(precision) for precision in DTYPES}  # before there is a Ray, which starts processes when it likes
        with timed("distmtl train", seconds), ProcessPoolExecutor(1, mp.get_context("forkserver")) as pool:
            results = pool.submit(end_to_end, a.config, runs, i == 0).result()
        settle()
        best = {precision: (before + limit(precision)) / 2 for precision, before in best.items()}
        for (workers, precision), result in zip(runs, results, strict=True):
            name = f"distmtl train, {workers} Ray worker(s), {precision}, from Parquet"
            note(name, result["samples_per_second"], workers * best[precision])
            if "validation" in result["metrics"]:
                auc[name] = {t: m["auc"] for t, m in result["metrics"]["validation"].items()}
        with timed("baselines", seconds):
            for loop, workers, precision in BASELINES:
                speed = measure(scaled(a.config, workers, precision), loop, workers, 24 // workers)
                note(f"{loop}, {workers} process(es), {precision}, from Parquet", speed, workers * limit(precision))
    with timed("peers", seconds):
        others = peers(Path(a.config).parent)
    for name, line in others.items():
        ratios[f"{name}, {line['rows']:,} rows in memory"] = [line["samples_per_cpu_second"] / limits["fp32"]]
    medians = {name: round(statistics.median(r), 3) for name, r in ratios.items()}
    report = {
        "limit, samples per CPU second": {name: round(limit.speed(name)) for name in limit.work}
        | {f"limit {p}": round(v) for p, v in limits.items()},
        "ratio to the limit, median": medians,
        "ratios": {name: [round(x, 3) for x in r] for name, r in ratios.items()},
        "samples per second, median": {name: round(statistics.median(s)) for name, s in samples.items()},
        "validation AUC": auc,
        "peers": others,
    }
    cpu = torch.backends.cpu.get_cpu_capability()
    spent = ", ".join(f"{stage} {s:.0f}" for stage, s in seconds.items())
    record.write(a.out, "suite", report, markdown, cpu=cpu, float32=fastest_fp32(), rounds=a.rounds, seconds=f"({spent})")


def markdown(report: dict[str, Any]) -> str:
    lines = ["| | ratio, median | lowest … highest |", "|---|---:|---:|"]
    for name, median in report["ratio to the limit, median"].items():
        spread = report["ratios"][name]
        lines.append(f"| {name} | {median:.2f} | {min(spread):.2f} … {max(spread):.2f} |")
    lines += ["", "| limit, one thread | samples per CPU second |", "|---|---:|"]
    lines += [f"| {name} | {speed:,} |" for name, speed in report["limit, samples per CPU second"].items()]
    lines += [
        "",
        "| validation AUC after one epoch | " + " | ".join(next(iter(report["validation AUC"].values()))) + " |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{a:.4f}" for a in aucs.values()) + " |" for name, aucs in report["validation AUC"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
