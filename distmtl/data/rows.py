"""Rows: checked rows as arrays, cheap to cut batches from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.batch import Batch

Part = tuple["Rows", int, int]  # rows first … last-1


@dataclass(frozen=True)
class Bag:
    """Table rows of a feature of which a row has any number: row i has values[starts[i] : starts[i+1]], lengths[i] of them."""

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray, order: np.ndarray | None) -> Bag:
        """From (n,) lengths, then permuted."""
        lengths = lengths.astype(np.int32, copy=False)
        if order is not None:
            found = (torch.from_numpy(x) for x in (order.astype(np.int32), lengths, np.ascontiguousarray(values)))
            permuted, gathered, _ = torch.ops.fbgemm.permute_1D_sparse_data(*found, None, len(values))
            lengths, values = permuted.numpy(), gathered.numpy()
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), lengths)


@dataclass(frozen=True)
class Rows:
    """n rows in the order in which they will be trained, the fields as in Batch.

    Features that have exactly one id in each of these rows lie side by side in `single`, the others, by position, in `bags`.
    """

    single: np.ndarray  # (features, n); nothing is written where a feature has a bag
    bags: dict[int, Bag]
    dense: np.ndarray  # (n, width)
    labels: np.ndarray  # (n, T)
    weights: np.ndarray  # (n, T)
    numbers: np.ndarray  # (n,) position in the data set
    replaced: np.ndarray  # (n,) ids outside their table, replaced by policy
    contradicting: np.ndarray  # (n,) labels left out because an earlier task's contradicts them
    groups: np.ndarray | None
    oracle: np.ndarray | None
    extras: np.ndarray | None
    domain: np.ndarray | None


def batch_of(parts: Sequence[Part], keys: list[str], padded_rows: int, step: int = 0, error: str | None = None) -> Batch:
    """The parts one after the other, at least one, then padding up to `padded_rows`."""
    spans = np.cumsum([0, *(last - first for _, first, last in parts)])
    lengths = np.zeros((len(keys), padded_rows), dtype=np.int32)
    lengths[:, : spans[-1]] = 1
    values: list[np.ndarray] = []
    bags = sorted({f for rows, _, _ in parts for f in rows.bags})
    for f, next_bag in zip([-1, *bags], [*bags, len(keys)], strict=True):
        if f >= 0:
            for (rows, first, last), a, b in zip(parts, spans, spans[1:], strict=False):
                if bag := rows.bags.get(f):
                    lengths[f, a:b] = bag.lengths[first:last]
                    values.append(bag.values[bag.starts[first] : bag.starts[last]])
                else:
                    values.append(rows.single[f, first:last])
        if next_bag > f + 1:  # the features up to the next bag, at once
            blocks = (rows.single[f + 1 : next_bag, first:last] for rows, first, last in parts)
            values.append(np.concatenate(list(blocks), axis=1).reshape(-1))

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
        extras=whole("extras", 0),
        domain=whole("domain", 0),
        step=step,
        replaced_ids=sum(int(rows.replaced[first:last].sum()) for rows, first, last in parts),
        contradictions=sum(int(rows.contradicting[first:last].sum()) for rows, first, last in parts),
        error=error,
    )
