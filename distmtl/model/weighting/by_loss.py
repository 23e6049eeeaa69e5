"""λ from the tasks' losses."""

from __future__ import annotations

import numpy as np

from distmtl.config import Config, RegressionTask
from distmtl.model.weighting.adam import descend, moments
from distmtl.model.weighting.weighting import Seen, State, Weighting

TINY = 1e-8  # losses below it count as it: they are divided by, or their logarithm is taken


class Uncertainty(Weighting):
    """Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", eq. 7 and 10, with s = ln σ²: every task adds
    c·e^(-s)·L + s/2, and so λ = c·e^(-s), at its best 1/(2L); s is learnt by Adam, without weight decay and without bounds.
    With `bounded`, Liebel and Körner 2018, "Auxiliary Tasks in Multi-Task Learning", eq. 2: L/(2σ²) + ln(1 + σ²) = c·e^(-s)·L +
    ln(1 + e^s) with c = ½.

    s starts where λ = 1.

    Args:
        scales: (T,) c of every task (likelihood_scales).
    """

    least = 1

    def __init__(self, scales: np.ndarray, lr: float, bounded: bool = False):
        super().__init__(len(scales), log_variance=np.log(scales), **moments(len(scales)))
        self.scales, self.lr, self.bounded = scales, lr, bounded

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        s = state["log_variance"][seen.tasks]
        weights = self.scales[seen.tasks] * np.exp(-s)
        of_noise = 1 / (1 + np.exp(-s)) if self.bounded else 0.5
        descend(state, "log_variance", seen.tasks, of_noise - weights * np.maximum(seen.losses, TINY), self.lr)
        return weights


def likelihood_scales(config: Config) -> np.ndarray:
    """c of Kendall's loss c·e^(-s)·L + s/2: (T,). What he calls regression has c = ½, from the Gaussian's -ln p = (ŷ - y)²/(2σ²) +
    ln σ. Of ours that is `loss: squared` alone; `half_squared` has this ½ in L already. All else takes his form for classification,
    c = 1: cross-entropies and the other kinds' likelihoods, of which e^(-s) is a temperature, and `absolute` and `huber`, which are no
    Gaussian's. Where s settles, λ = 1/(2L) whatever c is."""
    squared = [isinstance(t, RegressionTask) and t.loss == "squared" for t in config.tasks]
    return np.where(squared, 0.5, 1.0)


class DWA(Weighting):
    """Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", eq. 7: λ = T·softmax(r/temperature), rᵢ = the mean of Lᵢ in the
    window before this one over that in the window before that; 1 as long as a task has not had both.

    Args:
        window: steps with rows of the task, in place of the paper's epoch.
    """

    def __init__(self, tasks: int, window: int, temperature: float):
        super().__init__(tasks, **{name: np.zeros(tasks) for name in ("sums", "steps", "last", "before")})
        self.window, self.temperature = window, temperature

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        last, before = state["last"][seen.tasks], state["before"][seen.tasks]
        ratios = np.divide(last, before, out=np.ones_like(last), where=before > 0)
        state["sums"][seen.tasks] += np.maximum(seen.losses, TINY)
        state["steps"][seen.tasks] += 1
        full = state["steps"] >= self.window
        state["before"][full] = state["last"][full]
        state["last"][full] = state["sums"][full] / state["steps"][full]
        state["sums"][full] = state["steps"][full] = 0
        return len(ratios) * softmax(ratios / self.temperature)


class RLW(Weighting):
    """Lin et al. 2022, "Reasonable Effectiveness of Random Weighting", eq. 3: λ = T·softmax(z), z normal, drawn anew in every step. (The
    paper's own λ add up to 1; the factor T keeps the learning rate's meaning.)"""

    def __init__(self, tasks: int, seed: int):
        super().__init__(tasks)
        self.seed = seed

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        z = np.random.default_rng((self.seed, seen.step)).standard_normal(self.tasks)
        return len(seen.tasks) * softmax(z[seen.tasks])


class IMTLL(Weighting):
    """Liu et al. 2021, "Towards Impartial Multi-Task Learning", section 3.2, IMTL-L: every task adds e^s·L - s, and so λ = e^s, at its
    best 1/L; s, 0 at first, is learnt by Adam."""

    least = 1

    def __init__(self, tasks: int, lr: float):
        super().__init__(tasks, log_factor=np.zeros(tasks), **moments(tasks))
        self.lr = lr

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        weights = np.exp(state["log_factor"][seen.tasks])
        descend(state, "log_factor", seen.tasks, weights * np.maximum(seen.losses, TINY) - 1, self.lr)
        return weights


class FAMO(Weighting):
    """Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", algorithm 1, with least losses of 0: λ = T·(z/L)/Σ(z/L), z =
    softmax(w), and w takes Adam's step against Jᵀδ, J = ∂z/∂w, where δ says by how much ln L has fallen: who falls faster counts less.

    This is not the paper's update. There δ = ln L(θₜ) - ln L(θₜ₊₁) is of one batch before and after its step, which costs a second
    forward pass. Here δ = m - ln L of the next batch, where m is a running mean of ln L over the batches before: how much it has
    fallen within about 1/(1 - smoothing) steps. So it costs nothing, and differs by the noise between batches.

    Args:
        weight_decay: L2, as in the paper's code.
        smoothing: share of the past in m.
    """

    def __init__(self, tasks: int, lr: float, weight_decay: float, smoothing: float):
        super().__init__(tasks, logits=np.zeros(tasks), level=np.zeros(tasks), known=np.zeros(tasks), **moments(tasks))
        self.lr, self.weight_decay, self.smoothing = lr, weight_decay, smoothing

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        losses = np.maximum(seen.losses, TINY)
        level, known = state["level"], state["known"][seen.tasks] > 0
        before = seen.tasks[known]
        if len(before) >= 2:
            z, fallen = softmax(state["logits"][before]), level[before] - np.log(losses[known])
            gradient = z * (fallen - z @ fallen) + self.weight_decay * state["logits"][before]
            descend(state, "logits", before, gradient, self.lr)
        level[seen.tasks] = np.log(losses) + self.smoothing * np.where(known, level[seen.tasks] - np.log(losses), 0.0)
        state["known"][seen.tasks] = 1
        weights = softmax(state["logits"][seen.tasks]) / losses
        return len(weights) * weights / weights.sum()


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max())
    return exp / exp.sum()
