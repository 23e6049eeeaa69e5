"""`distmtl synth`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distmtl.errors import DistmtlError

HELP = "Write a synthetic click log whose best reachable metrics are known."
EXAMPLE = "distmtl synth --out data/synthetic --rows 600000"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the log and its configs")
    p.add_argument("--rows", type=int, default=600_000, help="rows of all splits together (default: %(default)s)")
    p.add_argument("--wide", action="store_true", help="24 id features, 2 bags and 8 numbers over tables of up to 2,000,000 rows, instead")
    p.add_argument(
        "--conflict", type=float, nargs="?", const=1.0, metavar="STRENGTH",
        help="three tasks that want opposed things of the same features, instead; 0 to 1 says how opposed (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--drift", type=float, nargs="?", const=1.0, metavar="STRENGTH",
        help="sealed daily partitions whose truth changes from day to day, for --follow, instead; how fast (default: 1; 0: not at all)",
    )  # fmt: skip
    p.add_argument("--partitions", type=int, metavar="N", help="days of a --drift log (default: 14)")
    p.add_argument("--users", type=int, help="distinct users, up to 1e8 (default: 20000)")
    p.add_argument("--items", type=int, help="distinct items, up to 1e8 (default: 5000)")
    p.add_argument("--domains", type=int, help="domains that differ in their signal (default: 1)")
    p.add_argument("--confounding", type=float, help="strength of a hidden cause of both clicks and conversions (default: 0)")
    p.add_argument("--kept-negatives", type=float, help="share of the impressions without a click that the train split keeps (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")


def run(a: argparse.Namespace) -> None:
    from distmtl.data.conflict import ConflictWorld
    from distmtl.data.drift import DriftWorld, write_partitions
    from distmtl.data.synthetic import Source, World, write_log
    from distmtl.data.wide import WideWorld

    sizes = {
        name: getattr(a, name) for name in ("users", "items", "domains", "confounding", "kept_negatives") if getattr(a, name) is not None
    }
    kinds = [k for k, asked in (("wide", a.wide), ("conflict", a.conflict is not None), ("drift", a.drift is not None)) if asked]
    if a.partitions is not None and kinds[:1] != ["drift"]:
        raise DistmtlError("--partitions says how many days a --drift log has; leave it out")
    if kinds and (others := [*kinds[1:], *sizes]):
        raise DistmtlError(f"--{others[0].replace('_', '-')} says nothing about a --{kinds[0]} log; leave one of them out")
    if a.drift is not None:
        rows = write_partitions(a.out, DriftWorld(a.seed, a.drift), partitions=14 if a.partitions is None else a.partitions, rows=a.rows)
        print(f"wrote {rows:,} rows to {a.out}; next: distmtl train {a.out}/mmoe.yaml --follow {a.out} --idle-timeout 5")
        return
    world: Source
    if a.conflict is not None:
        world = ConflictWorld(a.seed, a.conflict)
    else:
        world = WideWorld(a.seed) if a.wide else World(a.seed, **sizes)
    rows = write_log(a.out, world, rows=a.rows)
    print(f"wrote {rows:,} rows to {a.out}; next: distmtl train {a.out}/mmoe.yaml --workers 2")
