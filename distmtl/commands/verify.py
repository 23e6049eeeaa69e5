"""`distmtl verify`."""

from __future__ import annotations

import argparse

from distmtl.commands.arguments import config_arguments
from distmtl.errors import DistmtlError

HELP = "Prove on a few steps that sharded = unsharded, 1 = N workers and resumed = uninterrupted."
EXAMPLE = "distmtl verify configs/synthetic.yaml --workers 2"


def add(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument("--workers", type=int, default=2, metavar="N", help="ranks compared with one (default: %(default)s)")


def run(a: argparse.Namespace) -> int:
    from distmtl.config_file import load_config
    from distmtl.verification.gate import verify

    if a.workers < 1:
        raise DistmtlError(f"--workers {a.workers}: compare with at least 1")
    failed = [c for c in verify(load_config(a.config, a.overrides), a.workers) if not c.passed]
    print(f"{len(failed)} check(s) failed" if failed else "all checks passed")
    return len(failed) > 0
