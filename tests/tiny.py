"""A data set and config small enough for any test: ids, a bag, strings, numbers, a vector, null labels, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.config import Config
from distmtl.config_file import parse_config

ROWS = {"train": 3001, "validation": 700}  # prime-ish: nothing divides anything


def table(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    user, item, x = rng.zipf(1.3, rows) % 200, rng.integers(0, 50, rows), rng.normal(size=rows)
    p = 1 / (1 + np.exp(-(np.sin(user) + np.cos(item) + x - 1)))
    click = (rng.random(rows) < p).astype(np.int8)
    return pa.table(
        {
            "row": np.arange(rows),
            "user": user,
            "item": item,
            "tags": [rng.integers(0, 20, rng.integers(0, 4)).tolist() for _ in range(rows)],
            "domain": np.arange(rows) % 3,
            "city": [f"city {u % 37}" for u in user],
            "x": pa.array(x, mask=rng.random(rows) < 0.05),
            "image": pa.array(list(rng.normal(size=(rows, 3)).astype(np.float32)), pa.list_(pa.float32(), 3)),
            "w": rng.uniform(0.5, 1.5, rows),
            "click": click,
            "conversion": pa.array((rng.random(rows) < 0.3).astype(np.int8), mask=click == 0),
            "rating": pa.array(np.sin(user) + 0.1 * rng.normal(size=rows), mask=rng.random(rows) < 0.1),
            "p": p,
        }
    )


def write(folder: Path) -> None:
    """train in three files of several row groups each, validation in one."""
    for split, rows in ROWS.items():
        (folder / split).mkdir(parents=True)
        whole = table(rows, seed=len(split))
        files = 3 if split == "train" else 1
        for f in range(files):
            first, last = rows * f // files, rows * (f + 1) // files
            pq.write_table(whole.slice(first, last - first), folder / split / f"part-{f}.parquet", row_group_size=310 + 70 * f)


def raw(folder: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """The config as a mapping; `sections` are merged into it, one level deep."""
    config: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "validation"),
            "group": "user",
            "weight": "w",
            "num_streams": 8,
            "shuffle_window": 64,
        },
        "features": [
            {"kind": "id", "name": "user", "rows": 200, "dim": 8},
            {"kind": "id", "name": "item", "rows": 50, "dim": 8},
            {"kind": "id", "name": "tags", "rows": 20, "dim": 8, "pooling": "mean"},
            {"kind": "id", "name": "city", "rows": 60, "dim": 8},
            {"kind": "bucket", "name": "x_bucket", "column": "x", "boundaries": [-1, 0, 1], "dim": 4},
            {"kind": "numeric", "name": "x"},
            {"kind": "vector", "name": "image", "width": 3},
        ],
        "model": {"kind": "mmoe", "num_experts": 3, "expert": [16, 8]},
        "tasks": [
            {"kind": "binary", "name": "click", "tower": [8], "true_probability": "p"},
            {"kind": "binary", "name": "conversion", "tower": [8]},
            {"kind": "regression", "name": "rating", "tower": [8], "weight": 0.5},
        ],
        "train": {"global_batch_size": 128, "log_every": 5},
        "run": {"dir": str(run_dir)},
    }
    for key, value in sections.items():
        config[key] = (
            {**config[key], **value} if isinstance(value, dict) and isinstance(config.get(key), dict) and "kind" not in value else value
        )
    return config


def config(folder: Path, run_dir: Path, **sections: Any) -> Config:
    return parse_config(raw(folder, run_dir, **sections))
