"""Shared bottom (Caruana 1997): one network for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class SharedBottom(nn.Module):
    """forward: Features → T times the same (B, H)"""

    def __init__(self, width: int, num_tasks: int, bottom: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.num_tasks, self.output_width = num_tasks, bottom[-1]
        self.bottom = Experts(1, width, bottom, dropout)
        self.cut = Cut()

    def forward(self, features: Features) -> list[Tensor]:
        return self.cut(self.bottom(features.x)) * self.num_tasks
