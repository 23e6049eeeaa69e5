"""Train, validation and test: the last rows by time are held out, or without a time some by their numbers' hash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.data.dataset import Dataset
from distmtl.data.hashing import mix
from distmtl.data.init.sample import Column, finite, instants, tables
from distmtl.data.output import ROW_GROUP_ROWS, SPLITS
from distmtl.errors import DistmtlError

CUTS = (0.8, 0.9)
OTHER_NAMES = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test", "holdout")}
TIMES = ("timestamp", "ts", "time", "datetime", "event_time", "event_timestamp", "date", "day", "dt", "created_at")
EPOCHS = ((1e9, 2.5e9, 1), (1e12, 2.5e12, 10**3), (1e15, 2.5e15, 10**6), (1e18, 2.5e18, 10**9))  # of now, in s, ms, µs, ns


@dataclass(frozen=True)
class Split:
    """By a column's value: the rows from the first cut on are validation, from the second on test. None: by the hash of a row's number."""

    column: str | None = None
    cuts: tuple[float, float] = (0, 0)
    told: tuple[str, str] = ("", "")  # the cuts, for a reader

    def of(self, first_row: int, table: pa.Table) -> np.ndarray:
        """(n,) places in SPLITS."""
        if self.column is None:
            tenth = mix(np.arange(first_row, first_row + len(table))) % np.uint64(10)
            return np.maximum(tenth.astype(np.int64) - 7, 0)
        t = instants(table[self.column]).cast(pa.float64(), safe=False).fill_null(-np.inf).to_numpy()
        return (t >= self.cuts[0]).astype(np.int64) + (t >= self.cuts[1])

    def why(self, split: str) -> str:
        if self.column is None:
            return {
                "train": "8 of 10 rows at random (by the hash of their numbers): no column is a time",
                "validation": "1 of 10",
                "test": "1 of 10",
            }[split]
        return {
            "train": f"{self.column} before {self.told[0]}",
            "validation": f"then before {self.told[1]}",
            "test": f"from {self.told[1]} on",
        }[split]


def is_time(column: Column) -> bool:
    """A timestamp or a date, or a number of a name and size that say so."""
    if column.holds == "time":
        return len(column.known) > 0
    if column.holds not in ("integer", "number") or not re.search(r"time|(^|_)(ts|date|at)$", column.name, re.IGNORECASE):
        return False
    return len(column.known) > 0 and _epoch(column) is not None


def _epoch(column: Column) -> int | None:
    """Units of a second, if the numbers can be times since 1970."""
    low, high = column.numbers.min(), column.numbers.max()
    return next((unit for least, most, unit in EPOCHS if least <= low and high <= most), None)


def split_by(columns: list[Column], asked: str | None) -> Split:
    """By the time that was asked for, else by the column whose name is most of a time's, else the first.

    Raises:
        DistmtlError: the column asked for orders nothing.
    """
    times = [c for c in columns if is_time(c)] if asked is None else [c for c in columns if c.name == asked]
    if not times:
        return Split()
    column = min(times, key=lambda c: TIMES.index(c.name.lower()) if c.name.lower() in TIMES else len(TIMES))
    if column.holds not in ("time", "integer", "number"):
        raise DistmtlError(f"--time {column.name}: it holds {column.holds}s; name a timestamp, a date or a number")
    values, counts = np.unique(column.numbers, return_counts=True)
    if len(values) < 3:
        if asked:
            raise DistmtlError(f"--time {asked}: it has {len(values)} different values, and three splits need three")
        return Split()
    before = (np.cumsum(counts) - counts) / counts.sum()
    first = 1 + int(np.abs(before[1:-1] - CUTS[0]).argmin())
    second = first + 1 + int(np.abs(before[first + 1 :] - CUTS[1]).argmin())
    cuts = float(values[first]), float(values[second])
    return Split(column.name, cuts, (_told(cuts[0], column), _told(cuts[1], column)))


def _told(cut: float, column: Column) -> str:
    unit = 10**6 if column.holds == "time" else _epoch(column)
    return f"{datetime.fromtimestamp(cut / unit, UTC):%Y-%m-%d %H:%M:%S}" if unit else f"{cut:.12g}"


def ready_splits(data: str) -> dict[str, str]:
    """Split → its folder, where a folder has them already."""
    folder = Path(data)
    if "://" in data or not (folder / "train").is_dir():
        return {}
    out = {"train": str((folder / "train").resolve())}
    for split, names in OTHER_NAMES.items():
        if found := next((folder / n for n in names if (folder / n).is_dir()), None):
            out[split] = str(found.resolve())
    return out


def write_splits(folder: Path, dataset: Dataset, schema: pa.Schema, split: Split, whole: set[str]) -> dict[str, int]:
    """<folder>/<split>/part-00000.parquet with all columns, rows in their order: NaN and infinity as null, `whole` floats as integers.

    Returns:
        Split → rows; splits without any are not written.
    """
    outgoing: dict[str, list[pa.Table]] = {s: [] for s in SPLITS}
    rows, writers = dict.fromkeys(SPLITS, 0), dict[str, pq.ParquetWriter]()

    def write(name: str, at_least: int) -> None:
        waiting = pa.concat_tables(outgoing[name])
        ready = len(waiting) // at_least * at_least
        if ready and name not in writers:
            (folder / name).mkdir()
            writers[name] = pq.ParquetWriter(folder / name / "part-00000.parquet", waiting.schema)
        if ready:
            writers[name].write_table(waiting.slice(0, ready), row_group_size=ROW_GROUP_ROWS)
        outgoing[name] = [waiting.slice(ready)]

    try:
        for first, table in tables(dataset, schema, range(len(dataset.groups))):
            place = split.of(first, table)
            clean = _clean(table, whole)
            for s, name in enumerate(SPLITS):
                part = clean.filter(pa.array(place == s))
                rows[name] += len(part)
                outgoing[name].append(part)
                if sum(map(len, outgoing[name])) >= ROW_GROUP_ROWS:
                    write(name, ROW_GROUP_ROWS)
        for name in SPLITS:
            write(name, 1)
    finally:
        for writer in writers.values():
            writer.close()
    return {name: n for name, n in rows.items() if n}


def _clean(table: pa.Table, whole: set[str]) -> pa.Table:
    arrays: list[Any] = []
    for name, column in zip(table.column_names, table.columns):
        values = finite(column)
        try:
            arrays.append(values.cast(pa.int64()) if name in whole else values)
        except pa.ArrowInvalid as e:
            raise DistmtlError(f"column {name!r} holds ids written as floats, and not all are whole ({e!s:.80}); write integers") from None
    return pa.table(arrays, names=table.column_names)
