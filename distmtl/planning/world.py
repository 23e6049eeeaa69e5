"""World: one world size planned, or why it cannot be."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Stats

from distmtl.config import Config, SgdDense
from distmtl.distributed.plan import PlannedTable, describe, optimizer_bytes
from distmtl.distributed.planner import constraints, make_planner, sharders
from distmtl.distributed.sharding import attach_table_optimizers, table_parameters
from distmtl.errors import DistmtlError
from distmtl.model.multitask import TrainModel
from distmtl.planning.hardware import Hardware
from distmtl.planning.numbers import gib, number

RESERVED = 0.15  # of HBM: TorchRec's own default, which training uses
LISTED = 5  # tables named in a misfit


TIMES = {
    "fwd_compute": "forward compute",
    "fwd_comms": "forward communication",
    "bwd_compute": "backward compute, with update",
    "bwd_comms": "backward communication",
    "prefetch_compute": "prefetch",
}
MEMORY = {
    "weights": "table weights",
    "optimizer": "table optimizer state",
    "buffers": "lookup inputs and outputs",
    "dense": "dense weights, gradients, optimizer",
    "reserve": "kept in reserve by TorchRec",
    "free": "free",
}


@dataclass
class World:
    """One world size planned. Lists hold one number per rank: bytes of `MEMORY`, milliseconds of `TIMES`."""

    world_size: int
    nodes: int
    rows_per_rank: int
    capacity: float  # bytes of a rank's memory
    available: float  # of them for tables
    planned: list[PlannedTable] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    host: list[float] = field(default_factory=list)  # bytes of host memory, where tables live on CUDA
    times: dict[str, list[float]] = field(default_factory=dict)
    input_ms: float = 0.0  # input distribution of the slowest rank; TorchRec leaves it out of a step's total
    by_table: dict[str, dict[str, float]] = field(default_factory=dict)  # component → table → ms, on the slowest rank
    misfit: list[str] = field(default_factory=list)  # why no plan exists: one sentence each

    @property
    def fits(self) -> bool:
        return not self.misfit

    @property
    def totals(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.times.values(), strict=True)]

    @property
    def step_ms(self) -> float:
        return max(self.totals)

    @property
    def slowest(self) -> int:
        return self.totals.index(self.step_ms)

    @property
    def communication(self) -> float:
        """Share of communication in the slowest rank's step."""
        return (self.times["fwd_comms"][self.slowest] + self.times["bwd_comms"][self.slowest]) / (self.step_ms or 1.0)

    def bottleneck(self) -> str:
        if not self.step_ms:
            return "none: there are no tables"
        key = max(TIMES, key=lambda k: self.times[k][self.slowest])
        ms = self.times[key][self.slowest]
        table = max(self.by_table[key], key=lambda t: self.by_table[key][t])
        text = f"{TIMES[key]}, {ms / self.step_ms:.0%} of the slowest rank's {number(self.step_ms)} ms"
        if len(self.by_table[key]) > 1:
            text += f"; table {table!r} takes {self.by_table[key][table] / ms:.0%} of that"
        middle = statistics.median(self.totals)
        if self.step_ms > 1.5 * middle:
            text += f"; uneven: the median rank needs {number(middle)} ms"
        return text


class BestPlan(Stats):
    """The only public door to a plan's estimates: TorchRec hands them to whoever logs them."""

    options: list[ShardingOption]
    considered: list[ShardingOption]

    def log(self, *arguments: Any, **named: Any) -> None:
        self.options, self.considered = named["best_plan"], named["enumerator"].last_stored_search_space


def offline_model(config: Config, device: str) -> nn.Module:
    """The whole model on "meta", with the table optimizers that the planner asks for."""
    with torch.device("meta"):
        model = TrainModel(config, torch.device("meta"))
    attach_table_optimizers(model, config, torch.device(device))
    return model


def plan_world(
    config: Config,
    hardware: Hardware,
    world_size: int,
    change: Callable[[str, ParameterConstraints], ParameterConstraints] = lambda table, c: c,
    **arguments: Any,
) -> World:
    """Plan as training on this world would.

    Args:
        change: applied to every table's constraints, for what-ifs that training does not offer.
        arguments: of TorchRec's planner, in place of training's.

    Raises:
        DistmtlError: the config asks for what does not exist on this device.
    """
    local = hardware.local_world_size(world_size)
    if world_size % local:
        raise DistmtlError(
            f"{local} ranks per node do not divide a world of {world_size}; give --ranks-per-node a divisor, "
            f"or --world-size {world_size - world_size % local} or {world_size + local - world_size % local}"
        )
    model = offline_model(config, hardware.device)
    allowed = {t: change(t, c) for t, c in constraints(config, local, world_size, hardware.device).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it advises against itself; training's planner uses it all the same
        reservation = HeuristicalStorageReservation(RESERVED)
    topology, best = hardware.topology(world_size), BestPlan()
    planner = make_planner(config, topology, allowed, **{"stats": [best], "storage_reservation": reservation, **arguments})
    rows = max(config.train.global_batch_size // world_size, 1)
    world = World(world_size, -(-world_size // hardware.ranks_per_node), rows, hardware.memory_in(topology), 0.0)
    try:
        plan = planner.plan(model, sharders())
        world.available = hardware.memory_in(reservation.last_reserved_topology)
        world.planned = list(describe(plan, config))
        _measure_storage(world, config, hardware, best.options if config.embedded else [], dense_bytes(config, model))
    except PlannerError as e:
        if reservation.last_reserved_topology is None:
            need = world.capacity * RESERVED + 6 * 4 * dense_parameters(model)
            world.misfit = [f"the dense model alone: TorchRec reserves {gib(need)} for it, a rank has {gib(world.capacity)}"]
        else:
            world.available = hardware.memory_in(reservation.last_reserved_topology)
            world.misfit = list(_misfit(hardware, reservation.last_reserved_topology, best.considered, str(e)))
    return world


def _measure_storage(world: World, config: Config, hardware: Hardware, options: list[ShardingOption], dense: float) -> None:
    """Sum the planner's estimates of all shards by rank."""

    def zeros() -> list[float]:
        return [0.0] * world.world_size

    world.times = {k: zeros() for k in TIMES}
    world.memory = {k: zeros() for k in ("weights", "optimizer", "buffers")}
    world.host = zeros()
    inputs = zeros()
    for option in options:
        for shard in option.shards:
            rank, (rows, columns) = shard.rank, shard.size
            for k in TIMES:
                world.times[k][rank] += getattr(shard.perf, k)
            inputs[rank] += shard.perf.input_dist_comms
            held = getattr(shard.storage, hardware.memory)
            if hardware.memory == "hbm":
                world.host[rank] += shard.storage.ddr
            if option.compute_kernel == EmbeddingComputeKernel.FUSED.value:
                weights, state = 4.0 * rows * columns, float(optimizer_bytes(config, option.name, rows, columns))
            else:  # of a table in host memory HBM holds a cache at most
                weights, state = 0.0, 0.0
            world.memory["weights"][rank] += weights
            world.memory["optimizer"][rank] += state
            world.memory["buffers"][rank] += held - weights - state
    world.input_ms = inputs[world.slowest]
    world.by_table = {k: {o.name: sum(getattr(s.perf, k) for s in o.shards if s.rank == world.slowest) for o in options} for k in TIMES}
    world.memory["dense"] = [dense] * world.world_size
    world.memory["reserve"] = [world.capacity - world.available - dense] * world.world_size
    used = [sum(parts) for parts in zip(*world.memory.values(), strict=True)]
    world.memory["free"] = [world.capacity - u for u in used]


def dense_parameters(model: nn.Module) -> int:
    """How many numbers are trained outside tables, whole on every rank."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for _, p in table_parameters(model))


def dense_bytes(config: Config, model: nn.Module) -> float:
    """Weights, the flat gradient and the optimizer's state."""
    dense = config.optimizer.dense
    state = {"adam": 2, "adamw": 2, "adagrad": 1}.get(dense.kind, 0) + (isinstance(dense, SgdDense) and dense.momentum > 0)
    return 4.0 * dense_parameters(model) * (2 + state)


def _misfit(hardware: Hardware, reserved: Topology, options: list[ShardingOption], planner: str) -> Iterator[str]:
    """Which tables do not fit, in which memory, and by how much.

    Args:
        reserved: what TorchRec leaves for tables.
    """
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)
    memories = {"hbm": "", "ddr": " of host memory"} if hardware.device == "cuda" else {"ddr": ""}
    lacking = [m for memory, of in memories.items() for m in _lacking(memory, of, hardware, reserved, by_table)]
    yield from lacking
    if not lacking:
        totals = {t: min(sum(s.storage.hbm + s.storage.ddr for s in o.shards) for o in own) for t, own in by_table.items()}
        top = sorted(totals, key=lambda t: -totals[t])[:LISTED]
        reason = planner.strip().splitlines()[-1].strip()
        yield f"the tables would fit in sum but cannot be laid out ({', '.join(map(repr, top))} are the largest): {reason}"


def _lacking(memory: str, of: str, hardware: Hardware, reserved: Topology, by_table: dict[str, list[ShardingOption]]) -> Iterator[str]:
    """What one memory, `of` this name, is too small for."""

    def largest(option: ShardingOption) -> float:
        return max(getattr(s.storage, memory) for s in option.shards)

    def whole(option: ShardingOption) -> float:
        return sum(getattr(s.storage, memory) for s in option.shards)

    world_size, available = reserved.world_size, hardware.memory_in(reserved, memory)
    needs = {t: min(map(largest, o)) for t, o in by_table.items()}
    totals = {t: min(map(whole, o)) for t, o in by_table.items()}
    have = f"a rank has {gib(available)}{of} for tables (of {gib(hardware.memory_in(hardware.topology(world_size), memory))})"
    alone = sorted((t for t in needs if needs[t] > available), key=lambda t: -needs[t])
    for t in alone[:LISTED]:
        option = min(by_table[t], key=largest)
        yield (
            f"table {t!r} ({option.tensor.shape[0]:,} rows x {option.tensor.shape[1]}) does not fit by itself: {option.sharding_type}, "
            f"one rank would hold {gib(needs[t])}, {have}: {gib(needs[t] - available)} too much"
        )
    if len(alone) > LISTED:
        yield f"{len(alone) - LISTED} more tables do not fit by themselves: {', '.join(map(repr, alone[LISTED:]))}"
    total, room = sum(totals.values()), available * world_size
    if total > room:
        top = sorted(totals, key=lambda t: -totals[t])[:LISTED]
        yield (
            f"all tables together need {gib(total)}{of}, {world_size} rank(s) have {gib(max(room, 0))} for them: "
            f"{gib(total - room)} too much; the largest are {', '.join(f'{t!r} ({gib(totals[t])})' for t in top)}"
        )
