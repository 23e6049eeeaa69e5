"""Embedded and dense features → one feature vector per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import BucketFeature, Config, IdFeature
from distmtl.model.kernels import Run, side_by_side


def embedding_tables(config: Config) -> EmbeddingBagCollection | None:
    """The tables on "meta": no memory until they are sharded. Pooling is SUM here, MEAN is FeatureVector's division
    (TorchRec's own is wrong in plans that mix sharding types). None when no feature reads a table."""
    readers: dict[str, list[IdFeature | BucketFeature]] = {}
    for feature in config.embedded:
        readers.setdefault(feature.table_name, []).append(feature)
    if not readers:
        return None
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=features[0].rows,
            embedding_dim=features[0].dim,
            feature_names=[f.name for f in features],
            pooling=PoolingType.SUM,
            init_fn=leave,
        )
        for name, features in readers.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def leave(weights: Tensor) -> Tensor:
    """Not drawn by TorchRec: `initialise_tables` does."""
    return weights


class FeatureVector(nn.Module):
    """Pooled embeddings and dense features side by side, in config order whatever the sharding plan.

    forward: pooled (B, sum of dims), ids of the same features, dense (B, dense width) → (B, width), in the precision of the head
    """

    def __init__(self, config: Config):
        super().__init__()
        self.keys = [f.name for f in config.embedded]
        self.dims = [f.dim for f in config.embedded]
        self.mean = [i for i, f in enumerate(config.embedded) if f.pooling == "mean"]
        self.width = sum(self.dims) + sum(f.width for f in config.dense)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None

    def forward(self, pooled: KeyedTensor, ids: KeyedJaggedTensor, dense: Tensor) -> Tensor:
        scales = None
        if self.mean:
            scales = 1.0 / ids.lengths().view(len(self.keys), -1)[self.mean].clamp(min=1)
        return side_by_side(pooled.values(), self._runs(pooled), scales, dense, self.dtype)

    def _runs(self, pooled: KeyedTensor) -> list[Run]:
        """The columns of `pooled` in config order, neighbours there that are neighbours here taken together."""
        starts, start = {}, 0
        for key, dim in zip(pooled.keys(), pooled.length_per_key(), strict=True):
            starts[key], start = start, start + dim
        runs: list[Run] = []
        for i, (key, dim) in enumerate(zip(self.keys, self.dims, strict=True)):
            scale = self.mean.index(i) if i in self.mean else None
            if runs and scale is None and runs[-1].scale is None and runs[-1].first + runs[-1].width == starts[key]:
                runs[-1] = Run(runs[-1].first, runs[-1].width + dim)
            else:
                runs.append(Run(starts[key], dim, scale))
        return runs
