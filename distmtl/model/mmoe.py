"""MMoE (Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts, Gate, gates
from distmtl.model.kernels import mix
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class MMoE(nn.Module):
    """Task t gets Σₑ gₜₑ(x)·fₑ(x), g = softmax(Wₜx + bₜ).

    forward: Features → T tensors (B, H)
    """

    def __init__(self, width: int, num_tasks: int, num_experts: int, expert: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.output_width = expert[-1]
        self.experts = Experts(num_experts, width, expert, dropout)
        self.gates = nn.ModuleList(Gate(width, num_experts) for _ in range(num_tasks))
        self.cut = Cut()

    def forward(self, features: Features) -> list[Tensor]:
        weights = gates(self.gates, features.x)
        return self.cut(mix(weights, self.experts(features.x)), weights)
