"""Partitions of the tiny data set, and what a followed run made of them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiny

from distmtl.config import Config
from distmtl.following import Follower, Partition, Until

ROWS = 1000  # of a partition
APART = 100_000  # first rows of two partitions, by their numbers


def write(source: Path, index: int, name: str | None = None, sealed: bool = True, rows: int = ROWS) -> Path:
    """Partition day=INDEX, with rows numbered from INDEX · APART."""
    folder = source / (name or f"day={index}")
    folder.mkdir(parents=True)
    table = tiny.table(rows, seed=100 + index)
    numbers = pa.array([index * APART + i for i in range(rows)])
    pq.write_table(table.set_column(0, "row", numbers), folder / "part-0.parquet", row_group_size=300)
    if sealed:
        (folder / "_SUCCESS").touch()
    return folder


def raw(source: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """tiny's config, with all that draws random numbers, without a validation set."""
    model = {"kind": "mmoe", "num_experts": 3, "expert": [16, 8], "dropout": 0.3}
    train = {"global_batch_size": 64, "log_every": 1, "save_every": 3}
    whole = tiny.raw(source, run, model=model, train=train, optimizer={"schedule": {"warmup_steps": 5}}, **sections)
    whole["data"] |= {"train": str(source), "validation": None}
    return whole


def config_of(config: Config, source: Path, index: int, name: str) -> Config:
    """That of a partition's run."""
    return Follower(config, str(source), Until(), "auto", print, None).config_of(Partition(index, name, None, False))


def assert_every_row_once(run: Path, log: Path, rows: int) -> None:
    """In every partition of a followed run."""
    for folder, trained in rows_trained(run, log).items():
        first = int(folder.rpartition("=")[2]) * APART
        assert sorted(trained) == list(range(first, first + rows)), folder


def index_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "follow.jsonl").read_text().splitlines()]


def rows_trained(run: Path, log: Path) -> dict[str, list[int]]:
    """Folder of a partition's run → the rows that it trained in the course that counts, by recording.Recorder's log: what a failure
    undid was not trained. A process may have trained several partitions: its steps are told apart by their rows."""
    out = {}
    for folder in sorted((run / "partitions").iterdir()):
        index, steps = int(folder.name.rpartition("=")[2]), {}
        for start in (r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "start"):
            steps = {step: rows for step, rows in steps.items() if step < start["step"]}
            made = defaultdict(list)
            for pid in (w.rsplit(" ", 1)[1] for w in start["workers"]):
                lines = [json.loads(line) for line in (log / pid).read_text().splitlines()] if (log / pid).exists() else []
                own = [rows for rows in lines if rows and rows[0] // APART == index]
                for k, rows in enumerate(own):
                    made[start["step"] + k] += rows
            steps |= made
        out[folder.name] = [row for step in sorted(steps) for row in steps[step]]
    return out
