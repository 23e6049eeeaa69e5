"""Health: how the tasks of a run get on with each other, told at every log step (docs/health.md).

It is cheap enough to stay on: a step adds a few sums of (B, T) on the device; a log step has one all-reduce and looks at the gates once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distmtl.batch import Batch
from distmtl.config import BinaryTask, Config
from distmtl.model.funnel import joint_labels, joint_logit
from distmtl.model.loss import StepNumbers, Terms
from distmtl.model.weighting import Cut

STARVED, FED = 0.1, 0.2  # an expert is starved when its load is below this part of its fair share, until it is above that one
COLLAPSED, SPREAD = 0.95, 0.9  # a task's gates have collapsed when one expert's mean gate is above this, until all are below that


@dataclass(frozen=True)
class Alarm:
    subject: str
    text: str


class Health:
    """Figures since the last log line, equal on all ranks. T tasks, E experts:

        lambda         mean λ (weighting)
        gradient_norm  √ of the mean ‖g‖² at the cut, of the task's loss times its own weight, over the steps that looked
        cosine         Σ⟨gᵢ, gⱼ⟩ / √(Σ‖gᵢ‖²·Σ‖gⱼ‖²) over these steps, of every pair of tasks
        calibration    Σ w·p / Σ w·y over the rows that the task is trained on
        gate           the mean over the last step's rows of every expert's share of a task's gates; None where the task does not see it
        gate_entropy   the mean over these rows of H(g) / ln(experts that the task sees): 1 is even, 0 is one expert per row
        load           of every expert: the mean over tasks of the mean gate
        alarms         subjects of those that stand

    Calibration is of the training data as they are: under kept_negatives p is that of the thinned data, and pos_weight is undone. A task
    of space entire or joint is compared in the joint event, on all impressions. Under delay there is none: labels are not final.

    Args:
        mixture: has the gates of the last training step, where the head has a mixture.
    """

    def __init__(self, config: Config, terms: Terms, mixture: Cut | None, device: torch.device):
        self.config, self.terms, self.mixture = config, terms, mixture
        self.names = [t.name for t in config.tasks]
        tasks = len(self.names)
        self.calibrated = [isinstance(t, BinaryTask) and t.delay is None for t in config.tasks]
        self.joint = [t for t, space in enumerate(terms.spaces) if space in ("entire", "joint")]
        self.outputs = torch.tensor([p.start for p in terms.places], device=device)
        self.shift = torch.tensor([math.log(t.pos_weight) if isinstance(t, BinaryTask) else 0.0 for t in config.tasks], device=device)
        self.sums = torch.zeros(3 * tasks + 1, dtype=torch.float64, device=device)  # λ, w·p, w·y; steps
        self.gram = torch.zeros(tasks * tasks + 1, dtype=torch.float64, device=device)  # and steps
        self.last: StepNumbers | None = None
        self.standing: set[str] = set()  # alarms that were said

    def add(self, numbers: StepNumbers) -> None:
        """A step; one whose update was left out counts for nothing."""
        self.last, one = numbers, numbers.weighting.new_ones(1)
        sums = torch.cat([numbers.weighting, self._predictions_and_labels(numbers.outputs, numbers.batch).flatten(), one])
        self.sums += torch.where(numbers.trained, sums, 0.0)
        if numbers.gram is not None:
            self.gram += torch.where(numbers.trained, torch.cat([numbers.gram.flatten(), one]), 0.0)

    def report(self) -> tuple[dict[str, Any], list[Alarm]]:
        """The figures, what is new about them, and a new interval begins. Every rank must ask."""
        tasks = len(self.names)
        gates = self._gates()
        shared = torch.cat([self.sums[tasks : 3 * tasks], gates.flatten()])
        if dist.is_initialized():
            dist.all_reduce(shared)
        predicted, labels = shared[: 2 * tasks].view(2, -1).cpu().numpy()
        gates = shared[2 * tasks :].view(gates.shape).cpu().numpy()
        weighting, gram = self.sums.cpu().numpy(), self.gram.cpu().numpy()
        out: dict[str, Any] = {}
        if weighting[-1]:
            out["lambda"] = self._of_tasks(weighting[:tasks] / weighting[-1])
            if any(self.calibrated):
                pairs = zip(predicted, labels, self.calibrated, strict=True)
                out["calibration"] = self._of_tasks([p / y if known and y > 0 else None for p, y, known in pairs], self.calibrated)
        if gram[-1]:
            out |= self._of_gradients(gram[:-1].reshape(tasks, tasks) / gram[-1])
        alarms: list[Alarm] = []
        if gates.size and gates[0, -1]:
            of_gates, alarms = self._of_gates(gates[:, :-2] / gates[:, -1:], gates[:, -2] / gates[:, -1])
            out |= of_gates
        self.sums.zero_()
        self.gram.zero_()
        return out, alarms

    def _of_tasks(self, values: Any, told: list[bool] | None = None) -> dict[str, Any]:
        return {name: _short(v) for name, v, tell in zip(self.names, values, told or [True] * len(self.names), strict=True) if tell}

    def _predictions_and_labels(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(2, T) float64: Σ w·p and Σ w·y over this rank's rows."""
        weights = batch.weights
        labels = torch.where(weights > 0, batch.labels, 0.0)
        logits = outputs.index_select(1, self.outputs) - self.shift
        if self.joint:
            joint, joint_weights = joint_labels(self.config, labels, weights)
            weights = weights.clone()  # the batch's own
            for t in self.joint:
                logits[:, t] = joint_logit([outputs[:, self.terms.places[i].start] for i in self.terms.lineages[t]])
                labels[:, t], weights[:, t] = joint[:, t], joint_weights[:, t]
        predictions = torch.where(weights > 0, logits.sigmoid(), 0.0)
        return (weights * torch.stack([predictions, labels])).sum(1, dtype=torch.float64)

    def _of_gradients(self, gram: np.ndarray) -> dict[str, Any]:
        norms = np.sqrt(gram.diagonal().clip(min=0))
        out: dict[str, Any] = {"gradient_norm": self._of_tasks(norms)}
        if len(norms) > 1:
            out["cosine"] = {
                a: {
                    b: _short(gram[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else None
                    for j, b in enumerate(self.names)
                    if j > i
                }
                for i, a in enumerate(self.names[:-1])
            }
        return out

    def _gates(self) -> Tensor:
        """(T, E + 2) float64, over this rank's rows of the last step: the sums of the experts' shares, of the entropy, and the rows."""
        if self.mixture is None or self.mixture.gates is None or self.last is None:
            return self.sums.new_empty(0)
        gates = self.mixture.gates.float()
        shares = gates / gates.sum(1, keepdim=True)  # the gates of home add up to more than 1
        entropy = -torch.xlogy(shares, shares).sum(1, keepdim=True)
        each = torch.cat([shares, entropy, torch.ones_like(entropy)], dim=1)
        real = (self.last.batch.rows >= 0) & self.last.trained
        return torch.where(real, each, 0.0).sum(2, dtype=torch.float64).expand(len(self.names), -1)

    def _of_gates(self, gates: np.ndarray, entropy: np.ndarray) -> tuple[dict[str, Any], list[Alarm]]:
        """Of mean gates (T, E) and entropy (T,), nats."""
        assert self.mixture is not None
        seen = np.ones(gates.shape, bool) if self.mixture.seen is None else np.broadcast_to(np.array(self.mixture.seen), gates.shape)
        choices, load = seen.sum(1), gates.mean(0)
        out: dict[str, Any] = {
            "gate": {
                name: [_short(g) if s else None for g, s in zip(*of_task, strict=True)]
                for name, *of_task in zip(self.names, gates, seen, strict=True)
            },
            "gate_entropy": self._of_tasks(entropy / np.log(choices.clip(min=2)), [n > 1 for n in choices.tolist()]),
            "load": {str(e): _short(v) for e, v in enumerate(load)},
        }
        new = self._alarms(gates, choices, load, (seen / choices[:, None]).mean(0))
        return out | {"alarms": sorted(self.standing)}, new

    def _alarms(self, gates: np.ndarray, choices: np.ndarray, load: np.ndarray, fair: np.ndarray) -> list[Alarm]:
        """Those that did not stand before."""
        found = []
        for e, (share, due) in enumerate(zip(load, fair, strict=True)):
            if share < due * (FED if (subject := f"expert {e}") in self.standing else STARVED):
                text = (
                    f"{subject} gets {share:.1%} of the tasks' gates, a fair share is {due:.1%}: it learns next to nothing. Try fewer "
                    "experts or model.dropout (docs/health.md)"
                )
                found.append(Alarm(subject, text))
        for name, of_task, n in zip(self.names, gates, choices, strict=True):
            if n > 1 and of_task.max() > (SPREAD if (subject := f"gates of {name}") in self.standing else COLLAPSED):
                text = (
                    f"{subject} have collapsed: expert {of_task.argmax()} gets {of_task.max():.1%} of them, for all rows alike, so the "
                    "others are of no use to the task. Try a lower learning rate or model.dropout (docs/health.md)"
                )
                found.append(Alarm(subject, text))
        new = [alarm for alarm in found if alarm.subject not in self.standing]
        self.standing = {alarm.subject for alarm in found}
        return new


def _short(value: float | None) -> float | None:
    """Six digits are enough."""
    return None if value is None else float(f"{value:.6g}")
