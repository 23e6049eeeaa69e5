"""HoME (Wang et al. 2024, "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.model.experts import Gate, Scale, over_all
from distmtl.model.kernels import linear_relu, mix
from distmtl.model.layout import Features
from distmtl.model.normalisation import PartitionedNorm
from distmtl.model.weighting import Cut


class NormalisedExperts(nn.Module):
    """E networks Swish(BatchNorm(MLP(x))) of one shape: hidden layers with ReLU, the last one linear, its bias the normalisation's.

    forward: E inputs (B, in), real (B,) bool or None → E tensors (B, out)
    """

    def __init__(self, num_experts: int, width: int, layers: Sequence[int], momentum: float):
        super().__init__()
        sizes = list(zip((width, *layers), layers, strict=False))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out, into)) for into, out in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out)) for _, out in sizes[:-1])
        self.norm = PartitionedNorm(num_experts * layers[-1], momentum=momentum)  # all experts in one exchange
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            bound = math.sqrt(6.0 / weight.shape[2])  # as Experts
            nn.init.uniform_(weight, -bound, bound)
        for bias in self.biases:
            nn.init.zeros_(bias)

    def forward(self, xs: Sequence[Tensor], real: Tensor | None) -> list[Tensor]:
        for weight, bias in zip(self.weights, self.biases, strict=False):
            xs = linear_relu(xs, weight, bias)
        last = self.weights[-1]
        outputs = torch.cat([F.linear(x, weight) for x, weight in zip(xs, last, strict=True)], dim=1)
        return list(F.silu(self.norm(outputs, real=real)).chunk(len(last), dim=1))


class FeatureGate(nn.Module):
    """x ⊙ 2·sigmoid(xBA + a) with BA of low rank: what of x a set of experts sees. All of it at the start.

    forward: (B, in) → (B, in)
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.scale = Scale(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(self.down(x))


class Level(nn.Module):
    """Sets of experts, and mixtures of them. A mixture's gate weighs the experts of the sets it sees; its self gate, which it does not
    share, weighs those of its own set once more and is added, so that they cannot be starved: softmax, or sigmoid of a lone expert.

    Args:
        width, gate_width: of the inputs of experts and of gates.
        own: experts of a set.
        sets: how many there are.
        sees: for every mixture the sets that it sees, its own first.

    forward: one input (B, width) per set, one (B, gate_width) per mixture, real (B,) bool or None → one (B, H) per mixture, and its
    weights (1, experts that it sees, B)
    """

    def __init__(
        self,
        width: int,
        gate_width: int,
        own: int,
        expert: Sequence[int],
        rank: int,
        momentum: float,
        sets: int,
        sees: Sequence[Sequence[int]],
    ):
        super().__init__()
        self.own = own
        self.places = [[e for s in seen for e in range(s * own, (s + 1) * own)] for seen in sees]  # experts that a mixture sees
        self.feature_gates = nn.ModuleList(FeatureGate(width, rank) for _ in range(sets))
        self.experts = NormalisedExperts(sets * own, width, expert, momentum)
        self.gates = nn.ModuleList(Gate(gate_width, len(seen) * own) for seen in sees)
        self.self_gates = nn.ModuleList(Gate(gate_width, own) if own > 1 else SigmoidGate(gate_width, own) for _ in sees)

    def forward(self, xs: Sequence[Tensor], us: Sequence[Tensor], real: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        gated = [gate(x) for gate, x in zip(self.feature_gates, xs, strict=True)]
        experts = self.experts([x for x in gated for _ in range(self.own)], real)
        out, weights = [], []
        for places, gate, self_gate, u in zip(self.places, self.gates, self.self_gates, us, strict=True):
            weight = gate(u)
            weights.append(torch.cat([weight[:, : self.own] + self_gate(u), weight[:, self.own :]], dim=1))
            out += mix(weights[-1], [experts[e] for e in places])
        return out, weights


class SigmoidGate(Gate):
    """forward: (B, in) → (1, E, B)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).T[None].sigmoid()


class HoME(nn.Module):
    """Two levels. The first has experts of every group of tasks and shared ones; it mixes zᵍ for a group, of its own and the shared
    ones, and zˢ, of all. The second has experts of every task and group, reading zᵍ, and shared ones, reading zˢ; a task mixes its
    own, its group's and the shared ones. Gates of the first level read the feature vector, of the second zᵍ ⊕ zˢ.

    Unlike the paper's, a feature gate is one product of low rank with a bias and not a weighted sum of several, it belongs to a set of
    experts (a task's, a group's, the shared ones) and not to each, and all sets and levels have experts of the same number and shape.

    Args:
        groups: tasks that resemble each other; every task is in one.
        own: experts of every task, of every group, and shared.

    forward: Features → T tensors (B, expert[-1])
    """

    def __init__(self, width: int, groups: Sequence[Sequence[int]], own: int, expert: Sequence[int], rank: int, momentum: float = 0.01):
        super().__init__()
        out = self.output_width = expert[-1]
        self.group_of = [g for _, g in sorted((t, g) for g, group in enumerate(groups) for t in group)]
        n, tasks = len(groups), len(self.group_of)
        groups_see = [[g, n] for g in range(n)]
        self.meta = Level(width, width, own, expert, rank, momentum, n + 1, [*groups_see, [n, *range(n)]])
        tasks_see = [[t, tasks + g, tasks + n] for t, g in enumerate(self.group_of)]
        self.tasks = Level(out, 2 * out, own, expert, rank, momentum, tasks + n + 1, tasks_see)
        self.num_experts = own * (tasks + n + 1)  # of the second level
        self.cut = Cut(seen=[[e in seen for e in range(self.num_experts)] for seen in self.tasks.places])

    def forward(self, features: Features) -> list[Tensor]:
        sets = len(self.meta.places)
        (*groups, shared), _ = self.meta([features.x] * sets, [features.x] * sets, features.real)
        of_tasks = [groups[g] for g in self.group_of]
        beside = [torch.cat([z, shared], dim=1) for z in groups]
        out, weights = self.tasks([*of_tasks, *groups, shared], [beside[g] for g in self.group_of], features.real)
        return self.cut(out, over_all(weights, self.tasks.places, self.num_experts) if self.training else None)
