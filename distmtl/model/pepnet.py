"""PEPNet (Chang et al. 2023, "PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior Information")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.model.experts import Experts, Scale
from distmtl.model.kernels import linear_relu
from distmtl.model.layout import Features, Layout


class GateNU(nn.Module):
    """2·sigmoid(W₂·ReLU(W₁u + b₁) + b₂) (eq. 1 and 2, γ = 2), of several gates that read the same u: their first layers are one GEMM.

    forward: (B, in) → one (B, width) per width
    """

    def __init__(self, width: int, hidden: int, widths: Sequence[int]):
        super().__init__()
        self.hidden = hidden
        self.first = nn.Linear(width, hidden * len(widths))
        self.scales = nn.ModuleList(Scale(hidden, w) for w in widths)

    def forward(self, u: Tensor) -> list[Tensor]:
        (h,) = linear_relu([u], self.first.weight[None], self.first.bias[None])
        return [scale(part) for scale, part in zip(self.scales, h.split(self.hidden, dim=1), strict=True)]


class PEPNet(nn.Module):
    """EPNet scales the embeddings E by what a row's domain features are, E' = GateNU([domain; sg(E)]) ⊙ E (eq. 3 and 4); then PPNet scales
    every layer of every task's network by user, item …, h ← ReLU(W h + b) ⊙ GateNU([gate features; sg(E')]) (eq. 5 and 6).

    What the gates read of E and E' has no gradient (sg), so they cannot train the embeddings they scale. Dense features are not scaled
    by EPNet, and stand beside E'. A layer is scaled after its ReLU, before dropout. All gates start at exactly 1.

    Args:
        embedded: columns of embeddings, the first ones of a feature vector.

    forward: Features → T tensors (B, tower[-1])
    """

    def __init__(
        self,
        layout: Layout,
        embedded: int,
        domain_features: Sequence[str],
        gate_features: Sequence[str],
        num_tasks: int,
        tower: Sequence[int],
        gate_hidden: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.embedded, self.num_tasks, self.dropout, self.output_width = embedded, num_tasks, dropout, tower[-1]
        self.domain_places, self.gate_places = ([layout.places[f] for f in names] for names in (domain_features, gate_features))
        domain_width, gate_width = (sum(map(layout.dim, names)) for names in (domain_features, gate_features))
        self.epnet = GateNU(domain_width + embedded, gate_hidden, [embedded])
        self.ppnet = GateNU(gate_width + layout.width, gate_hidden, list(tower) * num_tasks)  # task 0's layers, task 1's, …
        self.layers = nn.ModuleList(Experts(num_tasks, into, (out,)) for into, out in zip((layout.width, *tower), tower, strict=False))

    def forward(self, features: Features) -> list[Tensor]:
        x = features.x
        embeddings, others = x.tensor_split([self.embedded], dim=1)
        (scale,) = self.epnet(_beside(x, self.domain_places, embeddings))
        scaled = torch.cat([scale * embeddings, others], dim=1)
        scales = self.ppnet(_beside(x, self.gate_places, scaled))
        hs: Tensor | list[Tensor] = scaled
        for depth, layer in enumerate(self.layers):
            outputs = zip(layer(hs), scales[depth :: len(self.layers)], strict=True)
            hs = [F.dropout(h * s, self.dropout, self.training) for h, s in outputs]
        return list(hs)


def _beside(x: Tensor, places: Sequence[tuple[int, int]], read: Tensor) -> Tensor:
    """What a gate reads: columns of its own features, which it trains, and others, which it does not."""
    return torch.cat([*(x[:, first:last] for first, last in places), read.detach()], dim=1)
