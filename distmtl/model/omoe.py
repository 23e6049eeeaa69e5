"""OMoE (Ma et al. 2018, section 3): experts under a single gate, the same mixture for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts, Gate
from distmtl.model.kernels import mix
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class OMoE(nn.Module):
    """forward: Features → T times the same (B, H)"""

    def __init__(self, width: int, num_tasks: int, num_experts: int, expert: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.num_tasks, self.output_width = num_tasks, expert[-1]
        self.experts = Experts(num_experts, width, expert, dropout)
        self.gate = Gate(width, num_experts)
        self.cut = Cut()

    def forward(self, features: Features) -> list[Tensor]:
        gate = self.gate(features.x)
        return self.cut(mix(gate, self.experts(features.x)), gate) * self.num_tasks
