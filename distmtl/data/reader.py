"""Parquet → Batch, in the order of order.py, decoded ahead in the background. Any position can be the first."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.data.collate import ROW, Collator, Each, alike
from distmtl.data.dataset import Dataset
from distmtl.data.order import EpochOrder, steps_per_epoch, streams_of
from distmtl.data.rows import Part, Rows, batch_of
from distmtl.errors import DistmtlError
from distmtl.machine import available_cores

DECODE_ROWS = 8192  # rows decoded at a time, per open row group
OPEN_FILES = 32  # that a thread keeps open beside those being read: opening again means to read the footer again


@dataclass(frozen=True)
class Reader:
    """One rank's share of a data set.

    Args:
        global_batch_size: rows of a step over all ranks; a multiple of num_streams.
        seed: orders the rows; None reads them in the order of the files.
        threads: that decode, beside each other, streams and then columns; what is read does not depend on them.
        pin: into memory that a CUDA device copies from while it computes.
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
    threads: int = 1
    pin: bool = False

    @property
    def rows_per_step(self) -> int:
        """Rows that a step takes from every stream."""
        return self.global_batch_size // self.num_streams

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.dataset.rows, self.num_streams, self.rows_per_step)

    def rows_of_step(self, step: int) -> int:
        """Rows that a global step takes from the data set, over all ranks."""
        return int(self._stream_rows(step).sum())

    def _stream_rows(self, step: int) -> np.ndarray:
        """(num_streams,) rows that a global step takes of every stream: `rows_per_step`, fewer or none in an epoch's last steps."""
        bounds = np.arange(self.num_streams + 1) * self.dataset.rows // self.num_streams
        return (np.diff(bounds) - step % self.steps_per_epoch * self.rows_per_step).clip(0, self.rows_per_step)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of the global steps first … last-1. A failing read gives a batch of padding that says why, and ends them."""
        with beside_each_other(self.threads) as each, ThreadPoolExecutor(1, thread_name_prefix="distmtl-reader") as pool:
            source = self._batches(first, last, each)
            source = map(Batch.pin_memory, source) if self.pin else source
            ahead = [pool.submit(next, source, None) for _ in range(self.prefetch + 1)]
            while (batch := ahead.pop(0).result()) is not None:
                ahead.append(pool.submit(next, source, None))
                yield batch

    def _batches(self, first: int, last: int, each: Each) -> Iterator[Batch]:
        epoch, nothing = -1, [(self.collate.padding(), 0, 0)]
        streams = streams_of(self.rank, self.world_size, self.num_streams)
        shares = [streams[i :: self.threads] for i in range(self.threads)]
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                windows = Windows(self.dataset, self._order(epoch), shares, self.collate, epoch, each)
            within = step % self.steps_per_epoch
            try:
                parts = list(windows.rows_of(within))
                yield batch_of(parts or nothing, self.collate.keys, self._padded_rows(step), step)
            except Exception as e:  # whatever it is, the other ranks must hear of it in this step, or they would wait for ever
                what = str(e) if isinstance(e, DistmtlError) else f"{type(e).__name__}: {e}"
                error = f"data set {self.dataset.path}: {what}"
                yield batch_of(nothing, self.collate.keys, self._padded_rows(step), step, error)
                return

    def _order(self, epoch: int) -> EpochOrder:
        key = None if self.seed is None else (self.seed, epoch)
        return EpochOrder(self.dataset.group_rows, key, self.num_streams, self.window, self.rows_per_step)

    def _padded_rows(self, step: int) -> int:
        """Rows of the fullest rank in this step: all ranks are padded to it (row-wise sharding fails on unequal batches)."""
        rows = self._stream_rows(step)
        return max(
            int(rows[s.start : s.stop].sum()) for s in (streams_of(r, self.world_size, self.num_streams) for r in range(self.world_size))
        )


@contextmanager
def beside_each_other(threads: int) -> Iterator[Each]:
    """`map` of so many threads."""
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="distmtl-decoder") as pool:
        yield pool.map


def decoding_threads(config: Config, device: torch.device) -> int:
    """Of one rank. Beside training on CPU every core is the head's already."""
    if config.data.threads or device.type == "cpu":
        return config.data.threads or 1
    return min(max(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 2, 1), 8)


def every_row(dataset: Dataset, collate: Collator, config: Config, rank: int, world_size: int, threads: int) -> Reader:
    """Reads every row once, in the order of the files, in batches of an evaluation."""
    streams = config.data.num_streams
    return Reader(
        dataset,
        collate,
        global_batch_size=max(config.evaluation.batch_size // streams, 1) * streams,
        num_streams=streams,
        window=config.data.shuffle_window,
        seed=None,
        rank=rank,
        world_size=world_size,
        prefetch=config.data.prefetch,
        threads=threads,
    )


class Windows:
    """The next window of each of a rank's streams, decoded, checked and laid out in the order of the steps: a step is a cut.

    Args:
        shares: of the streams, each read by one thread at a time with files of its own: an open file is not for two.
    """

    def __init__(self, dataset: Dataset, order: EpochOrder, shares: Sequence[range], collate: Collator, epoch: int, each: Each):
        self.order, self.shares, self.collate, self.epoch, self.each = order, shares, collate, epoch, each
        self.groups: dict[int, GroupRows] = {}
        for share in shares:
            files = lru_cache(maxsize=OPEN_FILES)(dataset.open_part)
            self.groups |= {s: GroupRows(dataset, collate.columns, files) for s in share}
        self.index = -1
        self.rows: Rows | None = None
        self.spans: dict[int, tuple[int, int]] = {}  # step → its first and last (excluded) row here

    def rows_of(self, step: int) -> Iterator[Part]:
        """A step's rows: one part, or more where windows end within the step."""
        first, last = self.order.positions_of(step)
        for index in range(first // self.order.window, -(-last // self.order.window)):
            if index != self.index:
                self._read(index)
            if self.rows and step in self.spans:
                yield self.rows, *self.spans[step]

    def _read(self, index: int) -> None:
        self.index, self.rows = index, None  # not two at a time
        found = {s: window for share in self.each(lambda share: self._windows(share, index), self.shares) for s, window in share.items()}
        pieces, steps, read = [], defaultdict(list), 0
        for stream in sorted(found):
            first, last, permutation, tables = found[stream]
            pieces += tables
            for step in self.order.steps_of(first, last):
                a, b = self.order.positions_of(step)
                steps[step].append(read + permutation[max(a - first, 0) : b - first])
            read += last - first
        ends = np.cumsum([sum(map(len, parts)) for parts in steps.values()]).tolist()
        self.spans = {step: (a, b) for step, a, b in zip(steps, [0, *ends], ends, strict=False)}
        if read:
            order = np.concatenate([part for parts in steps.values() for part in parts])
            self.rows = self.collate(pa.concat_tables(pieces, promote_options="permissive"), order, self.epoch, self.each)

    def _windows(self, share: range, index: int) -> dict[int, tuple[int, int, np.ndarray, list[pa.Table]]]:
        """Of every stream of a share: its window's first and last (excluded) row, permutation and rows."""
        out = {}
        for stream in share:
            first, last, permutation = self.order.window_of(stream, index)
            out[stream] = first, last, permutation, [self.groups[stream].take(*p) for p in self.order.pieces(stream, first, last)]
        return out


class GroupRows:
    """Rows of row groups read forwards, at most DECODE_ROWS of them decoded and waiting."""

    def __init__(self, dataset: Dataset, columns: list[str], open_part: Callable[[int], pq.ParquetFile]):
        self.dataset, self.columns, self.open_part = dataset, columns, open_part
        self.group = -1
        self.position = 0  # of the first row not yet handed out
        self.waiting: pa.Table
        self.schema = pa.schema([])  # of tables that are as they should be
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
        self.source = self.open_part(part).iter_batches(batch_size=DECODE_ROWS, row_groups=[index], columns=self.columns, use_threads=False)
        self.group, self.position = group, 0
        self.waiting = self._decoded()

    def _decoded(self) -> pa.Table:
        table = pa.Table.from_batches([next(self.source)])
        if not table.schema.equals(self.schema):
            table = alike(table)
            self.schema = table.schema
        return table

    def _skip(self, rows: int) -> None:
        """Parquet can only be read forwards: rows before the wanted ones are decoded, but not kept."""
        self.position += rows
        while rows > self.waiting.num_rows:
            rows -= self.waiting.num_rows
            self.waiting = self._decoded()
        self.waiting = self.waiting.slice(rows)

    def _next(self, rows: int) -> pa.Table:
        parts, missing = [], rows
        while missing > self.waiting.num_rows:
            parts.append(self.waiting)
            missing -= self.waiting.num_rows
            self.waiting = self._decoded()
        parts.append(self.waiting.slice(0, missing))
        self.waiting = self.waiting.slice(missing)
        self.position += rows
        return pa.concat_tables(parts)
