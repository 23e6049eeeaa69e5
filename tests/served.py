"""A tiny model, published as a full export and a delta, and a service without Ray to ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import tiny
from worlds import train_world

from distmtl.config_file import parse_config
from distmtl.exporting.publishing import publish
from distmtl.run_directory import find_checkpoint
from distmtl.serving.app import Answer, Service

CONTEXT = ("user", "city", "x")
CANDIDATES = ("item", "tags", "image")


def config(data: Path, run: Path, **sections: Any):
    """Ids of 40 … 49 are unknown items; tags are a bag and a sequence."""
    raw = tiny.raw(data, run, train={"global_batch_size": 512, "eval_every": 3, "keep": 5}, **sections)
    raw["features"][1] |= {"rows": 40, "out_of_range": "oov"}
    raw["features"].append({"kind": "sequence", "name": "history", "column": "tags", "rows": 20, "dim": 8, "max_length": 5})
    return parse_config(raw)


def published(data: Path, folder: Path) -> tuple[str, str]:
    """A run, and two of its checkpoints in FOLDER/all: 000000-full, 000001-delta. Their paths, the later one's last."""
    run = folder / "run"
    train_world(config(data, run), 1)  # in a process of its own: autograd's threads here would stop ranks that are forked later
    checkpoints = sorted((run / "checkpoints").iterdir())
    first, last = (str(find_checkpoint(str(c)).path) for c in (checkpoints[0], checkpoints[-1]))
    publish(first, folder / "all", full_every=5, say=lambda text: None)
    publish(last, folder / "all", full_every=5, say=lambda text: None)
    assert sorted(p.name for p in (folder / "all").iterdir()) == ["000000-full", "000001-delta"]
    return first, last


def rows(n: int, seed: int = 0) -> pa.Table:
    """Candidates of one user."""
    table = tiny.table(n + 1, seed).slice(1).select([*CONTEXT, *CANDIDATES])
    for name in CONTEXT:
        table = table.set_column(table.column_names.index(name), name, pa.repeat(table[name][0], n))
    return table


def body(table: pa.Table, **more: Any) -> dict[str, Any]:
    return {
        "context": {name: table[name][0].as_py() for name in CONTEXT},
        "candidates": {name: table[name].to_pylist() for name in CANDIDATES},
        **more,
    }


async def ask(
    service: Service, content: Any, headers: dict[str, str] | None = None, path: str = "/v1/score", method: str = "POST"
) -> Answer:
    """The answer to a body: bytes, or what JSON is made of."""

    async def parts() -> AsyncIterator[bytes]:
        whole = content if isinstance(content, bytes) else json.dumps(content).encode()
        for first in range(0, len(whole), 1000):
            yield whole[first : first + 1000]

    return await service.answer(method, path, headers or {}, {}, parts())


def answer(service: Service, content: Any = b"", **more: Any) -> tuple[int, Any]:
    """Status and JSON."""
    got = asyncio.run(ask(service, content, **more))
    return got.status, json.loads(got.body)
