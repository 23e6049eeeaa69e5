"""Bytes and messages that a training step sends per rank, counted, beside a formula and the planner; and what that means on GPUs.

    .venv/bin/python -m benchmarks.traffic data/wide/mmoe.yaml [--rows 512] [--out benchmarks/results]
    .venv/bin/python -m benchmarks.traffic configs/planning/ranking_1e12.yaml --project 64,128,512,1024 [--shrink 16] [--rows 2048]

The first runs 1 to 8 ranks here, however few the cores: speed means nothing. Counted are the tensors given to torch.distributed, as rings
would send them, and what the kernel sent on each process's TCP sockets. The second is a PROJECTION: plan, formula and constants below,
nothing measured; --shrink divides the rows of all tables, --rows fixes the rows per GPU.

Bytes per rank and step; W ranks, B rows each, D numbers per vector, P dense parameters, T tasks; S ranks hold a table: 1, W, or a node's:
ids             8 each, · (W-1)/W
lengths         4·B per feature, to every other rank of the S
vectors         all-to-all: each of the S sends (W/S-1)·B·D·4, every other rank B·D·4 of gradient back; and among the S a reduce-scatter,
                back an all-gather: (S-1)·W/S·B·D·4 each
all-reduce      2·(W-1)/W · (4·P + 8·(3·T+1)): gradients of the dense network, the loss's sums
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from distmtl.config import Config
from distmtl.config_file import load_config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group, quieten
from distmtl.distributed.ranks import run_ranks
from distmtl.loop import Training
from distmtl.planning.hardware import BYTES_PER_MS, Hardware
from distmtl.planning.world import dense_parameters, offline_model, plan_world
from distmtl.progress import Progress

STEPS = 4
PLANS = {"the planner's": "", "row-wise": "row_wise", "table-row-wise, 2 nodes": "table_row_wise"}
CALLS = ("all_to_all_single", "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "broadcast")
# ASSUMED of a DGX H100, data sheet × share thought reached: bf16 FLOP/s, random bytes/s, bytes/s of each link one way; s per call, message
FLOPS, HBM, NVLINK, NIC, CALL, PEER = 989e12 * 0.3, 3.35e12 * 0.5, 450e9 * 0.8, 50e9 * 0.8, 20e-6, 1e-6


def formula(config: Config, plan: list[Any], ids: Sequence[float], world: int, rows: int) -> dict[str, np.ndarray]:
    """Bytes that every rank sends. `ids`: per row, of every feature. `scatter`, `node`: a reduce-scatter over W or S < W."""
    out = {part: np.zeros(world) for part in ("ids", "lengths", "vectors", "gradients", "scatter", "node", "all_reduce")}
    ranks = {t.table: [rank for rank, *_ in t.shards] for t in plan}
    for f, number in zip(config.embedded, ids, strict=True):
        own, size, vector = np.bincount(ranks[f.table_name], minlength=world), len(ranks[f.table_name]), 4.0 * rows * f.dim
        out["ids"] += 8 * rows * number * (1 - own / size)
        out["lengths"] += 4 * rows * (size - own)
        out["vectors"] += own * (world // size - 1) * vector
        out["gradients"] += (1 - own) * vector
        out["scatter" if size == world else "node"] += own * (size - 1) * (world // size) * vector
    out["all_reduce"] += 2 * (world - 1) / world * (4 * dense_parameters(offline_model(config, "cpu")) + 8 * (3 * len(config.tasks) + 1))
    return out


def count(sent: Counter[str], calls: Counter[str], name: str, original: Any, *args: Any, **named: Any) -> Any:
    """In place of a function of torch.distributed: adds its bytes and itself up."""
    world, rank = (f(named.get("group")) for f in (dist.get_world_size, dist.get_rank))
    kind = part = name.removesuffix("_single").removesuffix("_tensor").removesuffix("_into")
    given = args[0] if kind in ("all_reduce", "broadcast") else named["input"] if "input" in named else args[1]
    share = {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world}.get(kind, world - 1)
    if kind == "all_to_all":
        splits = named.get("input_split_sizes") or [1] * world
        share = 1 - splits[rank] / max(sum(splits), 1)
        part = "vectors" if given.is_floating_point() else "ids" if given.dtype == torch.int64 else "lengths"
    sent[part] += given.nbytes * share
    calls[kind] += 1
    return original(*args, **named)


def socket_bytes() -> int:
    """What the kernel has sent on this process's TCP sockets so far (tcpi_bytes_sent)."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(fd))) as s:
            total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
    return total


def on_rank(config: Config) -> tuple[Any, ...]:
    sent, calls = Counter[str](), Counter[str]()
    with process_group(config) as process:
        t = Training(config, process, open_splits(config, checked=True), Progress(None, False, print))
        batches = list(t.reader.batches(0, STEPS + 1))
        t.pipeline.progress(queue := iter(batches))
        before = socket_bytes()
        counted: Any = {name: partial(count, sent, calls, name, getattr(dist, name)) for name in CALLS}
        with patch.multiple(dist, **counted):
            for _ in range(STEPS):
                t.pipeline.progress(queue)
        lengths = [b.sparse.lengths().view(len(config.embedded), -1).double().mean(1).numpy() for b in batches[1:]]
        return sent, calls, socket_bytes() - before, lengths, t.planned


def measure(path: str, name: str, world: int, rows: int) -> dict[str, Any]:
    local = world // 2 if "nodes" in name else world
    overrides = [f"sharding.types=[{PLANS[name]}]", "sharding.row_wise_above_mb=0"] if PLANS[name] else []
    config = load_config(path, [f"train.global_batch_size={rows * world}", *overrides])
    sent, calls, sockets, ids, plans = zip(*run_ranks(on_rank, world, config, local_world_size=local, timeout_s=300), strict=True)
    e = {part: float(b.mean()) for part, b in formula(config, plans[0], np.mean(ids, (0, 1)).tolist(), world, rows).items()}
    e["vectors"], forward = e["vectors"] + e.pop("gradients"), e["vectors"] + e["scatter"] + e["node"]
    e["reduce_scatter"] = e["all_gather"] = e.pop("scatter") + e.pop("node")
    counted = {part: float(np.mean([s[part] for s in sent])) / STEPS for part in e}
    planner = float(np.mean(plan_world(config, Hardware.of("cpu", ranks_per_node=local), world).times["fwd_comms"])) * BYTES_PER_MS
    out = {"plan": name, "ranks": world, "calls": ", ".join(f"{k} {n // STEPS}" for k, n in calls[0].items())}
    out |= {f"{part}: kB, of formula": (b, e[part]) for part, b in counted.items() if e[part]}
    totals = {"sockets: kB, of counted": (float(np.mean(sockets)) / STEPS, sum(counted.values()))}
    return out | (totals | {"planner's forward: kB, of formula": (planner, forward)} if world > 1 else {})


def project(config: Config, world: int) -> dict[str, Any]:
    """PROJECTION of a step under the plan that training would make, on the slowest rank."""
    plan, local = plan_world(config, Hardware.of("cuda"), world), min(8, world)
    rows, out = plan.rows_per_rank, dict[str, Any]({"PROJECTION, not measured: GPUs": world, "rows per GPU": plan.rows_per_rank})
    if not plan.fits:
        return out | {"plan": "does not fit"}
    kinds, away = Counter(t.kind for t in plan.planned), (world - local) / max(world - 1, 1)  # share of an all-to-all that leaves the node
    sent = {part: float(b.max()) for part, b in formula(config, plan.planned, [1.0] * len(config.embedded), world, rows).items()}
    sums, spread = sent["scatter"] + sent["node"], sent["ids"] + sent["lengths"] + 2 * max(sent["vectors"], sent["gradients"])
    vectors, gradients = (max(b / NVLINK, away and b / local / NIC) for b in (2 * sent["scatter"], sent["all_reduce"]))  # rings: all NICs
    ms = {
        "matrices": 6e3 * dense_parameters(offline_model(config, "cpu")) * rows / FLOPS,
        "tables": 1e3 * (16 * rows * sum(f.dim for f in config.embedded) + 2 * sums) / HBM,  # rows: 2 reads, 2 writes; partial sums
        "exchange": 1e3 * (max(spread * (1 - away) / NVLINK, spread * away / NIC) + vectors + 2 * sent["node"] / NVLINK),
        "all-reduce": 1e3 * gradients,
        "latency": 1e3 * (3 + 4 * len(kinds)) * (CALL + PEER * (world - 1)),  # splits, 2 all-reduces; of a kind: lengths, ids, there, back
    }
    out |= {"plan": ", ".join(f"{n} {k}" for k, n in kinds.items()), "MB sent, at most": round((sum(sent.values()) + sums) / 1e6)}
    for overlap, step in (("nothing", sum(ms.values())), ("all", max(ms.values()))):
        ms |= {f"step if {overlap} overlaps": step}
        out |= {f"M samples/s if {overlap} overlaps": round(rows * world / step / 1e3, 1)}
    return out | {f"{k}, ms": round(v, 3) for k, v in ms.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("--rows", type=int)
    p.add_argument("--project", type=lambda text: [int(w) for w in text.split(",")], default=[])
    p.add_argument("--shrink", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    torch.set_num_threads(1)
    quieten()
    table = [measure(a.config, n, w, a.rows or 512) for n in PLANS for w in (1, 2, 4, 8) if not a.project and (w > 2 or "nodes" not in n)]
    for w in a.project:
        config = load_config(a.config, [f"train.global_batch_size={a.rows * w}"] if a.rows else [])
        features = [f.model_copy(update={"rows": -(-f.rows // a.shrink)}) if hasattr(f, "rows") else f for f in config.features]
        table.append(project(config.model_copy(update={"features": tuple(features)}), w))
    head = list(dict.fromkeys(k for row in table for k in row))
    texts = [[f"{c[0] / 1e3:,.1f}, {c[0] / c[1]:.3f}" if isinstance(c, tuple) else str(c or "") for c in map(r.get, head)] for r in table]
    text = "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---:"] * len(head), *texts])
    for end, content in (("json", json.dumps(table, indent=1, ensure_ascii=False) + "\n"), ("md", text)):
        (a.out / f"{'projection' if a.project else 'traffic'}.{end}").write_text(content)
    print(text)


if __name__ == "__main__":
    main()
