"""make_report(): everything that `distmtl plan` says."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from distmtl.config import Config
from distmtl.distributed.plan import plan_json, plan_text
from distmtl.distributed.process import quieten
from distmtl.errors import DistmtlError
from distmtl.planning.hardware import GIB, Hardware
from distmtl.planning.measured import Measured, measure
from distmtl.planning.numbers import gib, number
from distmtl.planning.search import HostMemory, host_memory, smallest_world
from distmtl.planning.world import LISTED, MEMORY, TIMES, World, dense_parameters, offline_model, plan_world
from distmtl.tabulate import aligned

UNVALIDATED = "TorchRec's model, not validated on hardware"


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
            f"not in that time: the dense network (about {number(flop)} GFLOP per rank, if every weight meets every row), "
            f"the all-reduce of its gradients ({number(4 * self.dense / 2**20)} MB), reading data"
        )

    def _host_text(self) -> str:
        head = ["kernel", "cache", "tables moved", "GiB HBM", "GiB host", "ms/step", "fits"]
        lines = []
        for h in self.host:
            w = h.world
            row = [h.kernel, f"{h.load_factor:g}" if h.load_factor else "-", str(len(h.tables))]
            if w.fits:
                row += [number(held(w) / GIB), number(max(w.host) / GIB), number(w.step_ms), "yes"]
            else:
                row += ["-", f"≥ {number(h.bytes / w.world_size / GIB)}", "-", "no"]
            lines.append(row)
        names = max((h.tables for h in self.host), key=len)
        some = ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
        return (
            f"with the largest tables in host memory ({self.hardware.ddr_gb:g} GiB per rank), most on one rank, {UNVALIDATED}:\n"
            + aligned(head, lines, left=(0,))
            + f"\nmoved, largest first: {some}. Ask for it with tables.NAME.memory: host is fused_uvm, "
            "cached is fused_uvm_caching with tables.NAME.cache"
        )

    def _smallest_text(self) -> str:
        if isinstance(self.smallest, str):
            return self.smallest
        s = self.smallest
        return f"{s.world_size} ({s.nodes} node(s)); its fullest rank gives {gib(held(s))} of {gib(s.available)} to tables"

    def _measured_text(self, m: Measured) -> str:
        return (
            f"measured here: 1 worker on this CPU, median of {m.steps} steps of {m.rows:,} rows\n"
            f"  tables alone (lookup, backward, update): {number(m.tables_ms)} ms; TorchRec's model: {number(m.predicted_ms)} ms; "
            f"measured / predicted = {number(m.ratio or 0)}\n"
            f"  the whole training step, which nothing predicts: {number(m.step_ms)} ms\n"
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
    return aligned([f"{unit} of {what} per rank, of {number(world.capacity / size)}", "min", "median", "max"], lines, left=(0,))


def _times_text(world: World, hardware: Hardware) -> str:
    head = ["ms per step and rank, tables only", "min", "median", "max", f"slowest, rank {world.slowest}"]
    lines = [[name, *_spread(world.times[k]), number(world.times[k][world.slowest])] for k, name in TIMES.items()]
    lines.append(["all", *_spread(world.totals), number(world.step_ms)])
    extra = f"distributing the ids takes {number(world.input_ms)} ms more, which TorchRec leaves out"
    extra += ": the pipeline overlaps it" if hardware.device == "cuda" else ""
    return f"predicted by {UNVALIDATED}:\n{aligned(head, lines, left=(0,))}\n{extra}\nbottleneck: {world.bottleneck()}"


def _worlds_text(worlds: list[World]) -> str:
    head = ["world size", "nodes", "rows/rank", "fits", "GiB for tables, fullest rank", "of", "ms/step", "communication", "bottleneck"]
    lines = []
    for w in sorted(worlds, key=lambda w: w.world_size):
        row = [str(w.world_size), str(w.nodes), f"{w.rows_per_rank:,}", "yes" if w.fits else "no"]
        if w.fits:
            row += [number(held(w) / GIB), number(w.available / GIB), number(w.step_ms), f"{w.communication:.0%}"]
            row.append(w.bottleneck().split(",")[0])
        else:
            row += ["-", number(w.available / GIB), "-", "-", "-"]
        lines.append(row)
    table = aligned(head, lines, left=(3, 8))
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
        out |= {"tables_bytes_max": held(w), "host_bytes_max": max(w.host), "step_ms": w.step_ms, "communication_share": w.communication}
        out |= {"slowest_rank": w.slowest, "bottleneck": w.bottleneck()}
    return out


def held(world: World) -> float:
    """Bytes of tables, their state and their buffers on the fullest rank."""
    return max(map(sum, zip(*(world.memory[k] for k in ("weights", "optimizer", "buffers")), strict=True)))


def _spread(values: list[float], factor: float = 1.0) -> list[str]:
    return [number(v * factor) for v in _spread_json(values).values()]


def _spread_json(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _and(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
