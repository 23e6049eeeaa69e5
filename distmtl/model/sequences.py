"""Lists of embeddings → one vector per row: sums, additive attention, DIN's attention to a target.

Everything works on the N ids of a batch laid end to end, B `lengths` saying whose they are: no padding, no loop over rows. A table
holds C copies of an embedding (Config.copies); each is pooled by itself, with the same weights.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import JaggedTensor

from distmtl.config import Config, SequenceFeature
from distmtl.model.kernels import segment_sum, spread


class SequencePooling(nn.Module):
    """The features whose tables give every id's embedding (Config.sequence_tables), pooled. Empty lists give zeros.

    `mean` is a sum here, as in TorchRec's bags: FeatureVector divides. float32 in either precision.

    forward: for every collection of tables, feature → its ids' (N, dim x C) → feature → (B, dim x C)
    """

    def __init__(self, config: Config):
        super().__init__()
        self.copies = config.copies
        self.hashes = {f.name: f.hashes for f in config.sequences}
        self.weighed = {f.name: f.target for f in config.sequences if f.pooling in ("attention", "target")}
        self.units = nn.ModuleDict({_key(f.name): _unit(f) for f in config.sequences if f.name in self.weighed})

    def forward(self, collections: list[dict[str, JaggedTensor]]) -> dict[str, Tensor]:
        jagged = {name: ids for collection in collections for name, ids in collection.items()}
        pooled = {name: segment_sum(ids.values(), ids.lengths()) for name, ids in jagged.items() if name not in self.weighed}
        for name, target in self.weighed.items():
            x, lengths, hashes = self._by_copy(jagged[name].values()), jagged[name].lengths(), self.hashes[name]
            if hashes > 1:  # an id's embedding is the sum of its rows
                x, lengths = x.view(-1, hashes, *x.shape[1:]).sum(1), lengths // hashes
            others = [self._by_copy(pooled[target])] if target else []
            pooled[name] = self.units[_key(name)](x, lengths, *others).flatten(1)
        return pooled

    def _by_copy(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.copies, -1))


def _key(feature: str) -> str:
    """Not the bare name, which may be one of nn.ModuleDict's own attributes."""
    return f"{feature}_pooling"


def _unit(feature: SequenceFeature) -> nn.Module:
    return TargetAttention(feature.dim, feature.attention) if feature.pooling == "target" else Attention(feature.dim)


class Attention(nn.Module):
    """Additive attention: Σᵢ softmaxᵢ(q·tanh(W·eᵢ))·eᵢ over a row's ids (Yang et al. 2016, "Hierarchical Attention Networks", eq. 5-7).

    forward: (N, C, D), lengths (B,) → (B, C, D)
    """

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim, bias=False)
        self.query = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        scores = self.query(torch.tanh(self.hidden(x)))
        largest = torch.segment_reduce(scores.detach(), "max", lengths=lengths, unsafe=True)
        weights = (scores - spread(largest, lengths, x.shape[0])).exp()
        return segment_sum(weights * x, lengths) / segment_sum(weights, lengths).clamp(min=1)  # the largest is 1: less is an empty list


class TargetAttention(nn.Module):
    """DIN's local activation unit: Σᵢ a(eᵢ, t)·eᵢ with a = MLP(eᵢ, t, eᵢ - t, eᵢ ⊙ t), PReLU between its layers (Zhou et al. 2018,
    "Deep Interest Network", eq. 3). No softmax, as in the paper: the sum of the weights tells how strong the interest is.

    forward: (N, C, D), lengths (B,), targets (B, C, D) → (B, C, D)
    """

    def __init__(self, dim: int, widths: tuple[int, ...]):
        super().__init__()
        sizes = (4 * dim, *widths, 1)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.activations = nn.ModuleList(nn.PReLU() for _ in widths)

    def forward(self, x: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        # The first layer, linear in its four inputs: what only the target decides is computed once per row.
        of_id, of_target, of_difference, of_product = self.layers[0].weight.chunk(4, dim=1)
        a = F.linear(x, of_id + of_difference) + F.linear(x * spread(targets, lengths, x.shape[0]), of_product)
        a = a + spread(F.linear(targets, of_target - of_difference, self.layers[0].bias), lengths, x.shape[0])
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            a = layer(activation(a))
        return segment_sum(a * x, lengths)
