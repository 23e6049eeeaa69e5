"""What the model of a config could do at most on one thread of this machine, piece by piece.

    .venv/bin/python -m benchmarks.limit data/wide/mmoe.yaml [section.key=value …]

gemm        the head's matrix products alone, forward and backward, each by its fastest kernel in that precision
embeddings  raw FBGEMM on the ids of real batches: lookup, gradient, update of the tables
limit       1 / (1/gemm + 1/embeddings): both need the same core
decode      pyarrow reads the columns that the config needs, and nothing else: overlaps where a core is free
rows        the table rows that the ids touch, read and written at the speed of random rows: what memory allows embeddings
exchange    bytes to other workers over the speed of gloo on this machine, of two workers; overlaps where a core is free
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.gemms import DTYPES, Gemms, cpu_seconds, products
from distmtl.batch import Batch
from distmtl.cluster.trainer import KEEP_MEMORY
from distmtl.config import Config
from distmtl.config_file import load_config
from distmtl.data.collate import Collator
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.reader import Reader
from distmtl.distributed.process import Process
from distmtl.loop import train_reader
from distmtl.model.head import Head
from distmtl.model.layout import Layout

BATCHES = 8


def keep_memory() -> None:
    """Begin this program anew with the malloc settings of distmtl's workers, which glibc reads as a process starts."""
    if not os.environ.keys() >= KEEP_MEMORY.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | KEEP_MEMORY)


def reader_of(config: Config, path: str | None) -> Reader:
    """As one worker reads it."""
    assert path, "the config names no such split"
    return train_reader(config, open_dataset(path), Process(0, 1, torch.device("cpu")))


def real_batches(config: Config, count: int = BATCHES) -> list[Batch]:
    return list(reader_of(config, config.data.train).batches(0, count))


class RawTables:
    """FBGEMM's table-batched embedding bags, fed with the ids of real batches, without TorchRec.

    Args:
        features: names of those whose tables these are; default: all.
    """

    def __init__(self, config: Config, batches: list[Batch], features: Sequence[str] | None = None):
        table_of = {f.name: f.table_name for f in config.embedded if features is None or f.name in features}
        tables = {name: size for name, size in config.tables_read.items() if name in table_of.values()}
        names = list(tables)
        self.tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in tables.values()],
            feature_table_map=[names.index(table) for table in table_of.values()],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.05,
            eps=1e-8,
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        for weights in self.tbe.split_embedding_weights():
            weights.uniform_(-0.01, 0.01)
        self.inputs = [(ids.values(), ids.offsets().long()) for ids in (_of_features(b.sparse, list(table_of)) for b in batches)]
        out = self.tbe(*self.inputs[0])
        self.gradient, self.next = torch.randn_like(out) * 1e-3, 0

    def __call__(self) -> None:
        values, offsets = self.inputs[self.next % len(self.inputs)]
        self.next += 1
        self.tbe(values, offsets).backward(self.gradient)


def _of_features(ids: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    return ids if names == ids.keys() else ids.permute([ids.keys().index(name) for name in names])


class RandomRows:
    """The ids' rows of one big table, read and written back: the traffic of the tables without the arithmetic."""

    def __init__(self, config: Config, batches: list[Batch]):
        dim = max(columns for _, columns in config.tables_read.values())
        offsets = torch.cumsum(torch.tensor([0] + [f.table_rows for f in config.embedded]), 0)
        self.table = torch.zeros(int(offsets[-1]), dim)
        self.ids, self.next = [], 0
        for b in batches:
            counts = b.sparse.lengths().view(len(config.embedded), -1).sum(1)
            self.ids.append(b.sparse.values() + torch.repeat_interleave(offsets[:-1], counts))

    def __call__(self) -> None:
        ids = self.ids[self.next % len(self.ids)]
        self.next += 1
        self.table[ids] = self.table[ids]


def decode(dataset: Dataset, columns: list[str], rows: int) -> int:
    """Read at least so many rows; returns how many."""
    done = 0
    for part in range(len(dataset.parts)):
        with dataset.open_part(part) as file:
            for batch in file.iter_batches(batch_size=8192, columns=columns, use_threads=False):
                done += batch.num_rows
                if done >= rows:
                    return done
    return done


def exchange_bytes(config: Config, batch: Batch, dense_parameters: int) -> dict[str, int]:
    """What one of two workers sends in a step: half of its rows' ids and vectors go to the other, and as many gradients back."""
    rows = len(batch.rows)
    width = 2 if config.exchange == "bf16" else 4
    vectors = rows * sum(f.dim for f in config.embedded) * config.copies * width // 2
    ids = (batch.sparse.values().numel() * 8 + batch.sparse.lengths().numel() * 4) // 2
    return {"all-to-all": ids + 2 * vectors, "all-reduce": dense_parameters * 4}


def _exchange(rank: int, file: str, sizes: dict[str, int], rounds: int, seconds: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    send = {name: torch.zeros(size // 4 // 2 * 2) for name, size in sizes.items()}
    receive = torch.zeros_like(send["all-to-all"])
    for i in range(rounds + 2):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(receive, send["all-to-all"])
        dist.all_reduce(send["all-reduce"])
        if i >= 2 and rank == 0:
            seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()


def exchange_seconds(sizes: dict[str, int], rounds: int = 9) -> float:
    """Median seconds that two processes need to exchange so many bytes, doing nothing else."""
    with TemporaryDirectory() as folder, mp.Manager() as manager:
        seconds = manager.list()
        mp.spawn(_exchange, (str(Path(folder) / "store"), sizes, rounds, seconds), nprocs=2)
        return statistics.median(seconds)


def pieces(config: Config, batches: list[Batch]) -> dict[str, tuple[Callable[[], object], int]]:
    """Name → work, rows of it."""
    batch, dataset = config.train.global_batch_size, open_dataset(config.data.train)
    columns = Collator(config).columns
    rows = min(dataset.rows, 16 * batch)
    of_head = products(config, batch)
    out: dict[str, tuple[Callable[[], object], int]] = {f"gemm {name}": (Gemms(of_head, dtype), batch) for name, dtype in DTYPES.items()}
    return out | {
        "embeddings": (RawTables(config, batches), batch),
        "rows": (RandomRows(config, batches), batch),
        "decode": (lambda: decode(dataset, columns, rows), rows),
    }


class Limit:
    """Samples per CPU second that one thread could reach, measured now."""

    def __init__(self, config: Config, batches: list[Batch]):
        self.work = pieces(config, batches)
        for work, _ in self.work.values():
            work()

    def __call__(self, precision: str) -> float:
        return 1 / sum(1 / self.speed(name) for name in (f"gemm {precision}", "embeddings"))

    def speed(self, name: str) -> float:
        work, rows = self.work[name]
        return statistics.median(rows / cpu_seconds(work) for _ in range(5))

    def step(self, precision: str) -> Callable[[list[Batch]], None]:
        """What is measured, as a loop."""
        gemm, tables = (self.work[name][0] for name in (f"gemm {precision}", "embeddings"))

        def go(batches: list[Batch]) -> None:
            for _ in batches:
                gemm()
                tables()

        return go


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = p.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    config = load_config(a.config, a.overrides)
    batches = real_batches(config)
    limit = Limit(config, batches)
    for name in limit.work:
        print(f"{name:16}{limit.speed(name):>14,.0f} samples/s")
    dense = sum(p.numel() for p in Head(config, Layout.of(config)).parameters())
    sizes = exchange_bytes(config, batches[0], dense)
    text = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    rate = 2 * config.train.global_batch_size / exchange_seconds(sizes)
    print(f"{'exchange':16}{rate:>14,.0f} samples/s of two workers ({text} per worker and step)")
    for precision in DTYPES:
        print(f"{'limit ' + precision:16}{limit(precision):>14,.0f} samples/s")


if __name__ == "__main__":
    main()
