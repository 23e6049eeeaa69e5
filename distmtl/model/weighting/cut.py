"""Cut: where what the tasks share ends. Their gradients are compared there, and surgery puts another in their place.

A gradient that goes on from here into experts, bottoms and tables is one per row; the Gram matrix over all ranks' rows is the sum of the
ranks' own, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Gradients = list[tuple[Tensor | None, ...]]  # of K losses, at every point


class Cut(nn.Module):
    """The points of a network above which nothing is shared. In training it remembers them, and their gates.

    Where points are mixtures, mₜ = Σₑ gₜₑ·fₑ, what is shared are the experts fₑ: the gradients gₜₑ·∂L/∂mₜ at them are compared, without
    forming them: ⟨gᵢ, gⱼ⟩ = Σ_rows (Σₑ gᵢₑgⱼₑ)·⟨∂Lᵢ/∂mᵢ, ∂Lⱼ/∂mⱼ⟩. The path of a gradient through a gate, a task's own, is left out.

    Args:
        trained: (P, E) whether point p sends a gradient to expert e; default: wherever its gate is not 0.
        columns: of a point that are compared, the first ones; default: all. Those after them are data, with nothing to be trained below.
        seen: (P, E) whether point p's gate weighs expert e at all; default: every gate weighs every expert.

    forward: P points (B, H), gates (P, E, B) or None where the points themselves are shared → the same points
    """

    def __init__(
        self,
        trained: Sequence[Sequence[bool]] | None = None,
        columns: int | None = None,
        seen: Sequence[Sequence[bool]] | None = None,
    ):
        super().__init__()
        self.columns = columns
        self.trained = None if trained is None else torch.tensor(trained)
        self.seen = seen
        self.points: list[Tensor] = []
        self.towers: Sequence[Tensor] = ()
        self.gates: Tensor | None = None  # of the last training step
        self.replacement = Replacement()
        self.compares = True  # or it only shows its gates

    def forward(self, points: Sequence[Tensor], gates: Tensor | None = None) -> list[Tensor]:
        if not (self.training and torch.is_grad_enabled()):
            return list(points)
        self.gates = None if gates is None else gates.detach()
        if not self.compares or not any(p.requires_grad for p in points):
            return list(points)
        self.replacement = Replacement()
        self.points = list(_Point.apply(self.replacement, *points))
        return list(self.points)

    def beside(self, towers: Sequence[Tensor]) -> Tensor:
        """What is computed above the cut side by side, T × (B, o) → (B, O). In training it remembers the parts."""
        if self.points:
            self.towers = towers
        return torch.cat(list(towers), dim=1)

    def gradients(self, losses: Tensor, outputs: Tensor, reads: Sequence[Sequence[int] | None]) -> Gradients:
        """Of K losses, (K,), of what `beside` returned, at every point; None where a loss does not depend on it. Touches neither
        parameters nor tables. On all ranks through the same layers, whatever their rows: below may be collectives.

        Args:
            reads: of every loss, the towers whose outputs it is made of; None: all.
        """
        if not self.points:  # all of them are data
            return [()] * len(losses)
        of_outputs = [torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in losses.unbind()]
        of_towers = [g.split([t.shape[1] for t in self.towers], dim=1) for g in of_outputs]
        found = []
        for g, read in zip(of_towers, reads, strict=True):
            towers, arriving = (of if read is None else [of[t] for t in read] for of in (self.towers, g))
            found.append(torch.autograd.grad(towers, self.points, arriving, retain_graph=True, allow_unused=True))
        self.forget()
        return found

    def forget(self) -> None:
        """Let go of the graph of the step."""
        self.points, self.towers = [], ()

    def gram(self, gradients: Gradients) -> Tensor:
        """(K, K) float64, of this rank's rows."""
        overlap, losses = self._overlap(), range(len(gradients))
        gradients = [tuple(g if g is None else g.float() for g in of_loss) for of_loss in gradients]
        device = next((g.device for of_loss in gradients for g in of_loss if g is not None), None)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        products: dict[tuple[int, int], Tensor] = {}
        for k in losses:
            for other in range(k + 1):
                parts = [
                    _inner(a[:, : self.columns], b[:, : self.columns], None if overlap is None else overlap[i, j])
                    for i, a in enumerate(gradients[k])
                    for j, b in enumerate(gradients[other])
                    if a is not None and b is not None and (i == j or overlap is not None)
                ]
                products[k, other] = products[other, k] = torch.stack(parts).sum() if parts else zero
        return torch.stack([products[k, other] for k in losses for other in losses]).view(len(losses), -1)

    def replace(self, gradients: Gradients, factors: Tensor) -> None:
        """Let Σₖ factorsₖ·gradientsₖ go on from every point, whatever arrives there. Zero factors replace even what is not finite."""
        each = factors.tolist()
        self.replacement.gradients = [
            _sum([f * g for f, g in zip(each, of_point, strict=True) if f and g is not None]) for of_point in zip(*gradients, strict=True)
        ]

    def _overlap(self) -> Tensor | None:
        """(P, P, B): Σₑ gᵢₑ·gⱼₑ."""
        if self.gates is None:
            return None
        gates = self.gates if self.trained is None else self.gates * self.trained[:, :, None].to(self.gates)
        return torch.stack([(gates * of_point).sum(1) for of_point in gates])


class Replacement:
    """The gradient of every point, in place of that of the loss; None: that of the loss. What the graph holds, instead of the cut that
    holds the graph."""

    gradients: list[Tensor | None] | None = None


class _Point(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replacement: Replacement, *points: Tensor) -> tuple[Tensor, ...]:
        ctx.replacement = replacement
        return tuple(p.view_as(p) for p in points)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        others = ctx.replacement.gradients
        if others is None:
            return None, *gradients
        return None, *(torch.zeros_like(g) if other is None else other for g, other in zip(gradients, others, strict=True))


def _sum(tensors: list[Tensor]) -> Tensor | None:
    return reduce(add, tensors) if tensors else None


def _inner(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_rows weights·⟨a, b⟩, float64: (B, H), (B, H), (B,) → ()"""
    rows = torch.linalg.vecdot(a, b)
    return (rows if weights is None else rows * weights).sum(dtype=torch.float64)
