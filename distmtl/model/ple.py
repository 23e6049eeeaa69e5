"""PLE and its single level, CGC (Tang et al. 2020, "Progressive Layered Extraction")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distmtl.model.experts import Experts, Gate, over_all
from distmtl.model.kernels import mix
from distmtl.model.layout import Features
from distmtl.model.weighting import Cut


class CGC(nn.Module):
    """One level. A task's gate sees its own input and mixes its own and the shared experts; the shared gate, absent in the
    last level, sees the shared input and mixes them all.

    forward: T+1 inputs (B, in), the shared one last → T (last level) or T+1 outputs (B, H)
    """

    def __init__(self, width: int, num_tasks: int, shared: int, own: int, expert: Sequence[int], dropout: float, last: bool):
        super().__init__()
        self.num_tasks, self.shared, self.own = num_tasks, shared, own
        self.experts = Experts(num_tasks * own + shared, width, expert, dropout)  # task 0's, task 1's, …, shared
        split = num_tasks * own
        self.places = [[*range(t * own, (t + 1) * own), *range(split, split + shared)] for t in range(num_tasks)]  # that a task mixes
        self.gates = nn.ModuleList(Gate(width, own + shared) for _ in range(num_tasks))
        self.shared_gate = None if last else Gate(width, num_tasks * own + shared)
        self.cut = Cut(seen=[[e in seen for e in range(split + shared)] for seen in self.places]) if last else None

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        split = self.num_tasks * self.own
        experts = self.experts([x[t] for t in range(self.num_tasks) for _ in range(self.own)] + [x[-1]] * self.shared)
        shared = experts[split:]
        own = (experts[t * self.own : (t + 1) * self.own] for t in range(self.num_tasks))
        weights = [gate(x[t]) for t, gate in enumerate(self.gates)]
        out = [mix(weight, mine + shared)[0] for weight, mine in zip(weights, own, strict=True)]
        if self.cut is not None:
            return self.cut(out, over_all(weights, self.places, len(experts)) if self.training else None)
        assert self.shared_gate is not None
        return [*out, *mix(self.shared_gate(x[-1]), experts)]


class PLE(nn.Module):
    """Levels of CGC; the first one's inputs are all the feature vector.

    forward: Features → T tensors (B, H)
    """

    def __init__(
        self,
        width: int,
        num_tasks: int,
        num_levels: int,
        shared_experts: int,
        task_experts: int,
        expert: Sequence[int],
        dropout: float = 0.0,
    ):
        super().__init__()
        self.output_width = expert[-1]
        self.levels = nn.ModuleList(
            CGC(width if level == 0 else expert[-1], num_tasks, shared_experts, task_experts, expert, dropout, last=level == num_levels - 1)
            for level in range(num_levels)
        )
        self.num_tasks, self.cut = num_tasks, self.levels[-1].cut

    def forward(self, features: Features) -> list[Tensor]:
        xs = [features.x] * (self.num_tasks + 1)
        for level in self.levels:
            xs = level(xs)
        return xs
