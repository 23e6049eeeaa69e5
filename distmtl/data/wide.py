"""A log as wide as a ranking team's: many id features over tables from small to large, bags, numbers; two tasks.

What benchmarks/ measures on. Its labels have a signal that a model can find, so that speed can be seen not to cost quality:

    click      ~ σ(a(x))                      a tenth of the rows
    conversion ~ click · σ(q(x))              a fifth of those; known for every row (CTCVR)

with a and q sums of hashed effects of the ids, of pairs of them, and of the numbers. Ids are drawn by Zipf's law.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from distmtl.data.output import SPLITS
from distmtl.data.planted import BLOCK, Planted, lists, scattered, sigmoid, solve
from distmtl.errors import DistmtlError

SMALLEST = 100  # rows of a table
MAX_BAG = 8  # ids of a bag: 0 … MAX_BAG
SPREAD = {"click": 1.5, "conversion": 1.2}
RATE = {"click": 0.10, "conversion": 0.20}


class WideWorld(Planted):
    """Args:
    ids, bags, numbers: how many features of each kind.
    largest: rows of the largest table; the smallest has SMALLEST, the others lie between, in equal ratios.
    """

    name = "wide"
    about = __doc__.split("\n", 1)[0]
    heads: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "mmoe": {"model": {"kind": "mmoe", "num_experts": 4, "expert": [256, 128]}},
        "ple": {"model": {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 1, "expert": [128]}},
    }

    def __init__(self, seed: int = 0, ids: int = 24, bags: int = 2, numbers: int = 8, largest: int = 2_000_000):
        super().__init__(seed)
        if not SMALLEST <= largest <= 10**9 or ids < 2:
            raise DistmtlError(f"largest {largest} and ids {ids}: needs {SMALLEST} ≤ largest ≤ 1e9 and ids ≥ 2")
        self.numbers = [f"x{i:02d}" for i in range(numbers)]
        sizes = np.geomspace(SMALLEST, largest, ids).round().astype(int)
        self.ids = {f"id{i:02d}": int(n) for i, n in enumerate(sizes)}
        self.bags = {f"bag{i}": int(sizes[len(sizes) // 2]) for i in range(bags)}
        self.offset, self.scale = dict.fromkeys(RATE, 0.0), dict.fromkeys(RATE, 1.0)
        x = self.impressions(np.random.default_rng((seed, len(SPLITS), 0)))
        for task, rate in RATE.items():
            signal = self.logit(task, x)
            self.scale[task] = SPREAD[task] / float(signal.std())
            logit = self.logit(task, x)
            self.offset[task] = solve(lambda b, z=logit, r=rate: float(sigmoid(z + b).mean()) - r)  # type: ignore[misc]

    def impressions(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The features of BLOCK rows; a bag is (BLOCK, MAX_BAG) with -1 where there is none."""
        x: dict[str, np.ndarray] = {name: scattered(rng.random(BLOCK), rows, 1.0) for name, rows in self.ids.items()}
        for name, rows in self.bags.items():
            ids = scattered(rng.random((BLOCK, MAX_BAG)), rows, 1.0)
            x[name] = np.where(np.arange(MAX_BAG) < rng.integers(MAX_BAG + 1, size=(BLOCK, 1)), ids, -1)
        for name in self.numbers:
            x[name] = rng.standard_normal(BLOCK).astype(np.float32)
        return x

    def logit(self, task: str, x: dict[str, np.ndarray]) -> np.ndarray:
        total, names = np.zeros(BLOCK), list(self.ids)
        for name in names:
            total += self.effect(f"{task} {name}", x[name])
        for a, b in itertools.pairwise(names):  # interactions of the small tables' ids, which repeat
            if self.ids[a] * self.ids[b] < 10**6:
                total += 2 * self.effect(f"{task} {a} {b}", x[a], x[b])
        for name in self.bags:
            has = x[name] >= 0
            total += 2 * (self.effect(f"{task} {name}", x[name]) * has).sum(1) / np.maximum(has.sum(1), 1)
        for i, name in enumerate(self.numbers):
            total += np.sin(x[name] + i) * (1 if task == "click" else -1) ** i
        return self.offset[task] + self.scale[task] * total

    def block(self, split: str, index: int) -> pa.Table:
        """The rows index·BLOCK … of a split."""
        rng = np.random.default_rng((self.seed, SPLITS.index(split), index))
        x = self.impressions(rng)
        p_click, p_conversion = (sigmoid(self.logit(task, x)) for task in RATE)
        click, conversion = rng.random(BLOCK) < p_click, rng.random(BLOCK) < p_conversion
        columns: dict[str, Any] = dict(x)
        for name in self.bags:
            columns[name] = lists(x[name])
        columns |= {"click": click.astype(np.int8), "conversion": (click & conversion).astype(np.int8)}
        if split != "train":
            columns |= {"p_click": p_click, "p_conversion": p_click * p_conversion}
        return pa.table(columns)

    def config(self) -> dict[str, Any]:
        return {
            "data": {"train": "train", "validation": "validation", "test": "test"},
            "features": [
                *({"kind": "id", "name": name, "rows": rows, "dim": 16} for name, rows in {**self.ids, **self.bags}.items()),
                *({"kind": "numeric", "name": name} for name in self.numbers),
            ],
            "tasks": [
                {"kind": "binary", "name": "click", "tower": [64], "true_probability": "p_click"},
                {"kind": "binary", "name": "conversion", "tower": [64], "true_probability": "p_conversion"},
            ],
            "optimizer": {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}, "dense": {"kind": "adam", "lr": 0.001}},
            "train": {"global_batch_size": 4096, "log_every": 20},
        }
