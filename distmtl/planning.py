"""What a run would need on a cluster that is not there: plan, memory, predicted time of a step. Nothing is allocated.

The plan is the one that training makes (make_planner, constraints); the times are TorchRec's model of the hardware and have
not been compared with any (docs/scaling.md says how to read them).
"""

from __future__ import annotations

import statistics
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import CROSS_NODE_BANDWIDTH, DDR_CAP, DDR_MEM_BW, HBM_MEM_BW, INTRA_NODE_BANDWIDTH
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Stats
from torchrec.distributed.types import CacheParams
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import Config, SgdDense
from distmtl.distributed.process import process_group, quieten
from distmtl.distributed.sharding import (
    GLOO_BANDWIDTH,
    BisectingProposer,
    PlannedTable,
    aligned,
    attach_table_optimizers,
    constraints,
    describe,
    make_planner,
    optimizer_bytes,
    plan_json,
    plan_text,
    sharders,
    table_parameters,
)
from distmtl.errors import DistmtlError
from distmtl.loop import Training, open_splits
from distmtl.model.multitask import MultiTaskModel, TrainModel
from distmtl.progress import Progress

GIB = 2**30
BYTES_PER_MS = GIB / 1000  # TorchRec's unit of bandwidth, of one GB/s
UNVALIDATED = "TorchRec's model, not validated on hardware"
RESERVED = 0.15  # of HBM: TorchRec's own default, which training uses
SMALLEST_SHARDS = 100_000  # tables × ranks up to which the smallest world is looked for: beyond, one try takes half a minute
CACHES = (0.2, 0.05, None)  # load factors of FUSED_UVM_CACHING; None: FUSED_UVM, no cache
LISTED = 5  # tables named in a misfit


@dataclass(frozen=True)
class Hardware:
    """A pretend cluster. Bandwidths default to what TorchRec assumes, and training with it. Memory and host memory are per rank."""

    device: str = "cuda"
    ranks_per_node: int = 8
    hbm_gb: float = 80.0
    ddr_gb: float = DDR_CAP / GIB
    intra_gb_s: float = INTRA_NODE_BANDWIDTH / BYTES_PER_MS
    inter_gb_s: float = CROSS_NODE_BANDWIDTH / BYTES_PER_MS
    hbm_gb_s: float = HBM_MEM_BW / BYTES_PER_MS
    ddr_gb_s: float = DDR_MEM_BW / BYTES_PER_MS

    @classmethod
    def of(cls, device: str, **given: Any) -> Hardware:
        """With the bandwidths that training assumes on this device, where none are given."""
        gloo = dict.fromkeys(("intra_gb_s", "inter_gb_s"), GLOO_BANDWIDTH / BYTES_PER_MS) if device == "cpu" else {}
        return cls(**{"device": device, **gloo, **given})

    @property
    def memory(self) -> str:
        """Where tables live: TorchRec's name of it."""
        return "hbm" if self.device == "cuda" else "ddr"

    def local_world_size(self, world_size: int) -> int:
        return min(self.ranks_per_node, world_size)

    def topology(self, world_size: int) -> Topology:
        return Topology(
            world_size=world_size,
            local_world_size=self.local_world_size(world_size),
            compute_device=self.device,
            hbm_cap=int(self.hbm_gb * GIB),
            ddr_cap=int(self.ddr_gb * GIB),
            intra_host_bw=self.intra_gb_s * BYTES_PER_MS,
            inter_host_bw=self.inter_gb_s * BYTES_PER_MS,
            hbm_mem_bw=self.hbm_gb_s * BYTES_PER_MS,
            ddr_mem_bw=self.ddr_gb_s * BYTES_PER_MS,
        )


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
        text = f"{TIMES[key]}, {ms / self.step_ms:.0%} of the slowest rank's {_number(self.step_ms)} ms"
        if len(self.by_table[key]) > 1:
            text += f"; table {table!r} takes {self.by_table[key][table] / ms:.0%} of that"
        middle = statistics.median(self.totals)
        if self.step_ms > 1.5 * middle:
            text += f"; uneven: the median rank needs {_number(middle)} ms"
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
    allowed = {t: change(t, c) for t, c in constraints(config, local, world_size).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it advises against itself; training's planner uses it all the same
        reservation = HeuristicalStorageReservation(RESERVED)
    topology, best = hardware.topology(world_size), BestPlan()
    planner = make_planner(config, topology, allowed, **{"stats": [best], "storage_reservation": reservation, **arguments})
    rows = max(config.train.global_batch_size // world_size, 1)
    world = World(world_size, -(-world_size // hardware.ranks_per_node), rows, _of(hardware, topology), 0.0)
    try:
        plan = planner.plan(model, sharders())
        world.available = _of(hardware, reservation.last_reserved_topology)
        world.planned = list(describe(plan, config))
        _measure_storage(world, config, hardware, best.options if config.embedded else [], dense_bytes(config, model))
    except PlannerError as e:
        if reservation.last_reserved_topology is None:
            need = world.capacity * RESERVED + 6 * 4 * dense_parameters(model)
            world.misfit = [f"the dense model alone: TorchRec reserves {_gib(need)} for it, a rank has {_gib(world.capacity)}"]
        else:
            world.available = _of(hardware, reservation.last_reserved_topology)
            world.misfit = list(_misfit(world, hardware, best.considered, str(e)))
    return world


def _of(hardware: Hardware, topology: Any) -> float:
    return float(getattr(topology.devices[0].storage, hardware.memory))


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


def _misfit(world: World, hardware: Hardware, options: list[ShardingOption], planner: str) -> Iterator[str]:
    """Which tables do not fit, and by how much."""
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)

    def largest(option: ShardingOption) -> float:
        return max(getattr(s.storage, hardware.memory) for s in option.shards)

    def whole(option: ShardingOption) -> float:
        return sum(getattr(s.storage, hardware.memory) for s in option.shards)

    needs = {t: min(map(largest, o)) for t, o in by_table.items()}
    totals = {t: min(map(whole, o)) for t, o in by_table.items()}
    have = f"a rank has {_gib(world.available)} for tables (of {_gib(world.capacity)})"
    alone = sorted((t for t in needs if needs[t] > world.available), key=lambda t: -needs[t])
    for t in alone[:LISTED]:
        option = min(by_table[t], key=largest)
        yield (
            f"table {t!r} ({option.tensor.shape[0]:,} rows x {option.tensor.shape[1]}) does not fit by itself: {option.sharding_type}, "
            f"one rank would hold {_gib(needs[t])}, {have}: {_gib(needs[t] - world.available)} too much"
        )
    if len(alone) > LISTED:
        yield f"{len(alone) - LISTED} more tables do not fit by themselves: {', '.join(map(repr, alone[LISTED:]))}"
    total, room = sum(totals.values()), world.available * world.world_size
    if total > room:
        top = sorted(totals, key=lambda t: -totals[t])[:LISTED]
        yield (
            f"all tables together need {_gib(total)}, {world.world_size} rank(s) have {_gib(max(room, 0))} for them: "
            f"{_gib(total - room)} too much; the largest are {', '.join(f'{t!r} ({_gib(totals[t])})' for t in top)}"
        )
    elif not alone:
        top = sorted(totals, key=lambda t: -totals[t])[:LISTED]
        reason = planner.strip().splitlines()[-1].strip()
        yield f"the tables would fit in sum but cannot be laid out ({', '.join(map(repr, top))} are the largest): {reason}"


def smallest_world(config: Config, hardware: Hardware, tried: list[World]) -> World | str:
    """The fewest ranks (a power of two within a node, then whole nodes) that hold the tables, or why none was found."""
    node, tables = hardware.ranks_per_node, {t: 4 * rows * dim for t, (rows, dim) in config.tables_read.items()}
    for table, c in constraints(config, node, node + 1).items():
        if set(c.sharding_types) == {"table_wise"} and tables[table] > _of(hardware, hardware.topology(1)):
            return f"none: table {table!r} may only lie whole on one rank ({_gib(tables[table])}); let it be row_wise"
    known = {w.world_size: w for w in tried}
    most = max(SMALLEST_SHARDS // max(len(tables), 1), node)
    best = min((w for w in tried if w.fits), key=lambda w: w.world_size, default=None)
    above = max((w.world_size for w in tried if not w.fits and (best is None or w.world_size < best.world_size)), default=0)
    sizes = [*(2**i for i in range(node.bit_length()) if 2**i < node), *range(node, most + 1, node)]
    sizes = [s for s in sizes if above < s < (best.world_size if best else most + 1)]

    def fits(i: int) -> bool:
        if sizes[i] not in known:
            known[sizes[i]] = plan_world(config, hardware, sizes[i], proposer=[BisectingProposer(1)])
        return known[sizes[i]].fits

    first, last = 0, len(sizes)
    if best is None:  # climb by doubling
        last = 0
        while last < len(sizes) and not fits(last):
            first, last = last + 1, min(2 * last + 1, max(len(sizes) - 1, last + 1))
        if last >= len(sizes):
            return f"none up to {max(most, above)} ranks"
    found = bisect_left(range(len(sizes)), True, lo=first, hi=last, key=fits)
    return known[sizes[found]] if found < len(sizes) else known[best.world_size]  # type: ignore[union-attr]


@dataclass
class HostMemory:
    """What moving the largest tables to host memory would change (CUDA)."""

    kernel: str
    load_factor: float | None
    tables: list[str]
    bytes: float  # of these tables and their optimizer state
    world: World


def host_memory(config: Config, hardware: Hardware, world: World) -> list[HostMemory]:
    """For each cache size, the fewest of the largest tables whose move lets the plan exist."""
    size = {t: 4.0 * rows * dim + optimizer_bytes(config, t, rows, dim) for t, (rows, dim) in config.tables_read.items()}
    order = sorted(size, key=lambda t: -size[t])
    out = []
    for factor in CACHES:
        kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING if factor else EmbeddingComputeKernel.FUSED_UVM
        room = 0.95 * world.available * world.world_size  # buffers and uneven shards want some
        moved = 0
        while moved < len(order) and sum(size[t] for t in order[moved:]) + (factor or 0) * sum(size[t] for t in order[:moved]) > room:
            moved += 1
        tables = order[: max(moved, 1)]
        planned = _with_host(config, hardware, world.world_size, tables, kernel.value, factor)
        if not planned.fits and len(tables) < len(order):
            tables = order
            planned = _with_host(config, hardware, world.world_size, tables, kernel.value, factor)
        out.append(HostMemory(kernel.value, factor, tables, sum(size[t] for t in tables), planned))
    return out


def _with_host(config: Config, hardware: Hardware, world_size: int, tables: list[str], kernel: str, factor: float | None) -> World:
    chosen = set(tables)

    def change(table: str, c: ParameterConstraints) -> ParameterConstraints:
        if table not in chosen:
            return c
        return replace(c, compute_kernels=[kernel], cache_params=CacheParams(load_factor=factor) if factor else None)

    return plan_world(config, hardware, world_size, change, proposer=[BisectingProposer(14)])


# ------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Measured:
    """Medians of one worker in this process, beside what TorchRec predicts of its tables."""

    steps: int
    rows: int
    predicted_ms: float
    tables_ms: float
    step_ms: float

    @property
    def ratio(self) -> float | None:
        return self.tables_ms / self.predicted_ms if self.predicted_ms else None


def measure(config: Config, hardware: Hardware, steps: int = 20, warm_up: int = 3) -> Measured:
    """Train a few steps with one worker on this machine's CPU, then the same batches through the tables alone.

    Raises:
        DistmtlError: no CPU plan, no data, or tables beyond this machine's memory.
    """
    if hardware.device != "cpu":
        raise DistmtlError("--measure trains on this machine's CPU and compares with a CPU plan; add --device cpu")
    one = config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": None, "test": None}),
            "train": config.train.model_copy(update={"early_stopping": None, "profile": None}),
            "cluster": config.cluster.model_copy(update={"device": "cpu"}),
        }
    )
    predicted = plan_world(one, hardware, 1)
    if not predicted.fits:
        raise DistmtlError(f"--measure needs a plan for one worker: {predicted.misfit[0]}")
    need, free = sum(t.mb for t in predicted.planned) * 2**20, psutil.virtual_memory().available
    if need > 0.7 * free:
        raise DistmtlError(
            f"--measure: the tables need {_gib(need)} in one process, this machine has {_gib(free)} free; give the tables fewer rows"
        )
    with process_group(one) as process:
        training = Training(one, process, open_splits(one), Progress(None, False, lambda record: None))
        last = min(steps + warm_up, training.total_steps)
        source = training.reader.batches(0, last)
        batches = list(source)
        training.model.train()
        queue = iter(batches)
        whole = _timed(lambda: training.pipeline.progress(queue), last)
        ids = iter([b.sparse for b in batches])
        alone = _timed(lambda: _tables_alone(training.train_model.model, next(ids)), last) if one.embedded else [0.0]
    skip = warm_up if last > 2 * warm_up else 0
    return Measured(
        last - skip, one.train.global_batch_size, predicted.step_ms, statistics.median(alone[skip:]), statistics.median(whole[skip:])
    )


def _tables_alone(model: MultiTaskModel, ids: KeyedJaggedTensor) -> None:
    """What a step does in the tables: the lookup, and the update for some gradient."""
    vectors = [tables(ids) for tables in model.sequences.values()]
    sums = [model.embeddings(ids).values().sum()] + [jagged.values().sum() for v in vectors for jagged in v.values()]
    torch.stack(sums).sum().backward()


def _timed(call: Callable[[], Any], times: int) -> list[float]:
    out = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        out.append(1000 * (time.perf_counter() - began))
    return out


# -------------------------------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """Everything that `distmtl plan` says."""

    config: Config
    hardware: Hardware
    worlds: list[World]
    smallest: World | str
    host: list[HostMemory]
    dense: int
    measured: Measured | None = None

    @property
    def shown(self) -> World:
        """The smallest world asked for that fits, else the largest."""
        fitting = [w for w in self.worlds if w.fits]
        return min(fitting, key=lambda w: w.world_size) if fitting else max(self.worlds, key=lambda w: w.world_size)

    @property
    def fits(self) -> bool:
        return self.shown.fits

    def notes(self) -> list[str]:
        config, out = self.config, []
        streams, batch = config.data.num_streams, config.train.global_batch_size
        over = [w.world_size for w in self.worlds if w.world_size > streams]
        if over:
            out.append(
                f"training with {_and(over)} workers needs data.num_streams of at least {max(over)} (now {streams}), "
                "and a train.global_batch_size that it divides"
            )
        if any(w.world_size > batch for w in self.worlds):
            out.append(f"train.global_batch_size {batch} is below the number of workers: some would have no row; raise it")
        return out

    def text(self) -> str:
        world = self.shown
        blocks = [self._head(), *(f"note: {n}" for n in self.notes())]
        if world.fits:
            blocks += [
                "sharding plan (MB: weights and optimizer state; of many ranks, those that hold a part):\n"
                + plan_text(world.planned, world.world_size),
                _memory_text(world, self.hardware),
                _times_text(world, self.hardware),
                self._dense_text(),
            ]
        else:
            blocks.append("\n".join([f"does not fit on {world.world_size} rank(s):", *(f"  - {m}" for m in world.misfit)]))
        if self.host:
            blocks.append(self._host_text())
        if len(self.worlds) > 1:
            blocks.append(_worlds_text(self.worlds))
        blocks.append(f"smallest world size that fits: {self._smallest_text()}")
        if self.measured:
            blocks.append(self._measured_text(self.measured))
        return "\n\n".join(blocks)

    def json(self) -> dict[str, Any]:
        return {
            "config": self.config.name,
            "hardware": asdict(self.hardware),
            "predictions": UNVALIDATED,
            "fits": self.fits,
            "shown": self.shown.world_size,
            "worlds": [_world_json(w) for w in self.worlds],
            "smallest_world_size": self.smallest.world_size if isinstance(self.smallest, World) else None,
            "dense_parameters": self.dense,
            "host_memory": [
                {"kernel": h.kernel, "cache_load_factor": h.load_factor, "tables": h.tables, "bytes": h.bytes, **_summary_json(h.world)}
                for h in self.host
            ],
            "measured": {**asdict(self.measured), "ratio": self.measured.ratio} if self.measured else None,
            "notes": self.notes(),
        }

    def _head(self) -> str:
        h, world = self.hardware, self.shown
        tables = {t: rows * dim for t, (rows, dim) in self.config.tables_read.items()}
        memory = f"{h.hbm_gb:g} GiB HBM at {h.hbm_gb_s:g} GB/s" if h.device == "cuda" else f"{h.ddr_gb:g} GiB memory at {h.ddr_gb_s:g} GB/s"
        return (
            f"{self.config.name}: {sum(tables.values()):,} parameters in {len(tables)} tables, {self.dense:,} dense\n"
            f"on {world.world_size} pretend {h.device} rank(s), {h.local_world_size(world.world_size)} per node, each with {memory}; "
            f"{h.intra_gb_s:g} GB/s within a node, {h.inter_gb_s:g} between; {world.rows_per_rank:,} rows per rank and step"
        )

    def _dense_text(self) -> str:
        world = self.shown
        flop = 6 * self.dense * world.rows_per_rank / 1e9
        return (
            f"not in that time: the dense network (about {_number(flop)} GFLOP per rank, if every weight meets every row), "
            f"the all-reduce of its gradients ({_number(4 * self.dense / 2**20)} MB), reading data"
        )

    def _host_text(self) -> str:
        head = ["kernel", "cache", "tables moved", "GiB HBM", "GiB host", "ms/step", "fits"]
        lines = []
        for h in self.host:
            w = h.world
            row = [h.kernel, f"{h.load_factor:g}" if h.load_factor else "-", str(len(h.tables))]
            if w.fits:
                row += [_number(_held(w) / GIB), _number(max(w.host) / GIB), _number(w.step_ms), "yes"]
            else:
                row += ["-", f"≥ {_number(h.bytes / w.world_size / GIB)}", "-", "no"]
            lines.append(row)
        names = max((h.tables for h in self.host), key=len)
        some = ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
        return (
            f"with the largest tables in host memory ({self.hardware.ddr_gb:g} GiB per rank), most on one rank, {UNVALIDATED}:\n"
            + aligned(head, lines)
            + f"\nmoved, largest first: {some}. Planned only: distmtl trains every table in the device's memory"
        )

    def _smallest_text(self) -> str:
        if isinstance(self.smallest, str):
            return self.smallest
        s = self.smallest
        return f"{s.world_size} ({s.nodes} node(s)); its fullest rank gives {_gib(_held(s))} of {_gib(s.available)} to tables"

    def _measured_text(self, m: Measured) -> str:
        return (
            f"measured here: 1 worker on this CPU, median of {m.steps} steps of {m.rows:,} rows\n"
            f"  tables alone (lookup, backward, update): {_number(m.tables_ms)} ms; TorchRec's model: {_number(m.predicted_ms)} ms; "
            f"measured / predicted = {_number(m.ratio or 0)}\n"
            f"  the whole training step, which nothing predicts: {_number(m.step_ms)} ms\n"
            "  one machine, one load: this says how far off the model is here, not on the cluster"
        )


def make_report(config: Config, hardware: Hardware, world_sizes: list[int], measuring: bool = False) -> Report:
    """Plan every world size, the smallest one that fits and, where nothing fits, what host memory would change.

    Raises:
        DistmtlError: what the arguments or the config get wrong.
    """
    _check(hardware, world_sizes)
    quieten()
    measured = measure(config, hardware) if measuring else None
    worlds = [plan_world(config, hardware, w) for w in dict.fromkeys(world_sizes)]
    report = Report(config, hardware, worlds, "", [], dense_parameters(offline_model(config, hardware.device)), measured)
    report.smallest = smallest_world(config, hardware, worlds)
    if not report.fits and hardware.device == "cuda" and report.shown.available > 0:
        report.host = host_memory(config, hardware, report.shown)
    return report


def _check(hardware: Hardware, world_sizes: list[int]) -> None:
    if not world_sizes or min(world_sizes) < 1:
        raise DistmtlError(f"--world-size {','.join(map(str, world_sizes))}: a world has at least 1 rank")
    if hardware.ranks_per_node < 1:
        raise DistmtlError(f"--ranks-per-node {hardware.ranks_per_node}: a node has at least 1 rank")
    for name, value in asdict(hardware).items():
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise DistmtlError(f"--{name.replace('_', '-')} {value:g}: must be above 0")


def _memory_text(world: World, hardware: Hardware) -> str:
    what = "HBM" if hardware.device == "cuda" else "memory"
    used = world.capacity - min(world.memory["free"])
    unit, size = ("GiB", GIB) if used >= GIB else ("MiB", 2**20)
    lines = [[name, *_spread(world.memory[key], 1 / size)] for key, name in MEMORY.items()]
    return aligned([f"{unit} of {what} per rank, of {_number(world.capacity / size)}", "min", "median", "max"], lines)


def _times_text(world: World, hardware: Hardware) -> str:
    head = ["ms per step and rank, tables only", "min", "median", "max", f"slowest, rank {world.slowest}"]
    lines = [[name, *_spread(world.times[k]), _number(world.times[k][world.slowest])] for k, name in TIMES.items()]
    lines.append(["all", *_spread(world.totals), _number(world.step_ms)])
    extra = f"distributing the ids takes {_number(world.input_ms)} ms more, which TorchRec leaves out"
    extra += ": the pipeline overlaps it" if hardware.device == "cuda" else ""
    return f"predicted by {UNVALIDATED}:\n{aligned(head, lines)}\n{extra}\nbottleneck: {world.bottleneck()}"


def _worlds_text(worlds: list[World]) -> str:
    head = ["world size", "nodes", "rows/rank", "fits", "GiB for tables, fullest rank", "of", "ms/step", "communication", "bottleneck"]
    lines = []
    for w in sorted(worlds, key=lambda w: w.world_size):
        row = [str(w.world_size), str(w.nodes), f"{w.rows_per_rank:,}", "yes" if w.fits else "no"]
        if w.fits:
            row += [_number(_held(w) / GIB), _number(w.available / GIB), _number(w.step_ms), f"{w.communication:.0%}"]
            row.append(w.bottleneck().split(",")[0])
        else:
            row += ["-", _number(w.available / GIB), "-", "-", "-"]
        lines.append(row)
    table = aligned(head, lines, words=(3, 8))
    why = [f"{w.world_size} rank(s): {w.misfit[0]}" for w in worlds if not w.fits]
    return "\n".join([f"world sizes asked for ({UNVALIDATED}; tables only)", table, *why])


def _world_json(w: World) -> dict[str, Any]:
    out: dict[str, Any] = {"world_size": w.world_size, "nodes": w.nodes, "rows_per_rank": w.rows_per_rank, **_summary_json(w)}
    if w.fits:
        out["plan"] = plan_json(w.planned, w.world_size)
        out["memory_bytes"] = {k: _spread_json(v) for k, v in w.memory.items()}
        out["time_ms"] = {k: {**_spread_json(v), "slowest": v[w.slowest]} for k, v in w.times.items()}
        out["input_distribution_ms"] = w.input_ms
    return out


def _summary_json(w: World) -> dict[str, Any]:
    out: dict[str, Any] = {"fits": w.fits, "capacity_bytes": w.capacity, "available_bytes": w.available, "misfit": w.misfit}
    if w.fits:
        out |= {"tables_bytes_max": _held(w), "host_bytes_max": max(w.host), "step_ms": w.step_ms, "communication_share": w.communication}
        out |= {"slowest_rank": w.slowest, "bottleneck": w.bottleneck()}
    return out


def _held(world: World) -> float:
    """Bytes of tables, their state and their buffers on the fullest rank."""
    return max(map(sum, zip(*(world.memory[k] for k in ("weights", "optimizer", "buffers")), strict=True)))


def _spread(values: list[float], factor: float = 1.0) -> list[str]:
    return [_number(v * factor) for v in _spread_json(values).values()]


def _spread_json(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _and(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
