"""λ from the norms of the tasks' gradients."""

from __future__ import annotations

import numpy as np

from distmtl.model.weighting.adam import descend, moments
from distmtl.model.weighting.by_loss import TINY
from distmtl.model.weighting.weighting import Seen, State, Weighting

LEAST = 1e-3  # λ: below 0 a task would be unlearnt


class GradNorm(Weighting):
    """Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing", eq. 1 and 2: with Gᵢ = λᵢ·‖gᵢ‖ at the cut, and
    Lᵢ relative to the task's first loss, rᵢ = (Lᵢ/Lᵢ(0))/mean(L/L(0)), λ takes Adam's step against Σ|Gᵢ - mean(G)·rᵢ^α|, in which the
    target is a constant, and is scaled to the sum it had: T over all tasks, none below 0.001 before that."""

    least = 1

    def __init__(self, tasks: int, alpha: float, lr: float):
        super().__init__(tasks, weights=np.ones(tasks), first=np.zeros(tasks), **moments(tasks))
        self.alpha, self.lr = alpha, lr

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        assert seen.gram is not None
        tasks, losses, norms = seen.tasks, np.maximum(seen.losses, TINY), np.sqrt(np.diag(seen.gram))
        first, of_all = state["first"], state["weights"]
        first[tasks] = np.where(first[tasks] > 0, first[tasks], losses)
        weights, relative = of_all[tasks], losses / first[tasks]
        scaled = weights * norms
        target = scaled.mean() * (relative / relative.mean()) ** self.alpha
        descend(state, "weights", tasks, np.sign(scaled - target) * norms, self.lr)
        moved = np.maximum(of_all[tasks], LEAST)
        of_all[tasks] = moved * weights.sum() / moved.sum()
        return weights
