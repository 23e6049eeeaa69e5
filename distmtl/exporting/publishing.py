"""A folder of exports in the order of their publication, which serving follows: full ones, and deltas between them.

    000000-full/  000001-delta/  000002-delta/  000003-full/  …

Each appears whole, by its manifest's `sequence`. The newest full export and the deltas after it are the model of now.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmtl.checkpoint import Checkpoint
from distmtl.errors import DistmtlError
from distmtl.exporting.manifest import MANIFEST, Manifest, RowFormat, read
from distmtl.exporting.writer import Say, columns_of, digest_of, export, export_delta
from distmtl.run_directory import checkpoint_config, find_checkpoint

NAME = re.compile(r"(\d{6,})-(full|delta)")
FULLS_KEPT = 2  # and the deltas after them: a server that is late finds what it still needs


@dataclass(frozen=True)
class Published:
    """The newest full export of a folder, the deltas after it, and what these make of it."""

    full: Path
    deltas: tuple[Path, ...]
    newest: Manifest


def published(folder: Path) -> Published | None:
    """What a folder of exports holds now; None if it holds none.

    Raises:
        DistmtlError: an export in it is damaged, or a delta does not change the one before it.
    """
    found = exports_in(folder)
    fulls = [i for i, path in enumerate(found) if path.name.endswith("-full")]
    if not fulls:
        return None
    full, *deltas = found[fulls[-1] :]
    newest = read(full)
    for path in deltas:
        delta = read(path)
        if delta.base != newest.digest:
            raise DistmtlError(f"delta {path} changes export {delta.base}, but before it is {newest.digest}; publish a full export")
        newest = delta
    return Published(full, tuple(deltas), newest)


def publish(checkpoint: str, folder: Path, *, full_every: int, row_format: RowFormat = "fp32", say: Say = print) -> Manifest:
    """Publish a checkpoint of a chain of runs: full, or, fewer than `full_every` publishes after a full one, what changed since the one
    published last, while that is kept and the model reads and predicts the same. Does nothing when it is that very one. After a damaged
    one the next is full. Older exports that nothing follows from are deleted.

    Raises:
        DistmtlError: no such checkpoint, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last, found = None, find_checkpoint(checkpoint)
    try:
        last = published(folder)
    except DistmtlError as e:
        say(f"{e}; a full export goes on from there")
    if last and last.newest.checkpoint_digest == digest_of(found):
        return last.newest
    number = max((int(p.name.split("-")[0]) for p in folder.iterdir() if NAME.fullmatch(p.name)), default=-1) + 1
    before = _kept(found, last.newest) if last else None
    alike = last and last.newest.row_format == row_format and last.newest.serves_like(_config(found), columns_of(found))
    if last and before and alike and len(last.deltas) + 1 < full_every:
        name = f"{number:06d}-delta"
        manifest = export_delta(checkpoint, before, last.newest, str(folder / name), say=lambda text: None)
    else:
        name = f"{number:06d}-full"
        manifest = export(checkpoint, str(folder / name), row_format, sequence=number, say=lambda text: None)
        _retain(folder)
    size = sum(size for size, _ in manifest.files.values()) / 2**20
    say(f"published {folder / name}: step {manifest.step:,} of {manifest.checkpoint}, {size:,.1f} MiB")
    return manifest


def _config(found: Checkpoint) -> dict[str, Any]:
    return checkpoint_config(found).model_dump(mode="json")


def _kept(found: Checkpoint, newest: Manifest) -> str | None:
    """The checkpoint that `newest` was made of, in the same run or in another one of the chain; None if it is gone, or another of its name
    is there."""
    run, _, name = newest.checkpoint.partition("/")
    path = str(found.path.parent.parent.parent / run / "checkpoints" / name)
    try:
        return path if digest_of(find_checkpoint(path)) == newest.checkpoint_digest else None
    except DistmtlError:
        return None


def exports_in(folder: Path) -> list[Path]:
    """Complete exports by their number."""
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).exists()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def _retain(folder: Path) -> None:
    found = exports_in(folder)
    fulls = [i for i, path in enumerate(found) if path.name.endswith("-full")]
    for path in found[: fulls[-FULLS_KEPT]] if len(fulls) > FULLS_KEPT else []:
        shutil.rmtree(path, ignore_errors=True)
