"""What of a model's outputs is measured: one or more scored columns per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.batch import Batch
from distmtl.calibration import Calibration, slices_of
from distmtl.config import BinaryTask, Config, LognormalTask, MulticlassTask, OrdinalTask, TaskConfig
from distmtl.model.funnel import joint_labels, joint_logit, lineage
from distmtl.model.kinds import places, prediction


@dataclass(frozen=True)
class Column:
    """A score, a label and a weight of every row, from which metrics of a task are made.

    Args:
        family: binary: the score is a logit, ranked against the label; value: it is the expected label; mean: it is averaged.
        prefix: of its metrics' names; with family mean, the whole name.
    """

    task: str
    family: Literal["binary", "value", "mean"]
    prefix: str = ""


@dataclass(frozen=True)
class Scored:
    """(B, C) float32 each: C columns."""

    scores: Tensor
    labels: Tensor
    weights: Tensor
    oracle: Tensor  # true probabilities, NaN where there are none

    def __getitem__(self, rows: Any) -> Scored:
        return Scored(self.scores[rows], self.labels[rows], self.weights[rows], self.oracle[rows])


class Predictions:
    """What is served of every task (kinds.prediction), binary logits calibrated where that was fitted.

    Args:
        calibrations: of tasks by name.
    """

    def __init__(self, config: Config, calibrations: Mapping[str, Calibration] | None = None):
        self.config, self.places, self.calibrations = config, places(config), calibrations or {}

    def __call__(self, outputs: Tensor, ids: KeyedJaggedTensor, extras: Tensor | None) -> list[Tensor]:
        """Outputs (B, O), the embedded features, the tasks' columns (B, T) → (B,) each; of a multiclass task (B, classes)."""
        z = [outputs[:, place] for place in self.places]
        out = [prediction(task, z[t], None if extras is None else extras[:, t]) for t, task in enumerate(self.config.tasks)]
        for name, calibration in self.calibrations.items():
            t = self.config.place_of(name)
            out[t] = calibration(out[t], slices_of(ids, calibration.slices) if calibration.slices else None)
        return out


def served(task: TaskConfig, predicted: Tensor) -> np.ndarray:
    """Of what is predicted, what users get: float32 probabilities of logits and log-probabilities, values as they are."""
    if isinstance(task, BinaryTask):
        predicted = predicted.sigmoid()
    elif isinstance(task, MulticlassTask):
        predicted = predicted.exp()
    return predicted.float().cpu().numpy()


def meaning(config: Config, task: TaskConfig) -> str:
    """What is served of a task, for people: its kind's number, and by its space of which rows (docs/models.md: funnels)."""
    parents, space = " and ".join(task.parents), config.space(task)
    given = f" | {parents}" if parents and space in ("observed", "entire") else ""
    match task:
        case BinaryTask() if space == "joint":
            what = f"P({parents} and {task.name})"
        case BinaryTask():
            what = f"P({task.name}{given})"
        case MulticlassTask():
            what = f"P({task.name} = 0 … {task.classes - 1}{given})"
        case OrdinalTask():
            what = f"E({task.name}{given}), 0 to {task.levels - 1}"
        case _:
            what = f"E({task.name}{given})"
    if not parents:
        return what
    return (
        what
        + {
            "labelled": ", of rows like those that have its label",
            "observed": f", learnt where {parents} happened",
            "entire": ", learnt from all impressions",
            "joint": ", of any impression",
        }[space]
    )


class Scores:
    """The columns of a config's tasks:

        binary, as its space says     ""        its corrected and calibrated logit against its label
        binary of space entire        joint_    P(it and all before it) against whether all happened, on all impressions
        binary with that column       entire_   its logit against true_probability_entire, on all impressions
        ordinal, multiclass           accuracy; multiclass: logloss
        zero-inflated lognormal       positive_ P(y > 0) against whether it is
        all kinds but multiclass      ""        the expected value

    Args:
        oracle: columns of true probabilities that the data set has.
        calibrations: of tasks by name.
    """

    def __init__(self, config: Config, oracle: list[str | None], calibrations: Mapping[str, Calibration] | None = None):
        self.config, self.places, self.predictions = config, places(config), Predictions(config, calibrations)
        self.lineages = [lineage(config, t) for t in range(len(config.tasks))]
        self.entire = [bool(name) for name in oracle[len(config.tasks) :]] or [False] * len(config.tasks)
        self.columns = [c for t, task in enumerate(config.tasks) for c in self._columns(t, task)]

    def _columns(self, t: int, task: TaskConfig) -> list[Column]:
        match task:
            case BinaryTask():
                more = [Column(task.name, "binary", "joint_")] if self.config.space(task) == "entire" else []
                return [Column(task.name, "binary"), *more, *([Column(task.name, "binary", "entire_")] if self.entire[t] else [])]
            case MulticlassTask():
                return [Column(task.name, "mean", "accuracy"), Column(task.name, "mean", "logloss")]
            case OrdinalTask():
                return [Column(task.name, "value"), Column(task.name, "mean", "accuracy")]
            case LognormalTask():
                return [Column(task.name, "value"), Column(task.name, "binary", "positive_")]
        return [Column(task.name, "value")]

    def __call__(self, outputs: Tensor, batch: Batch) -> Scored:
        outputs, tasks = outputs.detach().float(), self.config.tasks
        labels = torch.where(batch.weights > 0, batch.labels, 0.0)
        joint, joint_weights = joint_labels(self.config, labels, batch.weights)
        z = [outputs[:, place] for place in self.places]
        predicted = self.predictions(outputs, batch.sparse, batch.extras)
        oracle = torch.full((len(outputs), 2 * len(tasks)), torch.nan) if batch.oracle is None else batch.oracle
        nothing = oracle.new_full((len(outputs),), torch.nan)
        out: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for t, task in enumerate(tasks):
            y, w, space = labels[:, t], batch.weights[:, t], self.config.space(task)
            match task:
                case BinaryTask():
                    own = (joint[:, t], joint_weights[:, t]) if space == "joint" else (y, w)
                    out.append((predicted[t], *own, oracle[:, t]))
                    if space == "entire":
                        out.append((joint_logit([predicted[i] for i in self.lineages[t]]), joint[:, t], joint_weights[:, t], nothing))
                    if self.entire[t]:
                        truth = oracle[:, len(tasks) + t].to(outputs.device)
                        known = ~truth.isnan()
                        weight = torch.where(known, batch.weights.amax(1), 0.0)
                        out.append((predicted[t], torch.where(known, truth, 0.0), weight, truth))
                case MulticlassTask():
                    true = y.long()[:, None]
                    out.append(((predicted[t].argmax(1) == true[:, 0]).float(), y, w, nothing))
                    out.append((-predicted[t].gather(1, true)[:, 0], y, w, nothing))
                case OrdinalTask():
                    out.append((predicted[t], y, w, nothing))
                    out.append((((z[t] > 0).sum(1) == y).float(), y, w, nothing))
                case LognormalTask():
                    out.append((predicted[t], y, w, nothing))
                    out.append((z[t][:, 0], (y > 0).float(), w, nothing))
                case _:
                    out.append((predicted[t], y, w, nothing))
        return Scored(*(torch.stack([c.to(outputs.device) for c in column], dim=1) for column in zip(*out, strict=True)))
