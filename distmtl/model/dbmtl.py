"""DBMTL (Wang et al. 2019, "Deep Bayesian Multi-Target Learning for Recommender Systems")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distmtl.model.experts import Experts
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class DBMTL(nn.Module):
    """r_t = relation_t(task_t(bottom(x)), r of its parents): P(task | x, its parents) through what is known of them, not their labels.

    forward: Features → T tensors (B, H)

    Args:
        descent: places of every task's parents, parents before their children.
        detach_parents: no gradient of a task into its parents' networks.
    """

    def __init__(
        self,
        width: int,
        descent: Mapping[int, Sequence[int]],
        bottom: Sequence[int],
        task: Sequence[int],
        relation: Sequence[int],
        detach_parents: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.descent, self.detach_parents, self.output_width = descent, detach_parents, relation[-1]
        self.bottom = Experts(1, width, bottom, dropout)
        self.cut = Cut()
        self.tasks = Experts(len(descent), bottom[-1], task, dropout)
        self.relations = nn.ModuleList(
            Experts(1, task[-1] + len(descent[t]) * relation[-1], relation, dropout) for t in range(len(descent))
        )

    def forward(self, features: Features) -> list[Tensor]:
        r = self.tasks(*self.cut(self.bottom(features.x)))
        for t, parents in self.descent.items():
            passed = [r[p].detach() if self.detach_parents else r[p] for p in parents]
            (r[t],) = self.relations[t](torch.cat([r[t], *passed], dim=1))
        return r
