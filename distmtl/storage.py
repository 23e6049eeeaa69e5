"""Where a run is kept: a folder of a local or shared disk, or of an object store by its URI. Both behave like pathlib's paths."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from upath import UPath

from distmtl.errors import DistmtlError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme → the extra of ours that opens it


def place(path: str) -> Path:
    """A local path, or a URI (`s3://bucket/run`, `gs://…`, `memory://…`) as fsspec opens it. `file://` is a local path.

    Raises:
        DistmtlError: no such scheme, or the package that opens it is not installed.
    """
    scheme, sign, rest = path.partition("://")
    if not sign:
        return Path(path)
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        folder = UPath(path, use_listings_cache=False)  # else what other processes write would go unseen
        _ = folder.fs
    except ImportError as e:
        what = f"pip install 'distmtl[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(e)
        raise DistmtlError(f"{path}: the package that opens {scheme}:// is not installed: {what}") from None
    except ValueError as e:
        known = " and ".join(f"distmtl[{extra}]" for extra in dict.fromkeys(EXTRAS.values()))
        raise DistmtlError(f"{path}: {e}; s3:// and gs:// are opened by the extras {known}, other schemes by fsspec's packages") from None
    return cast(Path, folder)


def is_remote(path: Path) -> bool:
    """Whether it lies in an object store, where nothing can be appended to and a whole file appears at once."""
    return isinstance(path, UPath)


def absolute(path: str) -> str:
    """The same place for a process in another working directory."""
    folder = place(path)
    return path if is_remote(folder) else str(folder.resolve())


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, whoever is killed meanwhile."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk gets its space back
        raise


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, which appears whole when the block ends well, and not at all otherwise; whoever else writes it too."""
    if is_remote(path):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            path.fs.pipe_file(path.path, file.read())  # type: ignore[attr-defined]
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sizes(folder: Path) -> dict[str, int]:
    """File → bytes. In an object store one listing, where asking for each file would be a round trip each."""
    if is_remote(folder):
        listed = folder.fs.ls(folder.path, detail=True)  # type: ignore[attr-defined]
        return {f["name"].rsplit("/", 1)[-1]: f["size"] for f in listed if f["type"] == "file"}
    return {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}


def remove_tree(path: Path) -> None:
    """Gone, if it was there."""
    if is_remote(path):
        if path.exists():
            path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path, ignore_errors=True)
