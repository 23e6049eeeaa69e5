"""Shared bottom (Caruana 1997): one network for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts


class SharedBottom(nn.Module):
    """forward: (B, width) → T times the same (B, H)"""

    def __init__(self, width: int, num_tasks: int, bottom: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.num_tasks, self.output_width = num_tasks, bottom[-1]
        self.bottom = Experts(1, width, bottom, dropout)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.bottom(x) * self.num_tasks
