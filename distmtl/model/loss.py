"""The joint loss L = Σ λᵢ·Lᵢ over the tasks, exact over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.batch import Batch
from distmtl.config import BinaryTask, TaskConfig


@dataclass
class StepNumbers:
    """What a step tells the loop, on the device, detached."""

    step: int
    losses: Tensor  # (T,) mean loss of every task over all ranks, 0 where nothing is known
    weights: Tensor  # (T,) summed weights of every task over all ranks
    non_finite: Tensor  # (T,) rows over all ranks whose loss counts and is not finite
    failed: Tensor  # () ranks whose reader failed
    bad_rows: Tensor  # (B,) this rank's row numbers where `non_finite` counted one, else -1
    trained: Tensor  # () bool, equal on all ranks: the step's update is made
    error: str | None  # why this rank's reader failed


def task_losses(logits: Tensor, labels: Tensor, tasks: Sequence[TaskConfig]) -> Tensor:
    """Loss of every row and task: binary cross-entropy (nats) or ½(ŷ - y)². (B, T), (B, T) → (B, T), float32."""
    logits = logits.float()
    columns = [
        F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t], reduction="none")
        if isinstance(task, BinaryTask)
        else 0.5 * (logits[:, t] - labels[:, t]) ** 2
        for t, task in enumerate(tasks)
    ]
    return torch.stack(columns, dim=1)


class JointLoss(nn.Module):
    """Lᵢ = Σ w·e / Σ w, both sums over all ranks; masked and padding rows have w = 0 and exactly zero gradient.

    Gradients are summed over ranks later, by TorchRec for tables, by Optimizers for the rest. A non-finite loss or a failed
    reader, on any rank, gives every rank zero gradient.

    forward: logits (B, T), batch → scalar loss of this rank, StepNumbers
    """

    def __init__(self, tasks: Sequence[TaskConfig]):
        super().__init__()
        self.tasks = tuple(tasks)
        self.register_buffer("task_weights", torch.tensor([float(t.weight) for t in tasks]), persistent=False)
        self.task_weights: Tensor
        self.trained = torch.tensor(True)  # of the last forward: the optimizer looks here before it steps

    def forward(self, logits: Tensor, batch: Batch) -> tuple[Tensor, StepNumbers]:
        known = batch.weights > 0
        bad = known & ~torch.isfinite(logits.detach())
        labels = torch.where(known, batch.labels, 0.0)  # 0 · NaN is NaN: what is masked must not even be computed with
        errors = task_losses(torch.where(torch.isfinite(logits), logits, 0.0), labels, self.tasks)
        bad |= known & ~torch.isfinite(errors.detach())
        sums = (torch.where(known, errors, 0.0) * batch.weights).sum(0)

        failed = sums.new_tensor([float(batch.error is not None)])
        shared = torch.cat([sums.detach(), batch.weights.sum(0), bad.sum(0), failed]).double()
        if dist.is_initialized():
            dist.all_reduce(shared)
        total, weight, non_finite = shared[:-1].view(3, -1)
        self.trained = (non_finite.sum() == 0) & (shared[-1] == 0)

        share = torch.where(weight > 0, 1.0 / weight.clamp(min=1e-30), 0.0)
        loss = (sums * share.float() * self.task_weights).sum()
        bad_rows = torch.where(bad.any(1), batch.rows, -1)
        numbers = StepNumbers(batch.step, total * share, weight, non_finite, shared[-1], bad_rows, self.trained, batch.error)
        return torch.where(self.trained, loss, 0.0), numbers
