"""ESCM² (Wang et al. 2022, "Entire Space Counterfactual Multi-task Model"): the conditional task's loss without its selection bias.

With o whether a task's parents happened, p = P(o) without gradient, e the error of P(task | o), ê an imputed error:

    IPW   mean over all impressions of o·e/p            (eq. 8; self-normalised: Σ o·e/p / Σ o/p)
    DR    mean of ê + o(e - ê)/p, and the imputation's own o(e - ê)²/p            (eq. 10 to 12)

ê is a constant in the first loss of DR and e one in the second, as in joint learning (Wang et al. 2019, "Doubly Robust Joint
Learning"): neither network can lower the other's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distmtl.config import Config, ESCM2Config
from distmtl.model.funnel import surprise
from distmtl.model.kinds import places


def counterfactual(
    config: Config,
    model: ESCM2Config,
    outputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    joint_weights: Tensor,
    lineages: list[list[int]],
) -> list[tuple[Tensor, Tensor]]:
    """The terms that ESCM² adds for every task of space entire, errors and weights (B,) each.

    Args:
        outputs: (B, O), the imputations last.
        labels, weights: (B, T) of the tasks given their parents, weight 0 where those did not happen.
        joint_weights: (B, T), weight 0 where that is unknown.
        lineages: funnel.lineage of every task.
    """
    where, out = places(config), []
    entire = [t for t, task in enumerate(config.tasks) if config.space(task) == "entire"]
    for i, t in enumerate(entire):
        error = F.binary_cross_entropy_with_logits(outputs[:, where[t].start], labels[:, t], reduction="none")
        happened = weights[:, t] > 0
        propensity = torch.exp(-surprise([outputs[:, where[a].start].detach() for a in lineages[t] if a != t]))
        inverse = torch.where(happened, 1.0 / propensity.clamp(min=1.0 / model.max_weight), 0.0)
        if model.method == "ipw" and model.self_normalised:
            out.append((error, inverse * joint_weights[:, t]))
        elif model.method == "ipw":
            out.append((error * inverse, joint_weights[:, t]))
        else:
            imputed = F.softplus(outputs[:, where[-1].stop + i])
            constant = imputed.detach()
            out.append((constant + (error - constant) * inverse, joint_weights[:, t]))
            out.append(((error.detach() - imputed) ** 2 * inverse, joint_weights[:, t]))
    return out
