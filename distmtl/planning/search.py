"""What would fit: the smallest world, and tables in host memory."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams

from distmtl.config import Config
from distmtl.distributed.plan import KERNELS, optimizer_bytes
from distmtl.distributed.planner import BisectingProposer, constraints
from distmtl.planning.hardware import Hardware
from distmtl.planning.numbers import gib
from distmtl.planning.world import World, plan_world

SMALLEST_SHARDS = 100_000  # tables × ranks up to which the smallest world is looked for: beyond, one try takes half a minute
CACHES = (0.2, 0.05, None)  # load factors of FUSED_UVM_CACHING; None: FUSED_UVM, no cache


def smallest_world(config: Config, hardware: Hardware, tried: list[World]) -> World | str:
    """The fewest ranks (a power of two within a node, then whole nodes) that hold the tables, or why none was found."""
    node, tables = hardware.ranks_per_node, {t: 4 * rows * dim for t, (rows, dim) in config.tables_read.items()}
    for table, c in constraints(config, node, node + 1, hardware.device).items():
        needs = {hardware.memory: 1.0} if c.compute_kernels == [KERNELS["device"]] else {"ddr": 1.0}
        needs |= {"hbm": c.cache_params.load_factor} if c.cache_params else {}
        for memory, share in needs.items():
            if set(c.sharding_types) == {"table_wise"} and share * tables[table] > hardware.memory_in(hardware.topology(1), memory):
                return f"none: table {table!r} may only lie whole on one rank ({gib(share * tables[table])}); let it be row_wise"
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
    """For each cache size, the fewest of the largest tables whose move lets the plan exist; none are left to move where all are there."""
    size = {t: 4.0 * rows * dim + optimizer_bytes(config, t, rows, dim) for t, (rows, dim) in config.tables_read.items()}
    allowed = constraints(config, hardware.local_world_size(world.world_size), world.world_size, hardware.device)
    order = sorted((t for t in size if allowed[t].compute_kernels == [KERNELS["device"]]), key=lambda t: -size[t])
    if not order:
        return []
    cached = sum(size[t] * c.cache_params.load_factor for t, c in allowed.items() if c.cache_params)  # of those there already
    out = []
    for factor in CACHES:
        kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING if factor else EmbeddingComputeKernel.FUSED_UVM
        room = 0.95 * world.available * world.world_size - cached  # buffers and uneven shards want some
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
