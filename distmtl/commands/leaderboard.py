"""`distmtl leaderboard`."""

from __future__ import annotations

import argparse
import signal

from distmtl.commands.arguments import config_arguments

HELP = "Train heads × weightings × seeds, several at a time, and rank them. The same command continues."
EXAMPLE = "distmtl leaderboard configs/leaderboards/synthetic.yaml seeds=2"


def add(p: argparse.ArgumentParser) -> None:
    config_arguments(p)


def run(a: argparse.Namespace) -> int:
    from distmtl.cluster.leaderboard import run_leaderboard
    from distmtl.leaderboard import load_leaderboard

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs' processes too; each has its last checkpoint
    table = run_leaderboard(load_leaderboard(a.config, a.overrides), say=lambda text: print(text, flush=True))
    print(f"\n{table.text()}")
    return 0 if all(table.chosen(data) for data in table.rows) else 1
