"""`distmtl init`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distmtl.commands.arguments import names

HELP = "Guess a first config from a CSV or Parquet log, explain every line of it, and write splits to train on."
EXAMPLE = "distmtl init logs.csv --labels click,purchase --out data/logs"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("data", metavar="DATA", help="a file, a folder or a glob")
    p.add_argument("--labels", required=True, type=names, metavar="COLUMN[,…]", help="what is to be predicted")
    p.add_argument("--out", type=Path, metavar="DIR", help="new folder for config and splits (default: NAME-distmtl)")
    p.add_argument("--group", metavar="COLUMN", help="groups of GAUC (default: a column called like a user or a session)")
    p.add_argument(
        "--time", metavar="COLUMN", help="the last rows by it are held out (default: a column that is a time; without one, at random)"
    )
    p.add_argument("--weight", metavar="COLUMN", help="sample weights (default: none)")
    p.add_argument("--leave-out", type=names, default=[], metavar="COLUMN[,…]", help="columns to make nothing of")


def run(a: argparse.Namespace) -> None:
    from distmtl.data.init import Asked, init

    draft = init(a.data, Asked(a.labels, a.group, a.time, a.weight, a.leave_out), a.out)
    wide = [max(len(row[i]) for row in draft.columns) for i in range(3)]
    for row in draft.columns:
        print("  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], wide)), row[3]]))
    print("".join(f"note: {notice}\n" for notice in draft.notices), end="")
    print(
        f"wrote {draft.config} ({', '.join(f'{split} {n:,}' for split, n in draft.rows.items())} rows); next: distmtl train {draft.config}"
    )
