"""λ from the Gram matrix M of the tasks' gradients gᵢ, for the gradient Σ λᵢ·gᵢ below the cut. T is the number of tasks in the step."""

from __future__ import annotations

import numpy as np

from distmtl.model.weighting import solvers
from distmtl.model.weighting.weighting import Seen, State, Weighting

EPSILON = 1e-8  # added to losses that are divided by


class Surgery(Weighting):
    """λ of gradients, for what is shared."""

    surgery = True

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        assert seen.gram is not None
        return self.combine(seen.gram, seen)

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        """λ (n,) of gradients, none of them 0, with a Gram matrix (n, n)."""
        raise NotImplementedError


class PCGrad(Surgery):
    """Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1: vᵢ = gᵢ, and for the others in random order, where
    ⟨vᵢ, gⱼ⟩ < 0, vᵢ -= ⟨vᵢ, gⱼ⟩/‖gⱼ‖²·gⱼ; the update is Σ vᵢ. Every vᵢ stays in the span of the g, so their Gram matrix is enough."""

    def __init__(self, tasks: int, seed: int):
        super().__init__(tasks)
        self.seed = seed

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        order = np.random.default_rng((self.seed, seen.step))
        coefficients = np.eye(len(gram))  # vᵢ = Σⱼ coefficients[i, j]·gⱼ
        for i, of_task in enumerate(coefficients):
            for j in order.permutation(len(gram)):
                if j != i and (along := of_task @ gram[j]) < 0:
                    of_task[j] -= along / gram[j, j]
        return coefficients.sum(0)


class MGDA(Surgery):
    """Sener and Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization" (MGDA-UB): λ = T·a, with a the point of the
    simplex that minimises ‖Σ aᵢ·gᵢ/nᵢ‖²; nᵢ = 1 (none), ‖gᵢ‖ (l2), Lᵢ (loss) or Lᵢ·‖gᵢ‖ (loss+). As in the authors' code, a then weights
    the losses as they are, and not those divided by n."""

    def __init__(self, tasks: int, normalisation: str):
        super().__init__(tasks)
        self.normalisation = normalisation

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        by = np.ones(len(gram))
        if self.normalisation.startswith("loss"):
            by = by * (seen.losses + EPSILON)
        if self.normalisation in ("l2", "loss+"):
            by = by * np.sqrt(gram.diagonal())
        return len(gram) * solvers.nearest_to_zero(solvers.vectors(gram) / by)


class IMTLG(Surgery):
    """Liu et al. 2021, "Towards Impartial Multi-task Learning" (IMTL-G): λ = T·a/Σa with Σ aᵢ·gᵢ of the same projection onto every
    gᵢ/‖gᵢ‖. Of the correlations C: C·y = 1, aᵢ = yᵢ/‖gᵢ‖, and all projections positive.

    a may be negative; where Σa is less than the mean of |a| the latter divides instead, or the paper's λ would grow beyond bounds, and
    point uphill where Σa < 0."""

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        norms, correlations = solvers.correlations(gram)
        a = np.linalg.solve(correlations, np.ones(len(gram))) / norms
        return len(gram) * a / max(a.sum(), np.abs(a).mean())


class CAGrad(Surgery):
    """Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning" (algorithm 1): with g₀ the mean gradient, w of the
    simplex minimises ⟨g_w, g₀⟩ + c·‖g₀‖·‖g_w‖, g_w = Σ wᵢ·gᵢ, and the update is g₀ + c·‖g₀‖/‖g_w‖·g_w, in the authors' code divided by
    1 + c² (`rescale`): of all within c·‖g₀‖ of g₀ the one whose smallest ⟨gᵢ, ·⟩ is largest. λ is T times its coefficients: that of
    g₀ alone is 1."""

    def __init__(self, tasks: int, c: float, rescale: bool):
        super().__init__(tasks)
        self.c, self.divisor = c, 1 + c**2 if rescale else 1.0

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        w, factor = solvers.conflict_averse(solvers.vectors(gram), self.c)
        return (1 + len(gram) * factor * w) / self.divisor


class NashMTL(Surgery):
    """Navon et al. 2022, "Multi-Task Learning as a Bargaining Game": λ > 0 with M·λ = 1/λ, of M divided by its Frobenius norm as in
    the authors' code. That is its scale: λ = T^(1/4) for gradients of one norm at right angles, λᵢ ~ 1/‖gᵢ‖ in general.

    With y = λᵢ·‖gᵢ‖ it reads C·y = 1/y, of the correlations C."""

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        norms, correlations = solvers.correlations(gram)
        size = np.linalg.norm(gram / norms.max() ** 2) ** 0.5 * norms.max()
        return solvers.bargain(correlations) / norms * size


class AlignedMTL(Surgery):
    """Senushkin et al. 2023, "Independent Component Alignment for Multi-Task Learning" (algorithm 1): of G = U·Σ·Vᵀ, gradients in columns,
    the aligned σ·U·Vᵀ, orthogonal and of one length σ, the smallest singular value, are summed: λ = B·1 with B = σ·V·Σ⁻¹·Vᵀ, from the
    eigenvectors of M. λ = 1 for gradients of one norm at right angles. As in the authors' code singular values that are 0 in
    float32 are left out."""

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        values, basis = np.linalg.eigh(gram)  # increasing
        kept = values > values[-1] * len(gram) * np.finfo(np.float32).eps
        values, basis = values[kept], basis[:, kept]
        return basis @ (basis.sum(0) * np.sqrt(values[0] / values))


class DualBalancing(Surgery):
    """Lin et al. 2023, "Dual-Balancing for Multi-Task Learning" (DB-MTL): hᵢ = ∇log(Lᵢ + ε) = gᵢ/(Lᵢ + ε), and the update is
    Σ (maxⱼ‖hⱼ‖/‖hᵢ‖)·hᵢ: all tasks pull as hard as the one whose log-loss has the largest gradient, which has λ = 1/L.

    The paper smooths h over the steps (its β): that takes T gradients of all that is shared, tables included, and theirs are never
    formed, since tables are updated within backward. This is β = 0."""

    def combine(self, gram: np.ndarray, seen: Seen) -> np.ndarray:
        norms = np.sqrt(gram.diagonal())
        return (norms / (seen.losses + EPSILON)).max() / norms
