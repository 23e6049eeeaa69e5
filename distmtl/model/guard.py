"""Guard: tables stay as they are in a step whose update is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Guard(nn.Module):
    """Between the tables and everything else. Tables are updated within backward, and a loss of 0 does not keep them as they are where
    something overflowed on its way: 0 · NaN is NaN. Here such a gradient becomes 0. (Under `adam`, which FBGEMM has on CUDA
    alone, rows that were looked up still move by its moments.)

    trained: whether the step's update is made; the joint loss says so before backward.

    forward: any tensor → the same
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.tensor(True)

    def forward(self, x: Tensor) -> Tensor:
        return _Guarded.apply(self, x) if x.requires_grad and torch.is_grad_enabled() else x


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, guard: Guard, x: Tensor) -> Tensor:
        ctx.guard = guard
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        trained = ctx.guard.trained
        if trained.device.type == "cpu":  # asking is free
            return None, gradient if trained else torch.zeros_like(gradient)
        return None, torch.where(trained, gradient, 0.0)
