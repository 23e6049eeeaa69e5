"""A checkpoint's tables, read by blocks of rows: a table of any size through a small window, without a process group.

torch DCP writes every shard as one torch.save, a zip whose storage is not compressed: its rows lie at fixed places of the file. They
are read from there, no pickle involved; what a shard must be is in the checkpoint's own index and is compared.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distmtl import checkpoint
from distmtl.checkpoint import Checkpoint
from distmtl.errors import DistmtlError

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """A shard: rows and columns of the table, and where in which file its numbers begin."""

    first_row: int
    first_column: int
    rows: int
    columns: int
    file: Path
    start: int


class StoredTable:
    """A table of a checkpoint.

    Raises:
        DistmtlError: a shard is not stored as this version of torch does it.
    """

    def __init__(self, found: Checkpoint, name: str, rows: int, columns: int, chunks: list[Chunk]):
        self.found, self.name, self.rows, self.columns, self.chunks = found, name, rows, columns, chunks

    @cached_property
    def block_rows(self) -> int:
        return max(BLOCK_BYTES // (4 * self.columns), 1)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row, (rows, columns) float32, one block after the other."""
        for first in range(0, self.rows, self.block_rows):
            yield first, self.block(first, min(first + self.block_rows, self.rows))

    def block(self, first: int, last: int) -> Tensor:
        """Rows first … last-1, float32."""
        out = np.empty((last - first, self.columns), dtype=np.float32)
        for c in self.chunks:
            a, b = max(first, c.first_row), min(last, c.first_row + c.rows)
            if a < b:
                part = out[a - first : b - first]
                values = part if c.columns == self.columns else np.empty((b - a, c.columns), dtype=np.float32)
                self._read(c, a - c.first_row, values)
                if values is not part:
                    part[:, c.first_column : c.first_column + c.columns] = values
        return torch.from_numpy(out)

    def _read(self, chunk: Chunk, row: int, out: np.ndarray) -> None:
        """Rows from the `row`-th of the chunk on."""
        left = memoryview(out.data).cast("B")
        with chunk.file.open("rb") as file:
            file.seek(chunk.start + row * chunk.columns * 4)
            while len(left):
                if not (n := file.readinto(left)):
                    raise DistmtlError(f"checkpoint {self.found.path} is damaged: {chunk.file.name} ends within table {self.name}")
                left = left[n:]


def stored_tables(found: Checkpoint) -> dict[str, StoredTable]:
    """Table → its rows in the checkpoint."""
    index, tables = checkpoint.index(found), {}
    places: dict[Any, Any] = {(key.fqn, tuple(key.offset or ())): value for key, value in index.storage_data.items()}
    for name, value in index.state_dict_metadata.items():
        if not name.startswith("tables/") or not isinstance(value, TensorStorageMetadata):
            continue
        table, chunks = checkpoint.table_of(name), []
        for chunk in value.chunks:
            place, (row, column), (rows, columns) = places[name, tuple(chunk.offsets)], chunk.offsets, chunk.sizes
            file = found.path / place.relative_path
            start = _start(file, place.offset, place.length, 4 * rows * columns, table)
            chunks.append(Chunk(row, column, rows, columns, file, start))
        rows, columns = value.size
        tables[table] = StoredTable(found, table, rows, columns, chunks)
    return tables


def _start(file: Path, offset: int, length: int, size: int, table: str) -> int:
    """Where in the file the numbers of a shard begin: its storage in the zip that lies at `offset`."""
    with file.open("rb") as whole:
        try:
            inner = Window(whole, offset, length)
            with zipfile.ZipFile(inner) as saved:
                info = next(i for i in saved.infolist() if i.filename.endswith("/data/0"))
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
                    raise ValueError(f"{info.file_size} bytes instead of {size}")
            inner.seek(info.header_offset)
            name, extra = struct.unpack("<HH", inner.read(30)[26:])
            return offset + info.header_offset + 30 + name + extra
        except (ValueError, StopIteration, zipfile.BadZipFile, struct.error) as e:
            raise DistmtlError(f"{file}: the rows of table {table} are not stored as this version reads them: {e}") from None


class Window:
    """Bytes offset … offset+length-1 of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = to + (0, self.at, self.length)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.file.seek(self.offset + self.at)
        data = self.file.read(self.length - self.at if size < 0 else min(size, self.length - self.at))
        self.at += len(data)
        return data
