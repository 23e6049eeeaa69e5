"""`distmtl prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distmtl.errors import DistmtlError

HELP = "Turn a public data set's raw files into Parquet and ready configs."
EXAMPLE = "distmtl prepare census-income --source ~/census --out data/census"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", help="census-income or movielens-1m")
    p.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder with the raw files")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options of the data set, such as protocol=P2 or fold=1")


def run(a: argparse.Namespace) -> None:
    from distmtl.data.prepare import prepare

    prepare(a.name, a.source, a.out, **dict(_option(o) for o in a.overrides))


def _option(text: str) -> tuple[str, str]:
    key, sep, value = text.partition("=")
    if not sep:
        raise DistmtlError(f"option {text!r} is not key=value")
    return key, value
