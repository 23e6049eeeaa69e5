"""λ from the Gram matrix of the tasks' gradients."""

from __future__ import annotations

import numpy as np

from distmtl.model.weighting.weighting import Seen, State, Weighting


class PCGrad(Weighting):
    """Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1: vᵢ = gᵢ, and for the others in random order, where
    ⟨vᵢ, gⱼ⟩ < 0, vᵢ -= ⟨vᵢ, gⱼ⟩/‖gⱼ‖²·gⱼ; the update is Σ vᵢ. Every vᵢ stays in the span of the g, so their Gram matrix is enough."""

    surgery = True

    def __init__(self, tasks: int, seed: int):
        super().__init__(tasks)
        self.seed = seed

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        gram, order = seen.gram, np.random.default_rng((self.seed, seen.step))
        assert gram is not None
        coefficients = np.eye(len(gram))  # vᵢ = Σⱼ coefficients[i, j]·gⱼ
        for i, of_task in enumerate(coefficients):
            for j in order.permutation(len(gram)):
                if j != i and (along := of_task @ gram[j]) < 0:
                    of_task[j] -= along / gram[j, j]
        return coefficients.sum(0)
