"""Embedded and dense features → one feature vector per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import BucketFeature, Config, IdFeature


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
        )
        for name, features in readers.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


class FeatureVector(nn.Module):
    """Pooled embeddings and dense features side by side, in config order whatever the sharding plan.

    forward: pooled (B, sum of dims), ids of the same features, dense (B, dense width) → (B, width)
    """

    def __init__(self, config: Config):
        super().__init__()
        self.keys = [f.name for f in config.embedded]
        self.mean = [i for i, f in enumerate(config.embedded) if f.pooling == "mean"]
        self.width = sum(f.dim for f in config.embedded) + sum(f.width for f in config.dense)

    def forward(self, pooled: KeyedTensor, ids: KeyedJaggedTensor, dense: Tensor) -> Tensor:
        columns = pooled.to_dict()
        parts = [columns[key] for key in self.keys]
        if self.mean:
            lengths = ids.lengths().view(len(self.keys), -1)
            for i in self.mean:
                parts[i] = parts[i] / lengths[i].clamp(min=1).unsqueeze(1)
        return torch.cat([*parts, dense], dim=1)
