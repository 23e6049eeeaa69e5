"""λ from what it does to the validation loss."""

from __future__ import annotations

import numpy as np

from distmtl.model.weighting.weighting import Seen, State, Weighting


class Bandit(Weighting):
    """A bandit on λ. Arm 0 has all tasks equal, arm i raises the i-th by a factor, Σλ = T. The arm is held from one evaluation to the
    next; its reward is how much the validation loss fell meanwhile, over the most that it changed of late: -1 to 1. Then the next arm is
    chosen by discounted UCB (Garivier and Moulines 2011, "On Upper-Confidence Bound Policies for Switching Bandit Problems", section 2):
    the largest mean + exploration·√(ln Σn / n), over rewards and counts n that are discounted at every evaluation; an arm that was never
    held comes first. Nothing is drawn at random. Until the second evaluation the tasks are equal."""

    def __init__(self, tasks: int, boost: float, discount: float, exploration: float):
        arms = {"rewards": np.zeros(1 + tasks), "held": np.zeros(1 + tasks)}
        super().__init__(tasks, arm=0.0, last=np.inf, peak=0.0, **arms)
        self.boost, self.discount, self.exploration = boost, discount, exploration

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        weights = np.where(seen.tasks == state["arm"] - 1, self.boost, 1.0)
        return len(weights) * weights / weights.sum()

    def evaluated(self, loss: float) -> None:
        with self.state() as state:
            if np.isfinite(state["last"]):
                self._reward(float(state["last"]) - loss, state)
            state["last"][...] = loss

    def _reward(self, fallen: float, state: State) -> None:
        rewards, held = state["rewards"], state["held"]
        peak = state["peak"][...] = max(abs(fallen), self.discount * float(state["peak"]))
        for sums, now in ((rewards, fallen / peak if peak else 0.0), (held, 1.0)):
            sums *= self.discount
            sums[int(state["arm"])] += now
        counts = np.maximum(held, 1e-12)
        value = rewards / counts + self.exploration * np.sqrt(np.log(max(held.sum(), 1.0)) / counts)
        state["arm"][...] = np.argmax(np.where(held > 0, value, np.inf))
