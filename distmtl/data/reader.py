"""Parquet → Batch, in the order of order.py, decoded ahead in the background. Any position can be the first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distmtl.batch import Batch
from distmtl.data.collate import ROW, Collator, alike
from distmtl.data.dataset import Dataset
from distmtl.data.order import EpochOrder, steps_per_epoch, streams_of
from distmtl.data.rows import Part, Rows, batch_of
from distmtl.errors import DistmtlError

DECODE_ROWS = 8192  # rows decoded at a time, per open row group


@dataclass(frozen=True)
class Reader:
    """One rank's share of a data set.

    Args:
        global_batch_size: rows of a step over all ranks; a multiple of num_streams.
        seed: orders the rows; None reads them in the order of the files.
    """

    dataset: Dataset
    collate: Collator
    global_batch_size: int
    num_streams: int
    window: int
    seed: int | None
    rank: int
    world_size: int
    prefetch: int

    @property
    def rows_per_step(self) -> int:
        """Rows that a step takes from every stream."""
        return self.global_batch_size // self.num_streams

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.dataset.rows, self.num_streams, self.rows_per_step)

    def rows_of_step(self, step: int) -> int:
        """Rows that a global step takes from the data set, over all ranks."""
        bounds = np.arange(self.num_streams + 1) * self.dataset.rows // self.num_streams
        left = np.diff(bounds) - step % self.steps_per_epoch * self.rows_per_step
        return int(left.clip(0, self.rows_per_step).sum())

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of the global steps first … last-1. A failing read gives a batch of padding that says why, and ends them."""
        source = self._batches(first, last)
        with ThreadPoolExecutor(1, thread_name_prefix="distmtl-reader") as pool:
            ahead = [pool.submit(next, source, None) for _ in range(self.prefetch + 1)]
            while (batch := ahead.pop(0).result()) is not None:
                ahead.append(pool.submit(next, source, None))
                yield batch

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        epoch, streams, nothing = -1, [], [(self.collate.padding(), 0, 0)]
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
                own = streams_of(self.rank, self.world_size, self.num_streams)
                streams = [StreamRows(self.dataset, order, s, self.collate) for s in own]
            within = step % self.steps_per_epoch
            try:
                due = [(s, order.rows_in_step(within, s.stream)) for s in streams]
                parts = [part for s, rows in due for part in s.take(within * self.rows_per_step, rows)]
                yield batch_of(parts or nothing, self.collate.keys, self._padded_rows(order, within), step)
            except Exception as e:  # whatever it is, the other ranks must hear of it in this step, or they would wait for ever
                what = str(e) if isinstance(e, DistmtlError) else f"{type(e).__name__}: {e}"
                error = f"data set {self.dataset.path}: {what}"
                yield batch_of(nothing, self.collate.keys, self._padded_rows(order, within), step, error)
                return

    def _order(self, epoch: int) -> EpochOrder:
        key = None if self.seed is None else (self.seed, epoch)
        return EpochOrder(self.dataset.group_rows, key, self.num_streams, self.window, self.rows_per_step)

    def _padded_rows(self, order: EpochOrder, step: int) -> int:
        """Rows of the fullest rank in this step: all ranks are padded to it (row-wise sharding fails on unequal batches)."""
        ranks = (streams_of(r, self.world_size, self.num_streams) for r in range(self.world_size))
        return max(sum(order.rows_in_step(step, s) for s in streams) for streams in ranks)


class StreamRows:
    """Rows of one stream, window by window; a window is decoded, checked and permuted once, and handed out in parts."""

    def __init__(self, dataset: Dataset, order: EpochOrder, stream: int, collate: Collator):
        self.order, self.stream, self.collate = order, stream, collate
        self.groups = GroupRows(dataset, collate.columns)
        self.first = self.last = 0
        self.window: Rows | None = None

    def take(self, position: int, rows: int) -> Iterator[Part]:
        """The stream's rows position … position+rows-1."""
        while rows:
            window = self._window(position)
            first = position - self.first
            last = min(first + rows, self.last - self.first)
            yield window, first, last
            position, rows = position + last - first, rows - (last - first)

    def _window(self, position: int) -> Rows:
        if self.window is None or not self.first <= position < self.last:
            self.window = None  # not two at a time
            self.first, self.last, permutation = self.order.window_of(self.stream, position)
            pieces = [self.groups.take(*p) for p in self.order.pieces(self.stream, self.first, self.last)]
            self.window = self.collate(pa.concat_tables(pieces, promote_options="permissive"), permutation)
        return self.window


class GroupRows:
    """Rows of row groups read forwards, at most DECODE_ROWS of them decoded and waiting."""

    def __init__(self, dataset: Dataset, columns: list[str]):
        self.dataset, self.columns = dataset, columns
        self.group = -1
        self.position = 0  # of the first row not yet handed out
        self.waiting: pa.Table | None = None
        self.source: Iterator[pa.RecordBatch] = iter(())

    def take(self, group: int, first: int, last: int) -> pa.Table:
        """Rows first … last-1 of a row group, with their numbers."""
        if group != self.group or first < self.position:
            self._open(group)
        self._skip(first - self.position)
        table = self._next(last - first)
        start = int(self.dataset.group_starts[group]) + first
        return table.append_column(ROW, pa.array(np.arange(start, start + table.num_rows)))

    def _open(self, group: int) -> None:
        part, index = self.dataset.groups[group]
        file = self.dataset.open_part(part)
        self.source = file.iter_batches(batch_size=DECODE_ROWS, row_groups=[index], columns=self.columns, use_threads=False)
        self.group, self.position = group, 0
        self.waiting = alike(file.schema_arrow.empty_table().select(self.columns))

    def _skip(self, rows: int) -> None:
        """Parquet can only be read forwards: rows before the wanted ones are decoded, but not kept."""
        assert self.waiting is not None
        self.position += rows
        while rows > self.waiting.num_rows:
            rows -= self.waiting.num_rows
            self.waiting = alike(pa.Table.from_batches([next(self.source)]))
        self.waiting = self.waiting.slice(rows)

    def _next(self, rows: int) -> pa.Table:
        assert self.waiting is not None
        parts, missing = [], rows
        while missing > self.waiting.num_rows:
            parts.append(self.waiting)
            missing -= self.waiting.num_rows
            self.waiting = alike(pa.Table.from_batches([next(self.source)]))
        parts.append(self.waiting.slice(0, missing))
        self.waiting = self.waiting.slice(missing)
        self.position += rows
        return pa.concat_tables(parts)
