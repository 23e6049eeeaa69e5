"""Adam (Kingma and Ba 2015) for the few numbers per task that a weighting learns; its moments are state as they are."""

from __future__ import annotations

import numpy as np

from distmtl.model.weighting.weighting import State

BETAS, EPS = (0.9, 0.999), 1e-8


def moments(tasks: int) -> State:
    return {name: np.zeros(tasks) for name in ("mean", "square", "updates")}


def descend(state: State, name: str, tasks: np.ndarray, gradient: np.ndarray, lr: float) -> None:
    """One update of state[name] of these tasks; those of the others, and their moments, stay."""
    mean, square, updates = state["mean"], state["square"], state["updates"]
    updates[tasks] += 1
    mean[tasks] += (1 - BETAS[0]) * (gradient - mean[tasks])
    square[tasks] += (1 - BETAS[1]) * (gradient**2 - square[tasks])
    unbiased = [m[tasks] / (1 - beta ** updates[tasks]) for m, beta in zip((mean, square), BETAS, strict=True)]
    state[name][tasks] -= lr * unbiased[0] / (np.sqrt(unbiased[1]) + EPS)
