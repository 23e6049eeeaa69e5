"""An impression → click → conversion log in daily partitions whose truth drifts; how fast is an option, and at 0 it stands still.

    write_partitions(Path("log"), DriftWorld(), partitions=14, rows=600_000)   # log/{day=000/{part-00000.parquet, _SUCCESS}, …, mmoe.yaml}

On day d, with a, b, k planted signals of the row's features x, each of mean 0 and variance 1:

    sₜ = LASTING·kₜ + PASSING·(cos φ·aₜ + sin φ·bₜ)          φ = strength · 2πd/PERIOD of click and conversion
    click ~ σ(oₜ + SPREAD·sₜ), conversion likewise, null (unknown) where not clicked
    o_click, o_conversion = their rates' offsets + strength · SWING·sin(2πd/PERIOD + 2πt/3)

A quarter of PERIOD days turns what passes (whom a user and an item please, and which segments like which topics) into something without any
correlation with it; what lasts stays. `p_click` and `p_conversion` (of the clicked) are the true probabilities given x and the day, in
every partition: no model orders a day's rows better.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.data.crowd import Crowd
from distmtl.data.output import new_folder, write_configs
from distmtl.data.planted import BLOCK, Columns, sigmoid, solve
from distmtl.errors import DistmtlError

RATE = {"click": 0.3, "conversion": 0.3}  # of impressions, of clicks; on day 0 without drift
SPREAD, LASTING, PASSING, SWING, PERIOD = 1.5, 0.5, 0.85, 0.5, 40
TASKS = tuple(RATE)
ABOUT = __doc__.split("\n", 1)[0]


class DriftWorld(Crowd):
    """Args:
    strength: how fast it drifts; at 1, PERIOD days are a turn.
    """

    name = "drift"
    about = ABOUT

    def __init__(self, seed: int = 0, strength: float = 1.0):
        super().__init__(seed, users=2_000, items=500, segments=30, main=0.5, factors=3)
        if not 0 <= strength <= 10:
            raise DistmtlError(f"drift {strength} is not in 0 … 10")
        self.strength = strength
        x = self.impressions(np.random.default_rng((seed, 2**32 - 1)))
        spread = {task: SPREAD * self.signal(task, x, 0) for task in TASKS}
        self.offset = {"click": solve(lambda o: float(sigmoid(spread["click"] + o).mean()) - RATE["click"])}
        p = sigmoid(spread["click"] + self.offset["click"])
        self.offset["conversion"] = solve(lambda o: float((p * sigmoid(spread["conversion"] + o)).sum() / p.sum()) - RATE["conversion"])

    def angle(self, day: int) -> float:
        return self.strength * 2 * math.pi * day / PERIOD

    def signal(self, task: str, x: Columns, day: int) -> np.ndarray:
        """sₜ, of variance LASTING² + PASSING², about 1."""
        turned = math.cos(self.angle(day)) * self.planted(f"{task} a", x) + math.sin(self.angle(day)) * self.planted(f"{task} b", x)
        return LASTING * self.planted(f"{task} lasting", x) + PASSING * turned

    def probability(self, task: str, x: Columns, day: int) -> np.ndarray:
        """Of the label given the row's features and its day."""
        swing = self.strength * SWING * math.sin(2 * math.pi * (day / PERIOD + TASKS.index(task) / 3))
        return sigmoid(self.offset[task] + swing + SPREAD * self.signal(task, x, day))

    def block(self, day: int, index: int) -> pa.Table:
        """The rows index·BLOCK … of a day."""
        rng = np.random.default_rng((self.seed, day, index))
        x = self.impressions(rng)
        p_click, p_conversion = (self.probability(task, x, day) for task in TASKS)
        clicked = rng.random(BLOCK) < p_click
        converted = pa.array((rng.random(BLOCK) < p_conversion).astype(np.int8), mask=~clicked)
        return pa.table({**x, "click": clicked.astype(np.int8), "conversion": converted, "p_click": p_click, "p_conversion": p_conversion})

    def config(self) -> dict[str, Any]:
        return {
            "data": {"train": "day=*/*.parquet"},
            "features": self.features(),
            "tasks": [{"kind": "binary", "name": name, "tower": [16], "true_probability": f"p_{name}"} for name in RATE],
            "optimizer": {
                "tables": {"kind": "rowwise_adagrad", "lr": 0.15},
                "dense": {"kind": "adamw", "lr": 0.005},
                "schedule": {"warmup_steps": 20},
            },
            "train": {"global_batch_size": 512, "log_every": 25},
        }


def write_partitions(out: Path, world: DriftWorld, *, partitions: int, rows: int) -> int:
    """Write day=000 … day=(partitions - 1), sealed, of as many rows each, and ready configs. Returns the number of rows written.

    Args:
        rows: of all days together.

    Raises:
        DistmtlError: no row for every day, or `out` is not empty.
    """
    if not 1 <= partitions <= rows:
        raise DistmtlError(f"partitions {partitions} is not in 1 … {rows}, the number of rows")
    each = rows // partitions
    with new_folder(out) as folder:
        for day in range(partitions):
            (folder / f"day={day:03d}").mkdir()
            with pq.ParquetWriter(folder / f"day={day:03d}" / "part-00000.parquet", world.block(0, 0).schema) as writer:
                for first in range(0, each, BLOCK):
                    writer.write_table(world.block(day, first // BLOCK)[: each - first])
            (folder / f"day={day:03d}" / "_SUCCESS").touch()
        write_configs(folder, world.name, world.about, world.config(), world.heads)
    return each * partitions
