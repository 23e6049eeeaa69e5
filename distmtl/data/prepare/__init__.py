"""Public data sets: raw files, as their publishers give them, to Parquet splits and ready configs.

prepare("census-income", Path("raw"), Path("data/census"), protocol="P1")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmtl.data.output import new_folder
from distmtl.data.prepare import census_income, movielens
from distmtl.errors import DistmtlError

# name → write(source, folder, **options), with a docstring that says what to download
DATA_SETS: dict[str, Callable[..., None]] = {"census-income": census_income.write, "movielens-1m": movielens.write}


def prepare(name: str, source: Path, out: Path, /, **options: Any) -> None:
    """Write `name` from the raw files in `source` to `out`, whole or not at all.

    Raises:
        DistmtlError: unknown name or option; raw files missing, truncated or of another format; `out` not empty.
    """
    if name not in DATA_SETS:
        raise DistmtlError(f"no data set {name!r}; there are {', '.join(DATA_SETS)}")
    known = [p for p in inspect.signature(DATA_SETS[name]).parameters if p not in ("source", "folder")]
    if unknown := [o for o in options if o not in known]:
        raise DistmtlError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    source = Path(source)
    if not source.is_dir():
        raise DistmtlError(f"source {source}: no such folder; put the raw files of {name} there")
    with new_folder(out) as folder:
        DATA_SETS[name](source, folder, **options)
