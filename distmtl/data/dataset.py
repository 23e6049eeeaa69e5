"""Which files a data set is made of, and its identity."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from distmtl.errors import DistmtlError

FOOTER_THREADS = 16  # footers read at once: on remote storage each is a round trip


@dataclass(frozen=True)
class ParquetPart:
    """One file: its path, size in bytes and the rows of each of its row groups."""

    path: str
    size: int
    group_rows: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Files in name order. A row's number counts through them in that order."""

    path: str
    root: str
    parts: tuple[ParquetPart, ...]
    columns: tuple[str, ...]  # of the first file

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(part, row group within it) for every row group."""
        return [(p, g) for p, part in enumerate(self.parts) for g in range(len(part.group_rows))]

    @cached_property
    def group_rows(self) -> np.ndarray:
        return np.array([n for part in self.parts for n in part.group_rows], dtype=np.int64)

    @cached_property
    def group_starts(self) -> np.ndarray:
        """Number of the first row of every row group, and the number of rows at the end."""
        return np.concatenate([[0], np.cumsum(self.group_rows)])

    @property
    def rows(self) -> int:
        return int(self.group_starts[-1])

    @cached_property
    def digest(self) -> str:
        """Changes when a file is added, removed, renamed, resized or cut into other row groups."""
        lines = [f"{_relative(part.path, self.root)} {part.size} {part.group_rows}" for part in self.parts]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def manifest(self) -> dict[str, list[int]]:
        """File → [size, rows], for the checkpoint."""
        return {_relative(part.path, self.root): [part.size, sum(part.group_rows)] for part in self.parts}

    def locate(self, row: int) -> str:
        """The file and the row within it of a row number."""
        group = int(np.searchsorted(self.group_starts, row, "right")) - 1
        part, _ = self.groups[group]
        first = self.groups.index((part, 0))
        return f"{self.parts[part].path}, row {row - int(self.group_starts[first])}"

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the first file."""
        return self.open_part(0).schema_arrow

    def open_part(self, part: int) -> pq.ParquetFile:
        filesystem, _ = filesystem_of(self.path)
        path = self.parts[part].path
        if isinstance(filesystem, fs.LocalFileSystem):
            return pq.ParquetFile(path)  # not mapped: its pages would count as this process's memory
        return pq.ParquetFile(path, filesystem=filesystem, buffer_size=1 << 20)


def filesystem_of(path: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem for a local path or URI, and the path within it."""
    if "://" not in path:
        return fs.LocalFileSystem(), path
    try:
        return fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise DistmtlError(f"data path {path}: {e}") from None


def open_dataset(path: str) -> Dataset:
    """Read every footer below `path`: a file, a folder (recursively) or a glob such as `day=*/part-*.parquet`.

    Raises:
        DistmtlError: nothing there, no rows, or files that are not (whole) Parquet files, all of them named.
    """
    filesystem, inner = filesystem_of(path)
    try:
        root, names = _list(filesystem, inner, path)
    except OSError as e:
        raise DistmtlError(f"data path {path} cannot be read: {e}") from None
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda file: _footer(filesystem, *file), names))
    if broken := [f for f in footers if isinstance(f, str)]:
        raise DistmtlError("Parquet files that cannot be read:\n  " + "\n  ".join(broken[:20]))
    parts, columns = zip(*footers, strict=True)
    dataset = Dataset(path, root, parts, columns[0])
    if not dataset.rows:
        raise DistmtlError(f"data path {path}: its {len(parts)} Parquet file(s) hold no rows")
    return dataset


def _footer(filesystem: fs.FileSystem, name: str, size: int) -> tuple[ParquetPart, tuple[str, ...]] | str:
    """A file's row groups and columns, or what is wrong with it."""
    try:
        meta = pq.read_metadata(name, filesystem=filesystem)
    except pa.ArrowInvalid as e:
        if name.endswith((".csv", ".tsv", ".csv.gz")):
            return (
                f"{name} is CSV, and rows are read from Parquet: distmtl init makes it for training, pandas.read_csv(…).to_parquet(…) else"
            )
        why = str(e).splitlines()[0]
        return f"{name} ({size} bytes) is not a whole Parquet file (truncated, or of another format); write it again: {why}"
    except OSError as e:
        return f"{name}: {str(e).splitlines()[0]}"
    rows = tuple(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
    return ParquetPart(name, size, rows), tuple(meta.schema.to_arrow_schema().names)


def _list(filesystem: fs.FileSystem, inner: str, path: str) -> tuple[str, list[tuple[str, int]]]:
    if any(c in inner for c in "*?["):
        fixed = PurePosixPath(*_before_glob(inner))
        info = filesystem.get_file_info(fs.FileSelector(str(fixed), recursive=True, allow_not_found=True))
        root, matches = str(fixed), _glob(inner)
        found = [i for i in info if i.type == fs.FileType.File and matches(i.path) and _is_data(i.path, root)]
    else:
        top = filesystem.get_file_info(inner)
        if top.type == fs.FileType.NotFound:
            raise DistmtlError(f"data path {path}: no such file or folder")
        if top.type == fs.FileType.File:
            return str(PurePosixPath(inner).parent), [(inner, top.size)]
        info = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
        found = [i for i in info if i.type == fs.FileType.File and _is_data(i.path, inner)]
        root = inner
    if not found:
        raise DistmtlError(f"data path {path}: no *.parquet files in it")
    return root, sorted((i.path, i.size) for i in found)


def _glob(pattern: str) -> Callable[[str], Any]:
    """Whether a path matches: `**/` is any folders, `*` and `?` stay within a name."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^]]*\])", pattern)
    signs = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(signs.get(p, p if p.startswith("[") else re.escape(p)) for p in parts)).fullmatch


def _before_glob(inner: str) -> list[str]:
    parts = PurePosixPath(inner).parts
    return list(parts[: next(i for i, p in enumerate(parts) if any(c in p for c in "*?["))])


def _is_data(path: str, root: str) -> bool:
    """A Parquet file in no hidden or underscored folder or name (such as _SUCCESS, _temporary)."""
    return path.endswith((".parquet", ".pq")) and not any(p.startswith(("_", ".")) for p in PurePosixPath(_relative(path, root)).parts)


def _relative(path: str, root: str) -> str:
    return str(PurePosixPath(path).relative_to(root))
