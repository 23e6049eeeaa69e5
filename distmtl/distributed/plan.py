"""A sharding plan, told: where every table lies, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.types import ShardingPlan

from distmtl.config import Config
from distmtl.tabulate import aligned

KERNELS = {"device": "fused", "host": "fused_uvm", "cached": "fused_uvm_caching"}  # TorchRec's, of a table's memory
MEMORY = {kernel: memory for memory, kernel in KERNELS.items()}


@dataclass(frozen=True)
class PlannedTable:
    """Where a table lies. `shards`: (rank, rows, columns) of every shard; `mb`: weights and optimizer state, all ranks."""

    table: str
    rows: int
    dim: int
    kind: str
    optimizer: str
    shards: tuple[tuple[int, int, int], ...]
    mb: float
    memory: str


def describe(plan: ShardingPlan, config: Config) -> Iterator[PlannedTable]:
    shapes = config.tables_read
    for module in plan.plan.values():
        for name, parameter in module.items():
            rows, dim = shapes[name]
            shards = tuple((s.placement.rank(), *s.shard_sizes) for s in parameter.sharding_spec.shards)
            mb = (4 * rows * dim + optimizer_bytes(config, name, rows, dim)) / 2**20
            optimizer, memory = config.table_optimizer(name).kind, MEMORY[parameter.compute_kernel]
            yield PlannedTable(name, rows, dim, parameter.sharding_type, optimizer, shards, round(mb, 6), memory)


def optimizer_bytes(config: Config, table: str, rows: int, columns: int) -> int:
    """State that a table's optimizer keeps for a shard."""
    numbers = {"sgd": 0, "adagrad": rows * columns, "rowwise_adagrad": rows, "adam": 2 * rows * columns}
    return 4 * numbers[config.table_optimizer(table).kind]


def plan_text(planned: list[PlannedTable], world_size: int) -> str:
    """The plan as a table, largest first, and what every rank holds; of many ranks, how many hold a part, the least, median and most."""
    every = world_size <= 8
    head = ["table", "rows", "dim", "sharding", "optimizer", "MB"]
    head += [f"rank {r}" for r in range(world_size)] if every else ["ranks", "min", "median", "max"]
    lines, held = [], [0.0] * world_size

    def spread(mb: list[float]) -> list[str]:
        if every:
            return [f"{m:,.2f}" if m else "-" for m in mb]
        some = [m for m in mb if m] or [0.0]
        return [str(len(some)), f"{min(some):,.2f}", f"{statistics.median(some):,.2f}", f"{max(some):,.2f}"]

    for t in sorted(planned, key=lambda t: -t.mb):
        share = [0.0] * world_size
        for rank, rows, columns in t.shards:
            share[rank] += t.mb * rows * columns / (t.rows * t.dim)
        held = [a + b for a, b in zip(held, share, strict=True)]
        kind = t.kind if t.memory == "device" else f"{t.kind}, {t.memory}"
        lines.append([t.table, f"{t.rows:,}", str(t.dim), kind, t.optimizer, f"{t.mb:,.2f}", *spread(share)])
    lines.append(["all", "", "", "", "", f"{sum(held):,.2f}", *spread(held)])
    return aligned(head, lines, left=(0, 3, 4))


def plan_json(planned: list[PlannedTable], world_size: int) -> dict[str, Any]:
    return {"world_size": world_size, "tables": [asdict(t) for t in planned]}
