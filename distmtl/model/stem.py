"""STEM (Su et al. 2024, "STEM: Unleashing the Power of Embeddings for Multi-task Recommendation").

One layer of the authors' code, github.com/LiangcaiSu/STEM, with ReLU after every layer of an expert and a gate without hidden layers.
Its shared gate would be dead: no task reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmtl.model.experts import Experts, Gate
from distmtl.model.kernels import mix
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class STEM(nn.Module):
    """Embeddings and experts of every task's own, and shared ones. Every task mixes all experts, its gate seeing the sum of its own
    vector and the shared one; other tasks' experts, and so their embeddings, get no gradient from it.

    forward: Features of T+1 vectors → T tensors (B, H)
    """

    def __init__(self, width: int, num_tasks: int, shared: int, own: int, expert: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.output_width, self.shared = expert[-1], num_tasks
        self.owners = [*(t for t in range(num_tasks) for _ in range(own)), *[self.shared] * shared]
        self.experts = Experts(len(self.owners), width, expert, dropout)
        self.gates = nn.ModuleList(Gate(width, len(self.owners)) for _ in range(num_tasks))
        self.cut = Cut([[owner in (t, self.shared) for owner in self.owners] for t in range(num_tasks)])

    def forward(self, features: Features) -> list[Tensor]:
        experts = self.experts([features.vectors[owner] for owner in self.owners])
        weights = [gate(features.vectors[t] + features.x) for t, gate in enumerate(self.gates)]
        out: list[Tensor] = []
        for t, weight in enumerate(weights):
            seen = [f if owner in (t, self.shared) else f.detach() for owner, f in zip(self.owners, experts, strict=True)]
            out += mix(weight, seen)
        return self.cut(out, torch.cat(weights))
