"""Embedded and dense features → the feature vectors of every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedTensor,
    PoolingType,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import Config, VectorFeature
from distmtl.model.guard import Guard
from distmtl.model.kernels import Run, side_by_side
from distmtl.model.layout import Features


def embedding_tables(config: Config) -> EmbeddingBagCollection | None:
    """The tables of bags on "meta": no memory until they are sharded. Pooling is SUM here, MEAN is FeatureVector's division
    (TorchRec's own is wrong in plans that mix sharding types). None when no feature reads such a table."""
    tables = [
        EmbeddingBagConfig(**table, pooling=PoolingType.SUM) for table in _described(config) if table["name"] not in config.sequence_tables
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta")) if tables else None


def sequence_tables(config: Config) -> nn.ModuleDict:
    """The tables that give every id's embedding, on "meta": a collection per width, since TorchRec's have one width each."""
    widths: dict[int, list[EmbeddingConfig]] = {}
    for table in _described(config):
        if table["name"] in config.sequence_tables:
            widths.setdefault(table["embedding_dim"], []).append(EmbeddingConfig(**table))
    return nn.ModuleDict({str(w): EmbeddingCollection(tables=tables, device=torch.device("meta")) for w, tables in widths.items()})


def _described(config: Config) -> list[dict[str, Any]]:
    """What TorchRec wants to know of every table."""
    readers: dict[str, list[str]] = {}
    for feature in config.embedded:
        readers.setdefault(feature.table_name, []).append(feature.name)
    return [
        {"name": name, "num_embeddings": rows, "embedding_dim": width, "feature_names": readers[name], "init_fn": leave}
        for name, (rows, width) in config.tables_read.items()
    ]


def leave(weights: Tensor) -> Tensor:
    """Not drawn by TorchRec: `initialise_tables` does."""
    return weights


class DenseColumns(nn.Module):
    """Dense features as a head sees them: vectors with `project` through a linear layer of their own, the others as they are.

    forward: (B, sum of widths) → (B, sum of columns), float32
    """

    def __init__(self, config: Config):
        super().__init__()
        self.keys = [f"of_{f.name}" for f in config.dense]  # what a module dictionary may hold, whatever the feature's name
        self.widths = [f.width for f in config.dense]
        projected = [f for f in config.dense if isinstance(f, VectorFeature) and f.project]
        self.linear = nn.ModuleDict({f"of_{f.name}": nn.Linear(f.width, f.columns) for f in projected})

    def forward(self, dense: Tensor) -> Tensor:
        if not self.linear:
            return dense
        parts = zip(self.keys, dense.split(self.widths, dim=1), strict=True)
        return torch.cat([self.linear[key](part) if key in self.linear else part for key, part in parts], dim=1)


class FeatureVector(nn.Module):
    """Pooled embeddings and dense features side by side, in config order whatever the sharding plan (layout.Layout).

    A table is `config.copies` times as wide as its features' dim: with STEM, columns of task 0, of task 1, …, shared ones.

    forward: pooled bags (B, sum of dims x copies), pooled sequences, each (B, dim x copies), ids of both in config order,
    dense (B, dense width), domain (B,), weights (B, T) → Features
    whose vectors, one per copy, are in the precision of the head
    """

    def __init__(self, config: Config):
        super().__init__()
        self.keys = [f.name for f in config.embedded]
        self.dims = [f.dim for f in config.embedded]
        self.copies = config.copies
        self.mean = [i for i, f in enumerate(config.embedded) if f.pooling == "mean"]
        self.register_buffer("divided", torch.tensor(self.mean, dtype=torch.int64), persistent=False)
        self.divided: Tensor
        self.dense = DenseColumns(config)
        self.guard = Guard()
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None  # that of the dense features

    def forward(
        self,
        pooled: KeyedTensor,
        sequences: dict[str, Tensor],
        ids: KeyedJaggedTensor | JaggedTensor,
        dense: Tensor,
        domain: Tensor | None,
        weights: Tensor,
    ) -> Features:
        scales = None
        if self.mean:
            scales = 1.0 / ids.lengths().view(len(self.keys), -1).index_select(0, self.divided).clamp(min=1)
        values, widths = pooled.values(), dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
        if sequences:
            values = torch.cat([*([values] if widths else []), *sequences.values()], dim=1)
            widths |= {key: vector.shape[1] for key, vector in sequences.items()}
        starts, start = {}, 0
        for key, width in widths.items():
            starts[key], start = start, start + width
        blocks = [self._runs(starts, copy) for copy in range(self.copies)]
        return Features(side_by_side(self.guard(values), blocks, scales, self.dense(dense), self.dtype), domain, (weights > 0).any(1))

    def _runs(self, starts: dict[str, int], copy: int) -> list[Run]:
        """The columns of a copy in config order, neighbours in `pooled` that are neighbours here taken together."""
        runs: list[Run] = []
        for i, (key, dim) in enumerate(zip(self.keys, self.dims, strict=True)):
            scale, first = self.mean.index(i) if i in self.mean else None, starts[key] + copy * dim
            if runs and scale is None and runs[-1].scale is None and runs[-1].first + runs[-1].width == first:
                runs[-1] = Run(runs[-1].first, runs[-1].width + dim)
            else:
                runs.append(Run(first, dim, scale))
        return runs
