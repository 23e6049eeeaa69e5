"""The planner: which plans training and `distmtl plan` consider, and how they look for the best."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, Proposer, ShardingOption
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan

from distmtl.config import SEQUENCE_SHARDING, Config, TableConfig
from distmtl.distributed.plan import KERNELS
from distmtl.distributed.process import Process
from distmtl.errors import DistmtlError
from distmtl.machine import usable_memory

GLOO_BANDWIDTH = 2**30 / 1000  # bytes per ms that a rank sends on CPU, over loopback; with NVLink's, TorchRec's default, all is cut in rows
CACHE = 0.2  # share of its rows that a cached table keeps on the device, unless it says otherwise; TorchRec's own default
SEARCH = 150_000  # shards that one proposer may weigh, at 20 to 50 µs each


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder of bags, with the types that it leaves out on CPU although they are right there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [*types, *(t for t in ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard") if t not in types)]


def sharders(fused: dict[str, Any] | None = None, codecs: dict[str, Any] | None = None) -> list[ModuleSharder[Any]]:
    """Of everything that is planned and sharded: bags and sequences."""
    return [kind(dict(fused or {}), codecs) for kind in (BagSharder, EmbeddingCollectionSharder)]


def constraints(config: Config, local_world_size: int, world_size: int, device: str) -> dict[str, ParameterConstraints]:
    """What the planner may do with every table; always explicit, since data_parallel would drop the table's optimizer."""
    out = {}
    readers: dict[str, list[float]] = {}  # lookups per row of every feature
    for feature in config.embedded:
        readers.setdefault(feature.table_name, []).append(float(feature.lookups))
    for feature in config.embedded:
        name = feature.table_name
        table = config.tables.get(name, TableConfig())
        own, memory = table.sharding, table.memory if device == "cuda" else "device"
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
            compute_kernels=[KERNELS[memory]],
            cache_params=CacheParams(load_factor=table.cache or CACHE) if memory == "cached" else None,
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
    own: dict[str, Any] = {"intra_host_bw": GLOO_BANDWIDTH, "inter_host_bw": GLOO_BANDWIDTH}
    if process.device.type == "cuda":
        hbm = torch.cuda.get_device_properties(process.device).total_memory
        own = {"hbm_cap": hbm, "ddr_cap": usable_memory() // local}
    topology = Topology(process.world_size, process.device.type, local_world_size=local, **own)
    allowed = constraints(config, local, process.world_size, process.device.type)
    planner = make_planner(config, topology, allowed)
    try:
        return planner.collective_plan(model, sharders(), dist.group.WORLD)
    except PlannerError as e:
        raise DistmtlError(f"no sharding plan for {process.world_size} worker(s): {_no_plan(e, allowed, process.device.type)}") from None


def _no_plan(error: PlannerError, allowed: dict[str, ParameterConstraints], device: str) -> str:
    """Why there is none, and what helps."""
    first, *more = str(error).strip().splitlines()
    if error.error_type is PlannerErrorType.INVALID_COMPUTE_KERNEL:  # the first line only counts them
        return f"{first} {', '.join(line.strip(' -') for line in more)}; choose another tables.NAME.memory or sharding"
    remedy = "`distmtl plan` tells which tables do not fit and how many workers would hold them"
    # Of shards that no single rank can hold TorchRec blames the constraints; only its partitioner's words tell.
    small = any(words in str(error) for words in ("Couldn't find a rank", "does not fit on any rank"))
    lacking = small or error.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    if device == "cuda" and lacking and any(c.compute_kernels == [KERNELS["device"]] for c in allowed.values()):
        remedy += "; or keep the largest tables in host memory (tables.NAME.memory: cached)"
    return f"{first.rstrip(' .')}; {remedy}"
