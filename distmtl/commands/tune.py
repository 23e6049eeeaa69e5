"""`distmtl tune`."""

from __future__ import annotations

import argparse
import signal

from distmtl.commands.arguments import config_arguments

HELP = "Search for a better config: heads, widths, learning rates, weightings. The same command continues."
EXAMPLE = "distmtl tune configs/tuning/synthetic.yaml trials=10"


def add(p: argparse.ArgumentParser) -> None:
    config_arguments(p)


def run(a: argparse.Namespace) -> int:
    from distmtl.cluster.tuning import run_tuning
    from distmtl.tuning import load_tuning

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trials' processes too; each has its last checkpoint
    search = run_tuning(load_tuning(a.config, a.overrides), say=lambda text: print(text, flush=True))
    print(f"\n{search.text()}")
    return 0 if search.best else 1
