"""Weighting: λ = F(losses, Gram matrix, state), in float64, equal on all ranks because what it reads is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Seen:
    """A step, as far as λ may depend on it: of the n tasks that have rows in it, over all ranks."""

    step: int
    tasks: np.ndarray  # (n,) their places among the config's T tasks
    losses: np.ndarray  # (n,) mean loss times the task's own weight
    gram: np.ndarray | None  # (n, n) ⟨gᵢ, gⱼ⟩ of these losses at the cut, for methods that read gradients


class Weighting(nn.Module):
    """Balances T tasks. Its state is kept in buffers, and so in checkpoints. λ = 1 everywhere is what no weighting does; methods that
    norm λ in their paper are scaled to Σλ = T.

    forward: step, losses (T,), present (T,) bool, gram (T, T) or None → λ (T,), float64; 1 for a task that is absent, or has no gradient,
    or one that is not finite

    Args:
        state: what it remembers from step to step, and its start.
    """

    least = 2  # tasks that a step must have; 1 where λ is each task's own
    surgery = False  # λ holds below the cut only: towers above it are trained by their own unweighted losses

    def __init__(self, tasks: int, **state: Any):
        super().__init__()
        self.tasks = tasks
        for name, start in state.items():
            self.register_buffer(name, torch.as_tensor(start, dtype=torch.float64).clone())

    def forward(self, step: int, losses: Tensor, present: Tensor, gram: Tensor | None) -> Tensor:
        if gram is not None:
            present = present & (gram.diagonal() > 0) & gram.diagonal().isfinite()
        tasks = present.nonzero()[:, 0].cpu().numpy()
        weights = np.ones(self.tasks)
        if len(tasks) >= self.least:
            of_tasks = None if gram is None else gram.cpu().numpy()[np.ix_(tasks, tasks)]
            with self.state() as state:
                weights[tasks] = self.weigh(Seen(step, tasks, losses.cpu().numpy()[tasks], of_tasks), state)
        return torch.from_numpy(weights).to(losses.device)

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        """λ of the n ≥ `least` tasks that are present; changes `state` in place."""
        raise NotImplementedError

    @contextmanager
    def state(self) -> Iterator[State]:
        """The buffers' values, to be changed in place."""
        state = {name: buffer.cpu().numpy().copy() for name, buffer in self.named_buffers()}
        yield state
        for name, buffer in self.named_buffers():
            buffer.copy_(torch.from_numpy(state[name]))

    def evaluated(self, loss: float) -> None:
        """Told during training after every evaluation: the joint loss, by the tasks' own weights, on the validation split. Equal on
        all ranks."""


class Static(Weighting):
    """λ = 1."""

    def forward(self, step: int, losses: Tensor, present: Tensor, gram: Tensor | None) -> Tensor:
        return torch.ones_like(losses)
