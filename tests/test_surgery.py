"""λ of the gradient methods against the papers' algorithms, written on the gradients themselves and not on their Gram matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from distmtl.model.weighting.surgery import IMTLG, MGDA, AlignedMTL, CAGrad, DualBalancing, NashMTL, PCGrad, Surgery
from distmtl.model.weighting.weighting import Seen

STEP, SEED = 7, 3
METHODS = {
    "pcgrad": lambda n: PCGrad(n, SEED),
    "mgda": lambda n: MGDA(n, "none"),
    "mgda l2": lambda n: MGDA(n, "l2"),
    "mgda loss+": lambda n: MGDA(n, "loss+"),
    "imtl_g": IMTLG,
    "cagrad": lambda n: CAGrad(n, 0.4, True),
    "cagrad far": lambda n: CAGrad(n, 2.0, False),
    "nash": NashMTL,
    "aligned": AlignedMTL,
    "db_mtl": DualBalancing,
}


def gradients(n: int, seed: int) -> np.ndarray:
    """(n, d), of norms that differ; with few dimensions many of them conflict."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, n + 2)) * 10.0 ** rng.uniform(-1, 1, (n, 1))


def weights(method: Surgery, g: np.ndarray, losses: np.ndarray | None = None) -> np.ndarray:
    n = len(g)
    return method.weigh(Seen(STEP, np.arange(n), np.ones(n) if losses is None else losses, g @ g.T), {})


cases = pytest.mark.parametrize(("n", "seed"), [(n, seed) for n in (2, 3, 4) for seed in range(6)])
many = pytest.mark.parametrize(("n", "seed"), [(2, 0), (3, 1), (5, 2), (8, 3), (16, 4), (32, 5)])


@many
def test_pcgrad(n, seed):
    g, order = gradients(n, seed), np.random.default_rng((SEED, STEP))
    projected = g.copy()
    for i in range(n):
        for j in order.permutation(n):
            if j != i and projected[i] @ g[j] < 0:
                projected[i] -= projected[i] @ g[j] / (g[j] @ g[j]) * g[j]
    np.testing.assert_allclose(weights(PCGrad(n, SEED), g) @ g, projected.sum(0), rtol=1e-9, atol=1e-9)


def shortest(g: np.ndarray) -> np.ndarray:
    """The convex combination of least norm, over every face of the simplex."""
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(len(g)))
    for size in range(1, len(g) + 1):
        for face in map(list, itertools.combinations(range(len(g)), size)):
            differences = (g[face[1:]] - g[face[0]]).T
            rest = np.linalg.lstsq(differences, -g[face[0]], rcond=None)[0]
            a = np.zeros(len(g))
            a[face] = [1 - rest.sum(), *rest]
            if a.min() >= 0:
                best = min(best, (float(np.linalg.norm(a @ g)), a), key=lambda found: found[0])
    return best[1]


@cases
@pytest.mark.parametrize("normalisation", ["none", "l2", "loss", "loss+"])
def test_mgda_is_the_shortest_of_all_faces(n, seed, normalisation):
    g, losses = gradients(n, seed), np.random.default_rng(seed).uniform(0.1, 2, n)
    norms = np.linalg.norm(g, axis=1)
    by = {"none": np.ones(n), "l2": norms, "loss": losses, "loss+": losses * norms}[normalisation]
    np.testing.assert_allclose(weights(MGDA(n, normalisation), g, losses) / n, shortest(g / by[:, None]), rtol=1e-6, atol=1e-9)


@many
def test_mgda_is_optimal(n, seed):
    g = gradients(n, seed) + 0.3
    a = weights(MGDA(n, "none"), g) / n
    along = g @ (a @ g)  # the derivative by every a: least, and the same, where a > 0
    assert a.min() >= 0 and a.sum() == pytest.approx(1)
    assert along.min() >= (a @ along) * (1 - 1e-8)
    np.testing.assert_allclose(along[a > 0], a @ along, rtol=1e-8)


@cases
def test_imtl_g(n, seed):
    """The closed form of the paper: a₂…ₜ = g₁·Uᵀ·(D·Uᵀ)⁻¹, D = g₁ - gᵢ, U = u₁ - uᵢ."""
    g = gradients(n, seed)
    u = g / np.linalg.norm(g, axis=1, keepdims=True)
    d, difference = g[0] - g[1:], u[0] - u[1:]
    rest = np.linalg.solve(difference @ d.T, difference @ g[0])
    a = np.array([1 - rest.sum(), *rest])
    if np.abs(a).mean() < 1:
        np.testing.assert_allclose(weights(IMTLG(n), g) / n, a, rtol=1e-7, atol=1e-9)
    else:
        np.testing.assert_allclose(weights(IMTLG(n), g) / n, a / np.abs(a).mean(), rtol=1e-7)


@many
def test_imtl_g_has_equal_projections_none_of_them_uphill(n, seed):
    g = gradients(n, seed)
    projections = g / np.linalg.norm(g, axis=1, keepdims=True) @ (weights(IMTLG(n), g) @ g)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-6)
    assert projections[0] > 0


@many
@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
def test_cagrad_is_optimal(n, seed, c):
    """d = g₀ + c‖g₀‖·g_w/‖g_w‖ with w ≥ 0 only on gradients whose ⟨gᵢ, d⟩ is the least: no other d this near g₀ has a larger least one."""
    g = gradients(n, seed)
    found = weights(CAGrad(n, c, False), g)
    np.testing.assert_allclose(weights(CAGrad(n, c, True), g), found / (1 + c**2), rtol=1e-12)
    mean, d, w = g.mean(0), found @ g / n, found - 1
    assert w.min() > -1e-9
    assert np.linalg.norm(d - mean) == pytest.approx(c * np.linalg.norm(mean), rel=1e-8)
    along = g @ d
    np.testing.assert_allclose(along[w > 1e-6 * w.max()], along.min(), rtol=1e-6, atol=1e-8 * np.abs(along).max())


@pytest.mark.parametrize("seed", range(6))
def test_cagrad_of_two(seed):
    g, c = gradients(2, seed), 0.4
    mean = g.mean(0)

    def objective(w: float) -> float:
        of_w = w * g[0] + (1 - w) * g[1]
        return of_w @ mean + c * np.linalg.norm(mean) * np.linalg.norm(of_w)

    w = min((0.0, 1.0, minimize_scalar(objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x), key=objective)
    of_w = w * g[0] + (1 - w) * g[1]
    d = mean + c * np.linalg.norm(mean) / np.linalg.norm(of_w) * of_w
    np.testing.assert_allclose(weights(CAGrad(2, c, False), g) @ g / 2, d, rtol=1e-5, atol=1e-6 * np.linalg.norm(d))


@many
def test_nash(n, seed):
    g = gradients(n, seed)
    gram, found = g @ g.T, weights(NashMTL(n), g)
    assert found.min() > 0
    np.testing.assert_allclose(gram / np.linalg.norm(gram) @ found * found, np.ones(n), rtol=1e-8)


@many
def test_aligned(n, seed):
    """The gradients' columns σ·U·Vᵀ: at right angles, one length, of the smallest singular value."""
    g = gradients(n, seed)
    g = g / np.linalg.norm(g, axis=1, keepdims=True) ** 0.5  # or of 32 tasks the last singular values are 0 in float32
    u, singular, v = np.linalg.svd(g.T, full_matrices=False)
    aligned = singular[-1] * u @ v
    assert np.linalg.cond(aligned) == pytest.approx(1)
    np.testing.assert_allclose(weights(AlignedMTL(n), g) @ g, aligned.sum(1), rtol=1e-6, atol=1e-9)


@many
def test_db_mtl(n, seed):
    g, losses = gradients(n, seed), np.random.default_rng(seed).uniform(0.1, 2, n)
    of_logs = g / losses[:, None]
    norms = np.linalg.norm(of_logs, axis=1, keepdims=True)
    expected = (norms.max() / norms * of_logs).sum(0)
    np.testing.assert_allclose(weights(DualBalancing(n), g, losses) @ g, expected, rtol=1e-6, atol=1e-6 * np.linalg.norm(expected))


AWKWARD = {
    "the same": [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]],
    "collinear": [[1.0, 2.0], [2.0, 4.0], [1e-3, 2e-3]],
    "opposite": [[1.0, 2.0], [-1.0, -2.0]],
    "opposite, and one across": [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]],
    "summing to zero": [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]],
    "more than dimensions": [[1.0, 2.0], [-2.0, 1.0], [0.5, -3.0], [-1.0, -1.0], [4.0, 0.1]],
    "of very different norms": [[1e-12, 2e-12], [2e6, -1e6], [1.0, 0.3]],
    "opposite, of very different norms": [[1e-12, 2e-12], [-1e6, -2e6]],
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_gradients_give_finite_weights(kind, case):
    """And weights that add up to a gradient not far longer than the longest one, noise of float32 in their Gram matrix."""
    g = np.array(AWKWARD[case])
    noise = 1 + 1e-8 * np.random.default_rng(0).normal(size=(len(g), len(g)))
    gram = g @ g.T * (noise + noise.T) / 2
    found = METHODS[kind](len(g)).weigh(Seen(STEP, np.arange(len(g)), np.ones(len(g)), gram), {})
    assert np.isfinite(found).all()
    assert np.linalg.norm(found @ g) < 10 * np.linalg.norm(g, axis=1).max()


@pytest.mark.parametrize("kind", METHODS)
def test_tasks_without_a_usable_gradient_stand_aside(kind):
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.5, 0.5], [1e30, 0.0]], dtype=torch.float64)
    gram, losses, here = g @ g.T, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    gram[3, 3] = torch.inf
    found = METHODS[kind](4)(STEP, losses, here, gram)
    assert found[1] == found[3] == 1
    two = METHODS[kind](2)(STEP, losses[:2], here[:2], gram[::2, ::2][:2, :2])
    torch.testing.assert_close(found[::2], two)
