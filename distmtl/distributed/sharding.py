"""Tables → sharding plan → DistributedModelParallel, with initial weights that do not depend on the plan."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from distmtl.config import AdagradTable, AdamTable, Config, RowWiseAdagradTable, SgdTable
from distmtl.distributed.process import Process
from distmtl.errors import DistmtlError

INIT_ROWS = 65_536  # rows initialised from one seed


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with the types that it leaves out on CPU although they are right there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [*types, *(t for t in ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard") if t not in types)]


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


def attach_table_optimizers(tables: nn.Module, config: Config, device: torch.device) -> None:
    """Give every table its own optimizer, which FBGEMM runs inside backward.

    Raises:
        DistmtlError: an optimizer that FBGEMM does not have on this device.
    """
    kind: type[torch.optim.Optimizer]
    arguments: dict[str, Any]
    for name, parameter in table_parameters(tables):
        optimizer = config.table_optimizer(name)
        match optimizer:
            case SgdTable():
                kind, arguments = torch.optim.SGD, {"lr": optimizer.lr}
            case AdagradTable():
                kind, arguments = torch.optim.Adagrad, {"lr": optimizer.lr, "eps": optimizer.eps}
            case RowWiseAdagradTable():
                kind, arguments = torchrec.optim.RowWiseAdagrad, {"lr": optimizer.lr, "eps": optimizer.eps}
            case AdamTable():
                if device.type != "cuda":
                    raise DistmtlError(
                        f"table {name!r}: optimizer adam has no kernel on {device.type}; use rowwise_adagrad, adagrad or sgd"
                    )
                kind, arguments = torch.optim.Adam, {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
        apply_optimizer_in_backward(kind, [parameter], arguments)


def table_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Table name, weight, for every table of an unsharded model."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for name, table in module.embedding_bags.items():
                yield name, table.weight


def constraints(config: Config, local_world_size: int, world_size: int) -> dict[str, ParameterConstraints]:
    """What the planner may do with every table; always explicit, since data_parallel would drop the table's optimizer."""
    out = {}
    for feature in config.embedded:
        name = feature.table_name
        own = config.tables[name].sharding if name in config.tables else None
        types = own or config.sharding.types
        mb = feature.rows * feature.dim * 4 / 2**20
        if own is None and mb < config.sharding.row_wise_above_mb:
            types = tuple(t for t in types if t == "table_wise") or types
        if own is None and config.table_optimizer(name).kind == "rowwise_adagrad":
            types = tuple(t for t in types if t not in ("column_wise", "grid_shard"))
        if world_size == local_world_size and own is None:
            types = tuple(t for t in types if t not in ("table_row_wise", "grid_shard")) or ("table_wise",)
        out[name] = ParameterConstraints(sharding_types=list(types), compute_kernels=["fused"], min_partition=min(feature.dim, 32))
    return out


def make_plan(model: nn.Module, config: Config, process: Process) -> ShardingPlan:
    """Rank 0's planner decides for all.

    Raises:
        DistmtlError: the tables do not fit, or no allowed sharding type is possible.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    topology = Topology(world_size=process.world_size, local_world_size=local, compute_device=process.device.type)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=max(config.train.global_batch_size // process.world_size, 1),
        constraints=constraints(config, local, process.world_size),
    )
    try:
        return planner.collective_plan(model, [Sharder()], dist.group.WORLD)
    except PlannerError as e:
        raise DistmtlError(f"no sharding plan for {process.world_size} worker(s): {e}") from None


def shard(model: nn.Module, config: Config, process: Process) -> tuple[DistributedModelParallel, list[PlannedTable]]:
    """Spread the tables of `model` over the ranks. Dense parameters stay whole on each; Optimizers averages their gradients."""
    attach_table_optimizers(model, config, process.device)
    plan = make_plan(model, config, process)
    planned = list(describe(plan, config))
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=process.device,
        plan=plan,
        sharders=[Sharder()],
        init_data_parallel=False,
    )
    missing = {t.table for t in planned if any(rank == process.rank for rank, *_ in t.shards)} - {
        key.rsplit(".", 2)[1] for key in sharded.fused_optimizer.params
    }
    assert not missing, f"tables without their own optimizer: {missing}"
    initialise_tables(sharded, config)
    return sharded, planned


def describe(plan: ShardingPlan, config: Config) -> Iterator[PlannedTable]:
    state = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 0, "adam": 2}
    shapes = {f.table_name: (f.rows, f.dim) for f in config.embedded}
    for module in plan.plan.values():
        for name, parameter in module.items():
            rows, dim = shapes[name]
            shards = tuple((s.placement.rank(), *s.shard_sizes) for s in parameter.sharding_spec.shards)
            kind = config.table_optimizer(name).kind
            numbers = rows * dim * (1 + state[kind]) + (rows if kind == "rowwise_adagrad" else 0)
            yield PlannedTable(name, rows, dim, parameter.sharding_type, kind, shards, round(numbers * 4 / 2**20, 6))


def plan_text(planned: list[PlannedTable], world_size: int) -> str:
    """The plan as a table, largest first, and what every rank holds."""
    head = ["table", "rows", "dim", "sharding", "optimizer", "MB", *(f"rank {r}" for r in range(world_size))]
    lines, held = [], [0.0] * world_size
    for t in sorted(planned, key=lambda t: -t.mb):
        share = [0.0] * world_size
        for rank, rows, columns in t.shards:
            share[rank] += t.mb * rows * columns / (t.rows * t.dim)
        held = [a + b for a, b in zip(held, share, strict=True)]
        lines.append([t.table, f"{t.rows:,}", str(t.dim), t.kind, t.optimizer, f"{t.mb:,.2f}", *(f"{s:,.2f}" if s else "-" for s in share)])
    lines.append(["all", "", "", "", "", f"{sum(held):,.2f}", *(f"{h:,.2f}" for h in held)])
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    left = (0, 3, 4)  # columns of words

    def render(row: list[str]) -> str:
        return "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join(map(render, [head, *lines]))


def plan_json(planned: list[PlannedTable], world_size: int) -> dict[str, Any]:
    return {"world_size": world_size, "tables": [asdict(t) for t in planned]}


def dense_parameters(model: nn.Module, planned: list[PlannedTable]) -> dict[str, nn.Parameter]:
    """Everything that no sharded table holds."""
    tables = tuple(f".embedding_bags.{t.table}.weight" for t in planned)
    return {name: p for name, p in model.named_parameters() if not name.endswith(tables)}


def local_shards(state: dict[str, Any]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, tensor and offsets of every shard of the sharded tensors in a state dict that lies on this rank."""
    for name, value in state.items():
        if hasattr(value, "local_shards"):
            for s in value.local_shards():
                yield name, s.tensor, tuple(s.metadata.shard_offsets)


def initialise_tables(sharded: DistributedModelParallel, config: Config) -> None:
    """Uniform in ±init_scale, drawn by (seed, table, block of rows): the same table whatever the plan."""
    dims = {f.table_name: f.dim for f in config.embedded}
    with torch.no_grad():
        for key, tensor, (row, column) in local_shards(sharded.state_dict()):
            table = key.split(".")[-2]
            for block in range(row // INIT_ROWS, (row + tensor.shape[0] - 1) // INIT_ROWS + 1 if tensor.shape[0] else 0):
                first, last = max(row, block * INIT_ROWS), min(row + tensor.shape[0], (block + 1) * INIT_ROWS)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{config.run.seed}/{table}/{block}".encode()))
                drawn = torch.rand(last - block * INIT_ROWS, dims[table], generator=generator)[first - block * INIT_ROWS :]
                drawn = drawn[:, column : column + tensor.shape[1]].mul_(2).sub_(1).mul_(config.init_scale(table))
                tensor[first - row : last - row].copy_(drawn)
