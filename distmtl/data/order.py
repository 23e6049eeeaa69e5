"""Which row is trained when: a function of (data set, seed, epoch, step), never of the number of workers.

An epoch lays the row groups end to end, shuffled, and cuts them into `num_streams` equal streams. A step takes the next
`rows_per_step` rows of every stream. Within windows of a stream, rows are permuted. Every permutation is drawn from its own
key, so any position is computed, not replayed. (Anchor: the elastic determinism of MosaicML Streaming.)
"""

from __future__ import annotations

import math

import numpy as np


class EpochOrder:
    """The order of one epoch.

    Args:
        group_rows: (G,) rows of every row group.
        key: numbers that seed the epoch, such as (seed, epoch); None keeps the order of the files.
        rows_per_step: rows that a step takes from every stream.
    """

    def __init__(self, group_rows: np.ndarray, key: tuple[int, ...] | None, num_streams: int, window: int, rows_per_step: int):
        self.key, self.window, self.rows_per_step = key, window, rows_per_step
        shuffled = np.arange(len(group_rows)) if key is None else np.random.default_rng(key).permutation(len(group_rows))
        self.groups = shuffled
        self.starts = np.concatenate([[0], np.cumsum(group_rows[shuffled])])  # where each shuffled row group begins in the epoch
        rows = int(self.starts[-1])
        self.bounds = np.array([rows * s // num_streams for s in range(num_streams + 1)])

    def stream_rows(self, stream: int) -> int:
        return int(self.bounds[stream + 1] - self.bounds[stream])

    def positions_of(self, step: int) -> tuple[int, int]:
        """First and last (excluded) position that the epoch's step `step` takes of every stream that is long enough."""
        return step * self.rows_per_step, (step + 1) * self.rows_per_step

    def steps_of(self, first: int, last: int) -> range:
        """The steps that take positions first … last-1."""
        return range(first // self.rows_per_step, -(-last // self.rows_per_step))

    def window_of(self, stream: int, index: int) -> tuple[int, int, np.ndarray]:
        """A stream's window: its first and last (excluded) row in the stream, and its permutation."""
        rows = self.stream_rows(stream)
        first, last = min(index * self.window, rows), min((index + 1) * self.window, rows)
        if self.key is None:
            return first, last, np.arange(last - first)
        return first, last, np.random.default_rng((*self.key, stream, index)).permutation(last - first)

    def pieces(self, stream: int, first: int, last: int) -> list[tuple[int, int, int]]:
        """Rows first … last-1 of a stream as (row group, first, last) within row groups."""
        out, a, b = [], int(self.bounds[stream]) + first, int(self.bounds[stream]) + last
        i = int(np.searchsorted(self.starts, a, "right")) - 1
        while a < b:
            end = min(b, int(self.starts[i + 1]))
            if end > a:
                out.append((int(self.groups[i]), a - int(self.starts[i]), end - int(self.starts[i])))
            a, i = end, i + 1
        return out


def steps_per_epoch(rows: int, num_streams: int, rows_per_step: int) -> int:
    """Steps until the longest stream is used up."""
    longest = math.ceil(rows / num_streams)
    return math.ceil(longest / rows_per_step)


def streams_of(rank: int, world_size: int, num_streams: int) -> range:
    """The contiguous streams that a rank owns."""
    return range(rank * num_streams // world_size, (rank + 1) * num_streams // world_size)
