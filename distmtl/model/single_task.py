"""Nothing shared but the embeddings: a network per task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts
from distmtl.model.layout import Features


class SingleTask(nn.Module):
    """forward: Features → T tensors (B, H)"""

    def __init__(self, width: int, num_tasks: int, bottom: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.output_width = bottom[-1]
        self.bottoms = Experts(num_tasks, width, bottom, dropout)

    def forward(self, features: Features) -> list[Tensor]:
        return self.bottoms(features.x)
