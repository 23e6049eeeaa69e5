"""Where a run is kept: a folder of a local or shared disk, or of an object store by its URI. Both behave like pathlib's paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import cast

from upath import UPath

from distmtl.errors import DistmtlError


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
    except (ValueError, ImportError) as e:
        raise DistmtlError(f"{path}: cannot be opened: {e}; for s3:// and gs:// install the extra: pip install 'distmtl[s3]'") from None
    return cast(Path, folder)


def is_remote(path: Path) -> bool:
    """Whether it lies in an object store, where nothing can be appended to and a whole file appears at once."""
    return not isinstance(path, Path)


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
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove_tree(path: Path) -> None:
    """Gone, if it was there."""
    if is_remote(path):
        if path.exists():
            path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path, ignore_errors=True)
