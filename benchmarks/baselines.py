"""What distmtl is measured against end to end: Parquet → updated tables without distmtl's reader and launcher.

    .venv/bin/python -m benchmarks.baselines data/wide/mmoe.yaml --loop torchrec [--workers 2] [--steps 48] [section.key=value …]

torchrec    bare TorchRec (loops.TorchRec) with our head and the faster float32 kernel
textbook    bare TorchRec, the experts a list of nn.Linear, torch's defaults
pytorch     nn.EmbeddingBag with sparse gradients, torch's defaults

Row groups are shuffled, and the rows within each, by a DataLoader's process per worker. Ids are not checked. One line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, IterableDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.loops import PyTorch, TorchRec
from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.config_file import load_config
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.process import quieten

WARM_UP = 4  # steps that are not counted
LOOPS = ("torchrec", "textbook", "pytorch")
mp.set_forkserver_preload(["benchmarks.baselines"])  # processes are forked from one that has imported everything and computed nothing


class ParquetRows(IterableDataset[dict[str, torch.Tensor]]):
    """The batches of one of `world_size` workers, a row group at a time."""

    def __init__(self, config: Config, rank: int, world_size: int):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.rows = config.train.global_batch_size // world_size
        self.files = sorted(Path(config.data.train).glob("*.parquet"))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        config, rng = self.config, np.random.default_rng(self.rank)
        groups = [(f, g) for f in self.files for g in range(pq.read_metadata(f).num_row_groups)]
        ids, numbers, labels = [f.name for f in config.embedded], [f.name for f in config.dense], [t.column for t in config.tasks]
        for i in rng.permutation(len(groups)):
            if i % self.world_size == self.rank:
                file, group = groups[i]
                table = pq.ParquetFile(file).read_row_group(group, columns=[*ids, *numbers, *labels], use_threads=False)
                table = table.take(rng.permutation(table.num_rows)).combine_chunks()
                for first in range(0, table.num_rows - self.rows + 1, self.rows):
                    rows = table.slice(first, self.rows)
                    values, lengths = zip(*(_jagged(rows[name].chunk(0)) for name in ids), strict=True)
                    yield {
                        "values": torch.from_numpy(np.concatenate(values)),
                        "lengths": torch.from_numpy(np.concatenate(lengths)),
                        "dense": torch.from_numpy(np.stack([rows[name].to_numpy() for name in numbers], axis=1).astype(np.float32)),
                        "labels": torch.from_numpy(np.stack([rows[name].to_numpy() for name in labels], axis=1).astype(np.float32)),
                    }


def _jagged(column: Any) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(column, "offsets"):
        return column.flatten().to_numpy(), np.diff(column.offsets.to_numpy()).astype(np.int32)
    return column.to_numpy(), np.ones(len(column), np.int32)


def batches(config: Config, rank: int, world_size: int) -> Generator[Batch, None, None]:
    keys = [f.name for f in config.embedded]
    for b in DataLoader(ParquetRows(config, rank, world_size), batch_size=None, num_workers=1):
        sparse = KeyedJaggedTensor(keys, b["values"], lengths=b["lengths"])
        yield Batch(sparse, b["dense"], b["labels"], torch.ones_like(b["labels"]), torch.arange(len(b["labels"])))


def measure(config: Config, loop: str, workers: int, steps: int) -> float:
    """Samples per second of one of LOOPS in processes of its own."""
    with TemporaryDirectory() as folder:
        mp.start_processes(_worker, (workers, Path(folder), loop, config, steps), nprocs=workers, start_method="forkserver")
        return float((Path(folder) / "speed").read_text())


def _worker(rank: int, world_size: int, folder: Path, loop: str, config: Config, steps: int) -> None:
    torch.set_num_threads(1)
    quieten()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    if loop == "torchrec":
        fastest_fp32()
    trained = PyTorch(config) if loop == "pytorch" else TorchRec(config, tuned=loop == "torchrec")
    source = batches(config, rank, world_size)
    trained.train(islice(source, WARM_UP))
    dist.barrier()
    began = time.perf_counter()
    trained.train(islice(source, steps))
    dist.barrier()
    if rank == 0:
        (folder / "speed").write_text(str(config.train.global_batch_size * steps / (time.perf_counter() - began)))
    source.close()  # and the DataLoader's process with it
    dist.destroy_process_group()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    p.add_argument("--loop", choices=LOOPS, required=True)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--steps", type=int, default=48)
    a = p.parse_args()
    speed = measure(load_config(a.config, a.overrides), a.loop, a.workers, a.steps)
    print(json.dumps({"loop": a.loop, "workers": a.workers, "samples_per_second": round(speed)}))


if __name__ == "__main__":
    main()
