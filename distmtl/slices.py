"""Slices of a data set by the id that a row has of a feature: how often training saw it, or which one it is.

    user_id          0, 1-4, 5-49 and 50+ times in the training split
    item_id:1,10     0, 1-9, 10+
    domain=          every value, of a table of at most MAX_VALUES rows; of a bucket feature every bucket

What counts is the row of the table: ids that are hashed to one row count together, as they are trained, and an id of several rows as the
rarest of them (a count-min sketch, Cormode and Muthukrishnan 2005: never too few). Rows whose id is read from the row of unknown or missing
ids, and rows without one, are slices of their own, `oov` and `missing`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distmtl.batch import Batch
from distmtl.config import BucketFeature, Config, IdFeature, MMoEConfig
from distmtl.config.base import did_you_mean
from distmtl.data.collate import Collator, is_list
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.reader import decoding_threads, every_row
from distmtl.distributed.process import Process, gather_texts, on_first_rank
from distmtl.errors import DistmtlError

TIMES = ":1,5,50"
MAX_VALUES = 128


@dataclass(frozen=True)
class Slices:
    """Of one feature: their names, the last for rows without an id, and which of them every row of its table is in."""

    feature: str
    names: tuple[str, ...]
    of_row: Tensor  # (table's rows,) int64

    def __call__(self, batch: Batch) -> Tensor:
        """(B,) places among the names."""
        bag = batch.sparse[self.feature]
        of_rows, lengths = self.of_row[bag.values().cpu()].double(), bag.lengths().cpu()
        return torch.segment_reduce(of_rows, "min", lengths=lengths, initial=len(self.names) - 1).long()  # of an id's hashes the rarest


def make_slices(wanted: Sequence[str], dataset: Dataset, config: Config, process: Process) -> list[Slices]:
    """Parse them, and count the training split's ids where they ask for it, every rank its share. All ranks call it and get the same.

    Raises:
        DistmtlError: no such feature, one that has lists or too many values, edges that do not increase, no training split to count in.
    """
    features = {f.name: f for f in config.embedded if isinstance(f, IdFeature | BucketFeature)}
    out: list[Slices] = []
    for text in wanted:
        name = re.split("[:=]", text)[0]
        feature, how = features.get(name), text.removeprefix(name)
        if feature is None:
            raise DistmtlError(f"slices {text!r}: {name!r} is no id or bucket feature{did_you_mean(name, features)}")
        if name in [s.feature for s in out]:
            raise DistmtlError(f"slices {text!r}: {name} is there twice; once is enough")
        _one_each(feature, dataset)
        if how == "=":
            out.append(_by_value(feature))
        elif isinstance(feature, BucketFeature):
            raise DistmtlError(f"slices {text!r}: {name} is a bucket feature, sliced by its buckets; write {name}=")
        else:
            edges = _edges(text, how or TIMES)
            counts = _times_seen(feature, config, process, edges[-1])
            out.append(_named(feature, _ranges(edges), np.searchsorted(edges, counts[: feature.rows], side="right")))
    return out


def _one_each(feature: IdFeature | BucketFeature, dataset: Dataset) -> None:
    if is_list(dataset.open_part(0).schema_arrow.field(feature.source).type):
        raise DistmtlError(
            f"slices {feature.name!r}: column {feature.source!r} of {dataset.path} holds lists, and a row of several ids is in no one "
            "slice; slice by a feature of one id per row"
        )


def _edges(text: str, how: str) -> tuple[int, ...]:
    edges = tuple(map(int, how[1:].split(","))) if re.fullmatch(r":\d+(,\d+)*", how) else (0,)
    if any(a >= b for a, b in pairwise((0, *edges))):
        raise DistmtlError(f"slices {text!r}: write FEATURE, FEATURE:1,5,50 with increasing numbers above 0, or FEATURE= for its values")
    return edges


def _ranges(edges: tuple[int, ...]) -> list[str]:
    """1, 5, 50 → 0, 1-4, 5-49, 50+"""
    closed = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise((0, *edges))]
    return [*closed, f"{edges[-1]}+"]


def _by_value(feature: IdFeature | BucketFeature) -> Slices:
    if isinstance(feature, IdFeature) and feature.hashes > 1:
        raise DistmtlError(
            f"slices {feature.name}=: its ids read {feature.hashes} rows each, and no row is one value's; write {feature.name} for how "
            "often training saw its ids"
        )
    if feature.rows > MAX_VALUES:
        raise DistmtlError(
            f"slices {feature.name}=: its table has {feature.rows:,} rows, and by value at most {MAX_VALUES} can be told apart; "
            f"write {feature.name} for how often training saw its ids"
        )
    if isinstance(feature, BucketFeature):
        first, *_, last = edges = feature.boundaries
        buckets = [f"< {first:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges)), f">= {last:g}"]
        return Slices(feature.name, (*buckets, "missing"), torch.tensor([len(buckets), *range(len(buckets))]))
    return _named(feature, [str(i) for i in range(feature.rows)], np.arange(feature.rows))


def _named(feature: IdFeature, names: list[str], of_ids: np.ndarray) -> Slices:
    """With those of the table's extra rows, and of rows without an id."""
    names = list(dict.fromkeys([*names, *feature.extra_rows, "missing"]))
    extra = [names.index(e) for e in feature.extra_rows]
    return Slices(feature.name, tuple(names), torch.from_numpy(np.concatenate([of_ids, np.array(extra, np.int64)])))


def _times_seen(feature: IdFeature, config: Config, process: Process, most: int) -> np.ndarray:
    """(table's rows,) how often the training split has each, counted up to `most` by every rank: one pass over the column alone."""
    dataset = on_first_rank(process, lambda: _training_split(feature, config))
    data = config.data.model_copy(update={"group": None, "weight": None})
    alone = config.model_copy(update={"features": (feature,), "tasks": (), "data": data, "model": MMoEConfig()})
    reader = every_row(
        dataset, Collator(alone, locate=dataset.locate), alone, process.rank, process.world_size, decoding_threads(config, process.device)
    )
    counts, error = torch.zeros(feature.table_rows, dtype=torch.int32), None
    for batch in reader.batches(0, reader.steps_per_epoch):
        rows, times = batch.sparse.values().unique(return_counts=True)
        counts[rows] = (counts[rows] + times).clamp(max=most).int()
        error = batch.error
    if errors := gather_texts(process, error):
        raise DistmtlError("\n".join(errors))
    if process.world_size > 1:
        counts = counts.to(process.device)
        dist.all_reduce(counts)
    return counts.cpu().numpy()


def _training_split(feature: IdFeature, config: Config) -> Dataset:
    try:
        dataset = open_dataset(config.data.train)
        if feature.source not in dataset.columns:
            raise DistmtlError(f"data path {dataset.path}: it has no column {feature.source!r}")
        _one_each(feature, dataset)
    except DistmtlError as e:
        raise DistmtlError(
            f"slices {feature.name!r} count the ids of the training split, data.train of the run: {e}; bring it back, or slice by value "
            f"({feature.name}=)"
        ) from None
    return dataset
