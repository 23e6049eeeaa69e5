"""Rows: checked rows as arrays, cheap to permute and to cut batches from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.batch import Batch

Part = tuple["Rows", int, int]  # rows first … last-1


@dataclass(frozen=True)
class Ids:
    """Table rows of a feature, one after the other. `lengths`: (n,) int32, how many each row has; None: one each."""

    values: np.ndarray
    lengths: np.ndarray | None

    def __post_init__(self) -> None:
        starts = None if self.lengths is None else np.concatenate([[0], np.cumsum(self.lengths)])
        object.__setattr__(self, "starts", starts)

    starts: np.ndarray | None = None

    def permuted(self, order: np.ndarray) -> Ids:
        if self.lengths is None or self.starts is None:
            return Ids(self.values.take(order), None)
        lengths = self.lengths.take(order)
        ends = np.cumsum(lengths)
        shift = self.starts.take(order) - (ends - lengths)
        return Ids(self.values.take(np.repeat(shift, lengths) + np.arange(len(self.values))), lengths)

    def between(self, first: int, last: int) -> np.ndarray:
        return self.values[first:last] if self.starts is None else self.values[self.starts[first] : self.starts[last]]


@dataclass(frozen=True)
class Rows:
    """n rows in the order in which they will be trained, the fields as in Batch."""

    ids: list[Ids]  # of the embedded features, in config order
    dense: np.ndarray  # (n, width)
    labels: np.ndarray  # (n, T)
    weights: np.ndarray  # (n, T)
    numbers: np.ndarray  # (n,) position in the data set
    replaced: np.ndarray  # (n,) ids outside their table, replaced by policy
    groups: np.ndarray | None
    oracle: np.ndarray | None

    def permuted(self, order: np.ndarray | None) -> Rows:
        if order is None:
            return self
        return replace(
            self,
            ids=[i.permuted(order) for i in self.ids],
            **{f.name: a.take(order, axis=0) for f in fields(self) if isinstance(a := getattr(self, f.name), np.ndarray)},
        )


def batch_of(parts: Sequence[Part], keys: list[str], padded_rows: int, step: int = 0, error: str | None = None) -> Batch:
    """The parts one after the other, at least one, then padding up to `padded_rows`."""
    spans = np.cumsum([0, *(last - first for _, first, last in parts)])
    values = [rows.ids[f].between(first, last) for f in range(len(keys)) for rows, first, last in parts]
    lengths = np.zeros((len(keys), padded_rows), dtype=np.int32)
    lengths[:, : spans[-1]] = 1
    for (rows, first, last), a, b in zip(parts, spans, spans[1:], strict=False):
        for f, ids in enumerate(rows.ids):
            if ids.lengths is not None:
                lengths[f, a:b] = ids.lengths[first:last]

    def whole(name: str, padding: float) -> torch.Tensor | None:
        arrays = [getattr(rows, name) for rows, _, _ in parts]
        if arrays[0] is None:
            return None
        cuts = [array[first:last] for array, (_, first, last) in zip(arrays, parts, strict=True)]
        rest = np.full((padded_rows - spans[-1], *arrays[0].shape[1:]), padding, dtype=arrays[0].dtype)
        return torch.from_numpy(np.concatenate([*cuts, rest]))

    return Batch(
        sparse=KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(np.concatenate(values) if values else np.zeros(0, np.int64)),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            stride=padded_rows,
        ),
        dense=whole("dense", 0),
        labels=whole("labels", 0),
        weights=whole("weights", 0),
        rows=whole("numbers", -1),
        groups=whole("groups", 0),
        oracle=whole("oracle", np.nan),
        step=step,
        replaced_ids=sum(int(rows.replaced[first:last].sum()) for rows, first, last in parts),
        error=error,
    )
