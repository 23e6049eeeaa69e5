"""The kinds of tasks: what a tower ends in, the loss of a row, and what the outputs predict. float32, nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.config import (
    BinaryTask,
    Config,
    DelayedFeedback,
    FakeNegativeWeighted,
    LognormalTask,
    MulticlassTask,
    OrdinalTask,
    QuantileTask,
    RegressionTask,
    TaskConfig,
    WatchTimeTask,
)
from distmtl.model.experts import Output, Thresholds

MAX_LOG_RATE = 15.0  # of a conversion's delay: e^15 per unit of time


def output_layer(task: TaskConfig, width: int) -> nn.Module:
    """The last layer of a task's tower: (B, width) → (B, task.outputs)."""
    if isinstance(task, OrdinalTask):
        return Thresholds(width, task.outputs)
    return Output(width, task.outputs, task.bias if isinstance(task, RegressionTask) else 0.0)


def places(config: Config) -> list[slice]:
    """The columns of every task in the outputs of a head."""
    out, start = [], 0
    for task in config.tasks:
        out.append(slice(start, start + task.outputs))
        start += task.outputs
    return out


def row_loss(task: TaskConfig, z: Tensor, y: Tensor, extra: Tensor | None) -> Tensor:
    """Loss of every row: outputs (B, task.outputs), labels (B,), the task's extra column (B,) → (B,)."""
    match task:
        case BinaryTask():
            return _binary(task, z, y, extra)
        case RegressionTask():
            return _regression(task, z[:, 0] - y)
        case OrdinalTask():
            above = (y[:, None] > torch.arange(task.levels - 1, device=y.device)).to(z.dtype)
            return F.binary_cross_entropy_with_logits(z, above, reduction="none").sum(1)
        case MulticlassTask():
            return F.cross_entropy(z, y.long(), reduction="none")
        case WatchTimeTask():
            return y * F.softplus(-z[:, 0]) + F.softplus(z[:, 0])
        case QuantileTask():
            return F.binary_cross_entropy_with_logits(z[:, 0], _quantile_of(task, y, extra), reduction="none")
        case LognormalTask():
            return _lognormal(z, y)


def prediction(task: TaskConfig, z: Tensor, extra: Tensor | None) -> Tensor:
    """What is served: (B, task.outputs) → (B,): the corrected logit of a binary task, the expected value (of an ordinal task, the
    expected level) else; of a multiclass task (B, classes), log-probabilities."""
    match task:
        case BinaryTask():
            return z[:, 0] + logit_shift(task)
        case RegressionTask():
            return z[:, 0]
        case OrdinalTask():
            return z.sigmoid().sum(1)
        case MulticlassTask():
            return F.log_softmax(z, dim=1)
        case WatchTimeTask():
            return z[:, 0].exp()
        case QuantileTask():
            return _value_at(task, z[:, 0].sigmoid(), extra)
        case LognormalTask():
            return z[:, 0].sigmoid() * (z[:, 1] + F.softplus(z[:, 2]) ** 2 / 2).exp()


def logit_shift(task: BinaryTask) -> float:
    """From the odds of the training data to those of all: a share w of the negatives was kept, positives counted α times; exact,
    logit q = logit p + ln w - ln α."""
    return math.log(task.kept_negatives) - math.log(task.pos_weight)


def of_all_negatives(config: Config, outputs: Tensor) -> Tensor:
    """Outputs (B, O) with their logits moved from the odds of thinned data (kept_negatives) to those of all, which evaluation sees."""
    shift = outputs.new_zeros(outputs.shape[1])
    for task, place in zip(config.tasks, places(config), strict=True):
        if isinstance(task, BinaryTask):
            shift[place.start] = math.log(task.kept_negatives)
    return outputs + shift


def _binary(task: BinaryTask, z: Tensor, y: Tensor, extra: Tensor | None) -> Tensor:
    logit = z[:, 0]
    if isinstance(task.delay, DelayedFeedback):
        assert extra is not None
        log_rate = z[:, 1].clamp(max=MAX_LOG_RATE)
        waited = log_rate.exp() * extra
        converted = -F.logsigmoid(logit) - log_rate + waited
        not_yet = -torch.logaddexp(F.logsigmoid(-logit), F.logsigmoid(logit) - waited)
        return torch.where(y > 0.5, converted, not_yet)
    error = F.binary_cross_entropy_with_logits(logit, y, reduction="none")
    if isinstance(task.delay, FakeNegativeWeighted):
        p = logit.detach().sigmoid()
        return error * (1 + p) * torch.where(y > 0.5, 1.0, 1 - p)
    if task.focal:
        missed = F.logsigmoid(torch.where(y > 0.5, -logit, logit))  # log of the probability of what did not happen; 0^γ has no gradient
        error = error * (task.focal * missed).exp()
    return error * torch.where(y > 0.5, task.pos_weight, 1.0) if task.pos_weight != 1.0 else error


def _regression(task: RegressionTask, difference: Tensor) -> Tensor:
    match task.loss:
        case "half_squared":
            return 0.5 * difference**2
        case "squared":
            return difference**2
        case "absolute":
            return difference.abs()
        case "huber":
            return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=task.delta)


def _lognormal(z: Tensor, y: Tensor) -> Tensor:
    positive = y > 0
    log_y = torch.where(positive, y, 1.0).log()
    scale = F.softplus(z[:, 2]).clamp(min=1e-6)
    density = log_y + scale.log() + 0.5 * math.log(2 * math.pi) + (log_y - z[:, 1]) ** 2 / (2 * scale**2)
    return F.binary_cross_entropy_with_logits(z[:, 0], positive.to(z.dtype), reduction="none") + torch.where(positive, density, 0.0)


def _grid(task: QuantileTask, like: Tensor, extra: Tensor | None) -> Tensor:
    """The quantiles of each row's duration group: (B, Q)."""
    grid = like.new_tensor(task.quantiles)
    if extra is None:
        return grid.expand(len(like), -1)
    return grid[torch.bucketize(extra.contiguous(), like.new_tensor(task.duration_edges), right=True)]


def _quantile_of(task: QuantileTask, y: Tensor, extra: Tensor | None) -> Tensor:
    grid = _grid(task, y, extra).contiguous()
    last = grid.shape[1] - 1
    above = torch.searchsorted(grid, y[:, None].contiguous(), right=True)[:, 0].clamp(1, last)
    low, high = (grid.gather(1, i[:, None])[:, 0] for i in (above - 1, above))
    return ((above - 1 + (y - low) / (high - low)) / last).clamp(0, 1)


def _value_at(task: QuantileTask, q: Tensor, extra: Tensor | None) -> Tensor:
    grid = _grid(task, q, extra)
    at = q * (grid.shape[1] - 1)
    below = at.floor().long().clamp(0, grid.shape[1] - 2)
    low, high = (grid.gather(1, i[:, None])[:, 0] for i in (below, below + 1))
    return low + (at - below) * (high - low)
