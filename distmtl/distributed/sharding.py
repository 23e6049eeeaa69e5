"""Tables → sharding plan → DistributedModelParallel, with initial weights that do not depend on the plan."""

from __future__ import annotations

import os
import statistics
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Proposer, ShardingOption
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from distmtl.config import SEQUENCE_SHARDING, AdagradTable, AdamTable, Config, RowWiseAdagradTable, SgdTable
from distmtl.distributed.process import Process
from distmtl.errors import DistmtlError

INIT_ROWS = 65_536  # rows initialised from one seed
GLOO_BANDWIDTH = 2**30 / 1000  # bytes per ms that a rank sends on CPU, over loopback; with NVLink's, TorchRec's default, all is cut in rows
UNCHECKED = {"bounds_check_mode": BoundsCheckMode.NONE}  # the reader lets no id out of its table pass; FBGEMM would set it to 0
SEARCH = 150_000  # shards that one proposer may weigh, at 20 to 50 µs each


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder of bags, with the types that it leaves out on CPU although they are right there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [*types, *(t for t in ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard") if t not in types)]


def sharders(fused: dict[str, Any] | None = None, codecs: dict[str, Any] | None = None) -> list[ModuleSharder[Any]]:
    """Of everything that is planned and sharded: bags and sequences."""
    return [kind(dict(fused or {}), codecs) for kind in (BagSharder, EmbeddingCollectionSharder)]


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


def codecs(config: Config, process: Process) -> dict[str, Any] | None:
    """How pooled vectors and their gradients are packed for the way to another rank."""
    if process.world_size == 1 or config.sharding.exchange == "fp32":
        return None
    bf16 = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
    return get_qcomm_codecs_registry(bf16, device=torch.device("cuda"))  # which on "cpu" would make it float16, too narrow for gradients


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
                beta1, beta2 = optimizer.betas
                kind, arguments = torchrec.optim.Adam, {"lr": optimizer.lr, "beta1": beta1, "beta2": beta2, "eps": optimizer.eps}
        apply_optimizer_in_backward(kind, [parameter], arguments)


def table_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Table name, weight, for every table of an unsharded model."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            yield from ((name, table.weight) for name, table in module.embedding_bags.items())
        elif isinstance(module, EmbeddingCollection):
            yield from ((name, table.weight) for name, table in module.embeddings.items())


def constraints(config: Config, local_world_size: int, world_size: int) -> dict[str, ParameterConstraints]:
    """What the planner may do with every table; always explicit, since data_parallel would drop the table's optimizer."""
    out = {}
    readers: dict[str, list[float]] = {}  # lookups per row of every feature
    for feature in config.embedded:
        readers.setdefault(feature.table_name, []).append(float(feature.lookups))
    for feature in config.embedded:
        name = feature.table_name
        own = config.tables[name].sharding if name in config.tables else None
        types = own or config.sharding.types
        rows, dim = config.tables_read[name]
        mb = rows * dim * 4 / 2**20
        if own is None and mb < config.sharding.row_wise_above_mb:
            types = tuple(t for t in types if t == "table_wise") or types
        if own is None and config.table_optimizer(name).kind == "rowwise_adagrad":
            types = tuple(t for t in types if t not in ("column_wise", "grid_shard"))
        if world_size == 1 and own is None:
            types = tuple(t for t in types if t == "table_wise") or types  # the others cut into one piece, and pay for the cutting
        elif world_size == local_world_size and own is None:
            types = tuple(t for t in types if t not in ("table_row_wise", "grid_shard")) or ("table_wise",)
        if name in config.sequence_tables:
            types = tuple(t for t in types if t in SEQUENCE_SHARDING) or ("table_wise",)
        out[name] = ParameterConstraints(
            sharding_types=list(types),
            compute_kernels=["fused"],
            min_partition=min(dim, 32),
            pooling_factors=readers[name],
        )
    return out


class Enumerator(EmbeddingEnumerator):
    """TorchRec's, in an order that does not depend on the process's hash seed: equally good plans are decided by order."""

    def enumerate(self, module: nn.Module, sharders: list[Any]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        order = {fqn: i for i, fqn in enumerate(dict.fromkeys(o.fqn for o in options))}
        return sorted(options, key=lambda o: (order[o.fqn], o.sharding_type))


class BisectingProposer(Proposer):
    """TorchRec's greedy search by bisection, for many tables on many ranks.

    Every table starts with the option of least work over all ranks; then, largest shard first, tables step on to their next
    one, until all fits and some way beyond, for balance. TorchRec proposes every single step and pays for tables × ranks each
    time: minutes for 300 tables on 128 ranks.

    Args:
        proposals: at most so many (the bisection itself needs about ten); 1: the options of the smallest shards and no other.
    """

    def __init__(self, proposals: int):
        self.proposals = proposals

    def load(self, search_space: list[ShardingOption], enumerator: Any = None) -> None:
        tables: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            tables.setdefault(option.fqn, []).append(option)
        for options in tables.values():
            options.sort(key=lambda o: sum(s.perf.total for s in o.shards))
        steps = [(-_largest_shard(o), i, fqn) for fqn, options in tables.items() for i, o in enumerate(options[:-1])]
        self.tables, self.steps, self.made = tables, [fqn for *_, fqn in sorted(steps)], 0
        self.smallest = len(steps) + 1
        self.search = self._search()
        self.at: int | None = next(self.search)

    def _search(self) -> Generator[int, bool, None]:
        """Yields the number of steps to go, is sent whether the plan fitted."""
        low, high, at = (0 if self.proposals > 1 else self.smallest), self.smallest, 0
        while low < high:
            if (yield at):
                high = at
            else:
                low = at + 1
            at = (low + high) // 2
        if high == self.smallest:
            yield high
        ahead = 1
        while high + ahead < self.smallest:
            yield high + ahead
            ahead *= 2

    def propose(self) -> list[ShardingOption] | None:
        if self.at is None:
            return None
        if self.at == self.smallest:
            return [min(options, key=_largest_shard) for options in self.tables.values()]
        gone = Counter(self.steps[: self.at])
        return [options[gone[fqn]] for fqn, options in self.tables.items()]

    def feedback(self, partitionable: bool, plan: Any = None, perf_rating: float | None = None, storage_constraint: Any = None) -> None:
        self.made += 1
        try:
            self.at = self.search.send(partitionable) if self.made < self.proposals else None
        except StopIteration:
            self.at = None


def _largest_shard(option: ShardingOption) -> int:
    return max(s.storage.hbm + s.storage.ddr for s in option.shards)


def make_planner(
    config: Config, topology: Topology, allowed: dict[str, ParameterConstraints], **arguments: Any
) -> EmbeddingShardingPlanner:
    """The planner that training and `distmtl plan` share: TorchRec's own search where it ends in seconds, else a coarser one."""
    batch_size = max(config.train.global_batch_size // topology.world_size, 1)
    shards, options = max(len(allowed), 1) * topology.world_size, sum(len(c.sharding_types) for c in allowed.values())
    proposers: list[Proposer]
    if shards * (options - len(allowed) + 1) <= SEARCH:
        proposers = [
            GridSearchProposer(max_proposals=SEARCH // shards),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
            BisectingProposer(1),
        ]
    else:
        proposers = [BisectingProposer(max(SEARCH // shards, 14))]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=Enumerator(topology=topology, batch_size=batch_size, constraints=allowed),
        constraints=allowed,
        **{"proposer": proposers, "stats": [], **arguments},
    )


def make_plan(model: nn.Module, config: Config, process: Process) -> ShardingPlan:
    """Rank 0's planner decides for all.

    Raises:
        DistmtlError: the tables do not fit, or no allowed sharding type is possible.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    memory = torch.cuda.get_device_properties(process.device).total_memory if process.device.type == "cuda" else None
    bandwidths = {"intra_host_bw": GLOO_BANDWIDTH, "inter_host_bw": GLOO_BANDWIDTH} if process.device.type == "cpu" else {}
    topology = Topology(process.world_size, process.device.type, hbm_cap=memory, local_world_size=local, **bandwidths)
    planner = make_planner(config, topology, constraints(config, local, process.world_size))
    try:
        return planner.collective_plan(model, sharders(), dist.group.WORLD)
    except PlannerError as e:
        raise DistmtlError(f"no sharding plan for {process.world_size} worker(s): {e}") from None


def shard(model: nn.Module, config: Config, process: Process) -> tuple[DistributedModelParallel, list[PlannedTable]]:
    """Spread the tables of `model` over the ranks. Dense parameters stay whole on each; Optimizers sums their gradients, and TorchRec
    those of the tables, of which it would take the mean."""
    set_gradient_division(False)
    attach_table_optimizers(model, config, process.device)
    plan = make_plan(model, config, process)
    planned = list(describe(plan, config))
    with undrawn_tables():
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=process.device,
            plan=plan,
            sharders=sharders(UNCHECKED, codecs(config, process)),
            init_data_parallel=False,
        )
    missing = {t.table for t in planned if any(rank == process.rank for rank, *_ in t.shards)} - {
        key.rsplit(".", 2)[1] for key in sharded.fused_optimizer.params
    }
    assert not missing, f"tables without their own optimizer: {missing}"
    initialise_tables(sharded, config)
    return sharded, planned


@contextmanager
def undrawn_tables() -> Iterator[None]:
    """TorchRec draws every table as it makes it, in as much time as `initialise_tables` takes to draw it anew."""
    kernels = (BaseBatchedEmbeddingBag, BaseBatchedEmbedding)
    draw = [kernel.init_parameters for kernel in kernels]
    for kernel in kernels:
        kernel.init_parameters = lambda self: None
    try:
        yield
    finally:
        for kernel, own in zip(kernels, draw, strict=True):
            kernel.init_parameters = own


def step_counters(sharded: nn.Module) -> list[Tensor]:
    """By which FBGEMM's `adam` corrects its bias, one per group of tables on this rank. They are in no state dict, and evaluation moves
    them too."""
    lookups = [lookup for module in sharded.modules() for lookup in getattr(module, "_lookups", ())]
    groups = [m for lookup in lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
    return [group.iter_cpu for group in groups if group.optimizer == EmbOptimType.ADAM]


def describe(plan: ShardingPlan, config: Config) -> Iterator[PlannedTable]:
    shapes = config.tables_read
    for module in plan.plan.values():
        for name, parameter in module.items():
            rows, dim = shapes[name]
            shards = tuple((s.placement.rank(), *s.shard_sizes) for s in parameter.sharding_spec.shards)
            mb = (4 * rows * dim + optimizer_bytes(config, name, rows, dim)) / 2**20
            yield PlannedTable(name, rows, dim, parameter.sharding_type, config.table_optimizer(name).kind, shards, round(mb, 6))


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
        lines.append([t.table, f"{t.rows:,}", str(t.dim), t.kind, t.optimizer, f"{t.mb:,.2f}", *spread(share)])
    lines.append(["all", "", "", "", "", f"{sum(held):,.2f}", *spread(held)])
    return aligned(head, lines, words=(0, 3, 4))


def aligned(head: list[str], lines: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """Lines of text aligned under `head`: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]

    def render(row: list[str]) -> str:
        return "  ".join(c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join(map(render, [head, *lines]))


def plan_json(planned: list[PlannedTable], world_size: int) -> dict[str, Any]:
    return {"world_size": world_size, "tables": [asdict(t) for t in planned]}


def dense_parameters(model: nn.Module, planned: list[PlannedTable]) -> dict[str, nn.Parameter]:
    """Everything that no sharded table holds."""
    tables = tuple(f".{kind}.{t.table}.weight" for t in planned for kind in ("embedding_bags", "embeddings"))
    return {name: p for name, p in model.named_parameters() if not name.endswith(tables)}


def local_shards(state: dict[str, Any]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, tensor and offsets of every shard of the sharded tensors in a state dict that lies on this rank."""
    for name, value in state.items():
        if hasattr(value, "local_shards"):
            for s in value.local_shards():
                yield name, s.tensor, tuple(s.metadata.shard_offsets)


def initialise_tables(sharded: DistributedModelParallel, config: Config) -> None:
    """Uniform in ±init_scale, drawn by (seed, table, block of rows): the same table whatever the plan."""
    dims = {table: dim for table, (_, dim) in config.tables_read.items()}
    with torch.no_grad():
        for key, tensor, (row, column) in local_shards(sharded.state_dict()):
            table = key.split(".")[-2]
            for block in range(row // INIT_ROWS, (row + tensor.shape[0] - 1) // INIT_ROWS + 1 if tensor.shape[0] else 0):
                first, last = max(row, block * INIT_ROWS), min(row + tensor.shape[0], (block + 1) * INIT_ROWS)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{config.run.seed}/{table}/{block}".encode()))
                target, whole = tensor[first - row : last - row], tensor.shape[1] == dims[table] and first == block * INIT_ROWS
                drawn = target if whole and target.device.type == "cpu" else torch.empty(last - block * INIT_ROWS, dims[table])
                drawn.uniform_(-config.init_scale(table), config.init_scale(table), generator=generator)
                if drawn is not target:
                    target.copy_(drawn[first - block * INIT_ROWS :, column : column + tensor.shape[1]])
