"""export(): a checkpoint → a folder that serving needs nothing else for; export_delta(): what has changed since another one.

No process group, no table in memory: rows go from the checkpoint's files to the export's in blocks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from distmtl import checkpoint
from distmtl.checkpoint import Checkpoint
from distmtl.config import Config
from distmtl.config_file import dump_config
from distmtl.data.dataset import open_dataset
from distmtl.data.schema import Kind, kinds_of, served_columns
from distmtl.errors import DistmtlError
from distmtl.exporting import program
from distmtl.exporting.card import card
from distmtl.exporting.manifest import MODEL, Manifest, RowFormat, complete
from distmtl.exporting.row_formats import pack
from distmtl.exporting.table_rows import StoredTable, stored_tables
from distmtl.model.normalisation import seen_domains
from distmtl.run_directory import checkpoint_config, find_checkpoint, saved_calibrations
from distmtl.versions import git_commit, versions

Say = Callable[[str], None]
FILE_ROWS_BYTES = 256 << 20  # of float32 rows in a file


def export(path: str, out: str, row_format: RowFormat = "fp32", *, sequence: int = 0, say: Say = print) -> Manifest:
    """Write the checkpoint at `path` (a run's best one) to the new folder `out`.

    Args:
        sequence: which publish of a folder it is (exporting.publishing).

    Raises:
        DistmtlError: no complete checkpoint, `out` is not empty, or a head that torch.export cannot follow.
    """
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    checkpoint.verify(found)
    with _new_folder(Path(out)) as folder:
        for name, table in _tables(found, config).items():
            (folder / "tables" / name).mkdir(parents=True)
            for first, rows in _files(table):
                save_file(pack(rows, row_format), folder / "tables" / name / f"{first:09d}.safetensors")
            say(f"table {name}: {table.rows:,} rows of {table.columns} as {row_format}")
        return _finish(folder, found, config, row_format, sequence=sequence)


def export_delta(path: str, since: str, base: Manifest, out: str, *, say: Say = print) -> Manifest:
    """Write to the new folder `out` what of the checkpoint at `path` differs from the one at `since`, of which `base` is the export (or
    delta); rows in its format. Dense parameters are few: all of them.

    Raises:
        DistmtlError: as `export`, or the two checkpoints are not of the same tables.
    """
    found, before = find_checkpoint(path), find_checkpoint(since)
    config = checkpoint_config(found)
    checkpoint.verify(found)
    tables, former = _tables(found, config), stored_tables(before)
    with _new_folder(Path(out)) as folder:
        for name, table in tables.items():
            then = former.get(name)
            if then is None or (then.rows, then.columns) != (table.rows, table.columns):
                raise DistmtlError(f"table {name!r} of {found.path} has another size than in {before.path}; publish a full export")
            changed, values = _changed(table, then)
            if len(changed):
                (folder / "tables" / name).mkdir(parents=True)
                save_file({"rows": changed, **pack(values, base.row_format)}, folder / "tables" / name / "changed.safetensors")
            say(f"table {name}: {len(changed):,} of {table.rows:,} rows have changed")
        return _finish(folder, found, config, base.row_format, base=base.digest, sequence=base.sequence + 1)


def source(found: Checkpoint) -> str:
    """Run and checkpoint, as an export names them."""
    return f"{found.path.parent.parent.name}/{found.path.name}"


def digest_of(found: Checkpoint) -> str:
    """Another one for every checkpoint, whatever its name."""
    return hashlib.sha256(json.dumps(found.manifest, sort_keys=True).encode()).hexdigest()[:16]


def _tables(found: Checkpoint, config: Config) -> dict[str, StoredTable]:
    """The tables that the config reads."""
    stored = stored_tables(found)
    return {name: stored[name] for name in config.tables_read}


def _files(table: StoredTable) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of every file."""
    rows = max(FILE_ROWS_BYTES // (4 * table.columns), 1)
    for first in range(0, table.rows, rows):
        yield first, table.block(first, min(first + rows, table.rows))


def _changed(now: StoredTable, then: StoredTable) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that differ, and what they are now."""
    numbers, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, now.columns)]
    for first, rows in now.blocks():
        other = (rows != then.block(first, first + len(rows))).any(1).nonzero()[:, 0]
        numbers.append(other + first)
        values.append(rows[other])
    return torch.cat(numbers), torch.cat(values)


def _finish(folder: Path, found: Checkpoint, config: Config, row_format: RowFormat, *, base: str = "", sequence: int = 0) -> Manifest:
    """All but the tables, and the manifest."""
    dense = checkpoint.dense(found)
    (folder / MODEL).write_bytes(program.save(config, dense))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    manifest = Manifest(
        base=base,
        sequence=sequence,
        name=config.name,
        checkpoint=source(found),
        checkpoint_digest=digest_of(found),
        step=found.step,
        rows_trained=found.manifest["loop"]["rows"],
        row_format=row_format,
        config=config.model_dump(mode="json"),
        columns=columns_of(found),
        calibrations=saved_calibrations(found),
        domains=seen_domains(dense),
        versions=versions(),
        git=git_commit(),
    )
    (folder / "card.md").write_text(card(manifest, found, config), encoding="utf-8")
    return complete(folder, manifest)


def columns_of(found: Checkpoint) -> dict[str, Kind]:
    """What the columns hold that its model reads; its training data say it where the checkpoint was written before this was recorded."""
    if columns := found.manifest.get("columns"):
        return columns
    config = checkpoint_config(found)
    try:
        return kinds_of(open_dataset(config.data.train).schema, served_columns(config))
    except DistmtlError as e:
        raise DistmtlError(
            f"checkpoint {found.path} does not say whether its columns held strings, and its training data cannot be asked: {e}"
        ) from None


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all. Of two that write it at once the second is refused.

    Raises:
        DistmtlError: something is there already, or it lies in an object store, where no folder appears at once.
    """
    if "://" in os.fspath(out) or re.match(r"[a-z0-9]+:/", os.fspath(out)):  # a Path has one slash there
        raise DistmtlError(f"--out {out} is in an object store; export to a local folder, and copy it there")
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DistmtlError(f"--out {out} is not empty; choose another folder, or delete it")
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            for left in partial.iterdir():  # of a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield partial
                if out.exists():
                    out.rmdir()
                os.replace(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        raise DistmtlError(f"export {out} cannot be written: {what}; choose another folder, or export again") from e


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """For this process alone, until it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat()):  # the other one has just ended
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise DistmtlError(f"{folder} is being written by another process; wait for it, or choose another folder") from None
    finally:
        os.close(handle)
