"""The small problems behind gradient surgery, from the Gram matrix of n gradients alone, in float64.

Norms of gradients may differ by many orders of magnitude, so that every problem is posed on their correlations; and gradients may be
collinear, so that these have no eigenvalue below `FLOOR`: all solutions are unique, and gradients that cancel are not amplified by
more than FLOOR^(-1/2).
"""

from __future__ import annotations

import numpy as np

FLOOR = 1e-6  # above the noise of gradients in float32


def correlations(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms (n,) and correlations (n, n), positive definite, of gradients with a Gram matrix (n, n)."""
    norms = np.sqrt(gram.diagonal())
    values, basis = np.linalg.eigh(gram / norms / norms[:, None])
    return norms, basis * values.clip(FLOOR) @ basis.T


def vectors(gram: np.ndarray) -> np.ndarray:
    """n vectors (n, n), in columns, that have this Gram matrix: what an algorithm on gradients does, it may do on them."""
    norms, correlated = correlations(gram)
    return np.linalg.cholesky(correlated).T * norms


def nearest_to_zero(vectors: np.ndarray) -> np.ndarray:
    """w of the simplex that minimises ‖Σ wᵢ·vᵢ‖, exactly: (d, n), vectors in columns → (n,)

    By non-negative least squares (Lawson and Hanson 1974): over x ≥ 0, ‖Σ xᵢ·vᵢ‖² + (Σ xᵢ - 1)² is s²·‖Σ wᵢ·vᵢ‖² + (s - 1)² with s = Σ xᵢ
    and w = x/s, so that its minimiser has the w sought, whatever s is best.
    """
    from scipy.optimize import nnls  # imported here: it takes half a second, and few runs come here

    norms = np.linalg.norm(vectors, axis=0)
    norms = norms.clip(norms.max() * 1e-100)
    system = np.vstack([vectors / norms, norms.min() / norms])  # of y = norms·x: columns of one size
    x = nnls(system, np.eye(len(system))[-1], maxiter=100 * len(norms))[0] / norms
    return x / x.sum()


def bargain(correlations: np.ndarray) -> np.ndarray:
    """y > 0 with C·y = 1/y, of a positive definite C: (n, n) → (n,)

    It minimises yᵀCy/2 - Σ log yᵢ, which is strictly convex and self-concordant: Newton's steps, damped by 1/(1 + decrement), converge
    from anywhere (Nesterov and Nemirovskii 1994), and quadratically in the end.
    """
    n = len(correlations)
    y = np.full(n, np.sqrt(n / correlations.sum()))
    for _ in range(200):
        gradient = correlations @ y - 1 / y
        step = np.linalg.solve(correlations + np.diag(y**-2), gradient)
        decrement = np.sqrt(max(gradient @ step, 0.0))
        y = y - step / (1 + decrement if decrement > 0.1 else 1)
        if decrement < 1e-9:  # its square is the next one's
            break
    return y


def conflict_averse(vectors: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """w of the simplex that minimises ⟨v_w, v₀⟩ + c·‖v₀‖·‖v_w‖, with v_w = Σ wᵢ·vᵢ and v₀ the mean, and c·‖v₀‖/‖v_w‖: (d, n) → (n,), ()

    For s > 0, ‖v_w‖ ≤ (‖v_w‖²/s + s)/2, with equality at s = ‖v_w‖. With κ = s/(c·‖v₀‖) the problem becomes, but for what w does not
    change, that of the point Σ wᵢ·(vᵢ + κ·v₀) nearest to zero, for the κ where κ = ‖v_w‖/(c·‖v₀‖); jointly convex in w and s, there is one.
    """
    from scipy.optimize import brentq

    mean, norms = vectors.mean(1), np.linalg.norm(vectors, axis=0)
    radius = c * np.linalg.norm(mean)

    def excess(log: float) -> float:
        w = nearest_to_zero(vectors + np.exp(log) * mean[:, None])
        return np.log(np.linalg.norm(vectors @ w) / radius) - log

    lowest, highest = norms.min() * np.sqrt(FLOOR / len(norms)), norms.max()  # of ‖v_w‖
    kappa = np.exp(brentq(excess, np.log(lowest / radius) - 1, np.log(highest / radius) + 1, xtol=1e-12))
    return nearest_to_zero(vectors + kappa * mean[:, None]), 1 / kappa
