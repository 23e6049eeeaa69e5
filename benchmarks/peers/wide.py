"""What both peers need: the sizes of our common model, its data in memory as NumPy arrays, a clock, and one line of JSON."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from pyarrow.dataset import dataset

Arrays = dict[str, np.ndarray]
WARM_UP = 2  # steps that are not timed: Adam makes its state in the first
Speeds = dict[str, float]
ADAMS = {"default": None, "fused": True}  # torch's own choice, and its fused one, which the peers take but do not choose by themselves


class Wide:
    """Rows of `folder`; bags become (rows, longest) with 0 where there is no id, their ids are one higher than in the file."""

    def __init__(self, folder: Path, rows: int):
        self.adam: dict[str, float | None] = {"lr": 1e-3}
        config = yaml.safe_load((folder / "mmoe.yaml").read_text())
        self.batch, self.model = config["train"]["global_batch_size"], config["model"]
        self.tasks = [t["name"] for t in config["tasks"]]
        self.towers = [t["tower"] for t in config["tasks"]]
        self.numbers = [f["name"] for f in config["features"] if f["kind"] == "numeric"]
        embedded = {f["name"]: f["rows"] for f in config["features"] if f["kind"] == "id"}
        self.dim = next(f["dim"] for f in config["features"] if f["kind"] == "id")

        columns = [*embedded, *self.numbers, *self.tasks]
        train = dataset(folder / "train").head(rows, columns=columns, use_threads=False)
        validation = dataset(folder / "validation").to_table(columns=columns, use_threads=False)
        lists = [name for name in embedded if pa.types.is_list(train.schema.field(name).type)]
        self.ids = {name: size for name, size in embedded.items() if name not in lists}
        self.bags = {name: embedded[name] + 1 for name in lists}
        self.longest = {name: max(pc.max(pc.list_value_length(t[name])).as_py() for t in (train, validation)) for name in lists}
        self.train, self.validation = self._arrays(train), self._arrays(validation)

    def _arrays(self, table: pa.Table) -> tuple[Arrays, np.ndarray]:
        x = {name: table[name].to_numpy().astype(np.int32) for name in self.ids}
        x |= {name: self._padded(table[name].combine_chunks(), self.longest[name]) for name in self.bags}
        x |= {name: table[name].to_numpy() for name in self.numbers}
        return x, np.stack([table[name].to_numpy() for name in self.tasks], axis=1).astype(np.float32)

    @staticmethod
    def _padded(lists: pa.ListArray, longest: int) -> np.ndarray:
        out = np.zeros((len(lists), longest), np.int32)
        out[np.arange(longest) < pc.list_value_length(lists).to_numpy()[:, None]] = lists.flatten().to_numpy() + 1
        return out


class Clock:
    """Times whole training steps, the making of the next batch too: from one forward pass to the next one."""

    def __init__(self, model: torch.nn.Module):
        self.ticks: list[tuple[float, float]] = []
        model.register_forward_pre_hook(self._tick)

    def _tick(self, model: torch.nn.Module, _: Any) -> None:
        if model.training:
            self.ticks.append((time.perf_counter(), time.process_time()))

    def speeds(self, batch: int) -> Speeds:
        """Of the median step, on the wall's clock and on the CPU's."""
        wall, cpu = ([b - a for a, b in pairwise(times)] for times in zip(*self.ticks[WARM_UP:], strict=True))
        return {
            "samples_per_second": round(batch / statistics.median(wall)),
            "samples_per_cpu_second": round(batch / statistics.median(cpu)),
        }


def run(peer: str, doc: str | None, train: Callable[[Wide], tuple[str, Speeds, Iterable[float]]]) -> None:
    """`train` returns the peer's version, its speeds, and the validation AUC of each task. A line for each of ADAMS, in a process of its
    own with the data already in memory. What the peer prints goes to stderr."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--rows", type=int, default=262_144)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Wide(a.folder, a.rows)

    def measure(adam: str) -> None:
        data.adam["fused"] = ADAMS[adam]
        with redirect_stdout(sys.stderr):
            version, speeds, auc = train(data)
        line = {"peer": peer, "version": version, **speeds, "rows": len(data.train[1]), "adam": adam}
        line["auc"] = {task: round(float(value), 4) for task, value in zip(data.tasks, auc, strict=True)}
        print(json.dumps(line | {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))

    for adam in ADAMS:
        process = get_context("fork").Process(target=measure, args=(adam,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
