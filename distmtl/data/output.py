"""What `synth`, `prepare` and `init` leave behind: a folder of Parquet splits and ready configs, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distmtl.errors import DistmtlError

SPLITS = ("train", "validation", "test")  # of a log, and of a config's `data`
ROW_GROUP_ROWS = 16_384  # small enough to shuffle, to split over streams and to decode a step at a time


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well; if it raises, nothing is left.

    Raises:
        DistmtlError: `out` holds something already, or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise DistmtlError(f"output {out} is a file; choose a new folder")
    if out.exists() and any(out.iterdir()):
        raise DistmtlError(f"output {out} is not empty; choose a new folder, or delete this one first")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as e:
        raise DistmtlError(f"output {out} could not be written: {e.strerror or e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_split(folder: Path, split: str, table: pa.Table) -> None:
    """A table as <folder>/<split>/part-00000.parquet."""
    (folder / split).mkdir()
    pq.write_table(table, folder / split / "part-00000.parquet", row_group_size=ROW_GROUP_ROWS)


def write_configs(folder: Path, prefix: str, about: str, config: dict[str, Any], heads: dict[str, dict[str, Any]]) -> None:
    """<head>.yaml for every head: `config` with that head's settings merged in, under a comment that says what it is."""
    for head, settings in heads.items():
        whole = {"name": f"{prefix}-{head}", **_merged(config, settings)}
        lines = "".join(f"# {line}\n" for line in about.strip().splitlines())
        text = yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, allow_unicode=True, width=140)
        (folder / f"{head}.yaml").write_text(f"{lines}#   distmtl train {head}.yaml\n\n{text}")


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(a[k], b[k]) for k in a.keys() & b.keys() if isinstance(a[k], dict) and isinstance(b[k], dict)}
    return {**a, **b, **both}
