"""`distmtl health`."""

from __future__ import annotations

import argparse
import json

HELP = "Show how the tasks of a run get on with each other: λ, gradients, calibration, gates. Also while it runs."
EXAMPLE = "distmtl health runs/synthetic"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--json", action="store_true", help="print the series as JSON instead")


def run(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from distmtl.health_page import page, read_history

    history = read_history(a.run_dir)
    print(json.dumps(asdict(history)) if a.json else page(history))
