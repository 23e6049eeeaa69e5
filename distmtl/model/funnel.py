"""Funnels: tasks that can only happen after their parents, such as a conversion after its click.

P(task and all before it) = Π P(task | its parents) over its lineage (Ma et al. 2018, ESMM, eq. 3); the parents of one task are taken
as independent given theirs. Everything is in logits and softplus: no probability is ever multiplied, divided or clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distmtl.config import Config

TINY = 1e-30  # below it log(expm1(s)) is log(s) in float32 anyway


def lineage(config: Config, t: int) -> list[int]:
    """A task and all before it whose outputs multiply to the joint probability; a task of space joint has it already, and one of
    space labelled is not conditional on its parents."""
    found, task = {t}, config.tasks[t]
    if config.space(task) != "joint":
        for parent in config.conditions(task):
            found.update(lineage(config, config.place_of(parent)))
    return sorted(found)


def surprise(logits: list[Tensor]) -> Tensor:
    """-log Π σ(logit): (B,) each → (B,)."""
    return torch.stack([F.softplus(-z) for z in logits]).sum(0)


def joint_logit(logits: list[Tensor]) -> Tensor:
    """logit Π σ(logit) = -log(exp(s) - 1), s the surprise: (B,) each → (B,)."""
    if len(logits) == 1:
        return logits[0]
    s = surprise(logits).clamp(min=TINY)
    return -(s + torch.log(-torch.expm1(-s)))


def joint_labels(config: Config, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a task and all before it happened: (B, T) labels and weights (0 where unknown) → the same; 0, and known, where any
    parent is known not to have happened."""
    y, w = list(labels.unbind(1)), list(weights.unbind(1))
    for t in config.by_descent:
        parents = [config.place_of(name) for name in config.conditions(config.tasks[t])]
        if not parents:
            continue
        of_parents = torch.stack([w[p] for p in parents])
        never = torch.stack([torch.where(y[p] < 0.5, w[p], 0.0) for p in parents]).amax(0)
        y[t] = torch.where(never > 0, 0.0, y[t])
        w[t] = torch.where(never > 0, never, torch.where(of_parents.amin(0) > 0, w[t], 0.0))
    return torch.stack(y, dim=1), torch.stack(w, dim=1)
