"""What a checkpoint costs: the stall of training, the slow-down while it is written, save and load against the disk itself.

    .venv/bin/python benchmarks/checkpoint.py [GB] [DIR]       # default: 2 GB of tables, in a temporary folder

One process, one thread, rounds interleaved; medians. write: the same bytes by plain sequential writes and one fsync. read: plain reads.
Page cache: reads come from memory where it holds the checkpoint, in both.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmtl import checkpoint
from distmtl.config_file import parse_config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.loop import Training
from distmtl.progress import Progress
from distmtl.saving import Saver

ROUNDS, TABLES, DIM, BATCH = 5, 8, 32, 4096
BLOCK = 8 << 20


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        rows = int(gigabytes * 2**30 / (TABLES * (DIM + 1) * 4))
        write_log(folder / "log", rows)
        config = parse_config(
            {
                "name": "checkpoint",
                "data": {"train": str(folder / "log")},
                "features": [{"kind": "id", "name": f"f{i}", "rows": rows, "dim": DIM} for i in range(TABLES)],
                "model": {"kind": "mmoe", "num_experts": 4, "expert": [256, 128]},
                "tasks": [{"kind": "binary", "name": "click"}, {"kind": "binary", "name": "buy"}],
                "train": {"global_batch_size": BATCH, "epochs": 1000},
                "run": {"dir": str(folder / "run")},
            }
        )
        with process_group(config) as process:
            measure(config, process, folder)


def measure(config: Any, process: Any, folder: Path) -> None:
    training = Training(config, process, open_splits(config), Progress(None, False, print))
    training.model.train()
    batches = training.reader.batches(0, 10**6)
    step = lambda: training.pipeline.progress(batches)  # noqa: E731
    seconds: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[[], Any]) -> None:
        began = time.monotonic()
        function()
        seconds.setdefault(what, []).append(time.monotonic() - began)

    savers = {
        b: Saver(folder / str(b), training.model, training.optimizers, process, attempt=0, background=b, keep=1) for b in (False, True)
    }
    savers[True].wait()
    for _ in range(10):
        step()
    size = 0
    for r in range(1, ROUNDS + 1):
        for _ in range(20):
            timed("step", step)
        timed("save, training waiting", lambda r=r: savers[False].save({"step": r}, None))
        timed("stall in background", lambda r=r: savers[True].save({"step": r}, None))
        began = time.monotonic()
        while not savers[True].job.done():
            timed("step meanwhile", step)
        seconds.setdefault("save in background", []).append(time.monotonic() - began)
        savers[True].wait()
        found, _ = checkpoint.newest(folder / "False")
        assert found is not None
        size = sum(found.manifest["files"].values())
        timed("write", lambda size=size: write(folder / "plain", size))
        timed("load", lambda found=found: checkpoint.load(found, training.model, training.optimizers))
        timed("read", lambda: read(folder / "plain"))
    m = {what: statistics.median(values) for what, values in seconds.items()}
    print(f"{size / 2**30:.2f} GB in {TABLES} tables of {DIM} columns, row-wise Adagrad; batch {BATCH}; load {os.getloadavg()[0]:.1f}")
    print(f"{'':26}{'median s':>10}{'min':>10}{'max':>10}{'GB/s':>8}")
    for what, values in seconds.items():
        rate = f"{size / 2**30 / m[what]:8.2f}" if "step" not in what and "stall" not in what else ""
        print(f"{what:26}{m[what]:10.4f}{min(values):10.4f}{max(values):10.4f}{rate}")
    print(f"stall in background / save, training waiting   {m['stall in background'] / m['save, training waiting']:.3f}")
    print(f"step meanwhile / step                           {m['step meanwhile'] / m['step']:.2f}")
    print(f"write / save in background                      {m['write'] / m['save in background']:.2f}")
    print(f"read / load                                     {m['read'] / m['load']:.2f}")


def write_log(folder: Path, rows: int) -> None:
    """200,000 rows of uniform ids."""
    folder.mkdir()
    rng, n = np.random.default_rng(0), 200_000
    columns = {f"f{i}": rng.integers(0, rows, n) for i in range(TABLES)} | {t: rng.integers(0, 2, n) for t in ("click", "buy")}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=50_000)


def write(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for _ in range(size // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
