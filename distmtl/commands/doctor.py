"""`distmtl doctor`."""

from __future__ import annotations

import argparse

HELP = "Say what would go wrong on this machine."
EXAMPLE = "distmtl doctor"


def add(p: argparse.ArgumentParser) -> None:
    """It has none."""


def run(a: argparse.Namespace) -> int:
    from distmtl.doctor import run_doctor

    return run_doctor()
