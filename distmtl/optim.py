"""Fused table optimizer, dense optimizer and schedule as the one optimizer that the train pipeline steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import proxy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmtl.config import AdagradDense, AdamDense, AdamWDense, OptimizerConfig, ScheduleConfig, SgdDense


class Optimizers:
    """Steps everything that is trained.

    Dense gradients live in one flat buffer: one all-reduce, in an order that never changes (a resumed run is bit-equal to
    an uninterrupted one), one norm, one zeroing. It begins when the last of them is there, while the tables' gradients are
    exchanged. Tables are stepped by FBGEMM inside backward; here they get their learning rate.

    Args:
        fused: TorchRec's optimizer of the sharded tables.
        dense: name → parameter of everything else.
        trained: whether the step's update is to be made; asked after backward.
        counters: of the steps made, where the tables' optimizer keeps its own.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        fused: Any,
        dense: dict[str, nn.Parameter],
        total_steps: int,
        trained: Callable[[], Tensor],
        counters: Sequence[Tensor] = (),
    ):
        self.config, self.fused, self.total_steps, self.trained, self.counters = config, fused, total_steps, trained, counters
        self.parameters = dict(sorted(dense.items()))
        self.gradients = _flat_gradients(list(self.parameters.values()))
        self.dense = dense_optimizer(config, list(self.parameters.values()))
        self.missing = len(self.parameters)  # gradients of this step that are not there yet
        self.exchange: dist.Work | None = None  # their all-reduce
        if dist.is_initialized() and dist.get_world_size() > 1:
            me = proxy(self)  # a circle of references through a hook would never be collected, and hold the tables
            for parameter in self.parameters.values():
                parameter.register_post_accumulate_grad_hook(lambda p: me._arrived(p))
        self.base = [g["lr"] for g in self._groups()]
        self.set_step(0)

    def _groups(self) -> list[dict[str, Any]]:
        return [*self.fused.param_groups, *self.dense.param_groups]

    def set_step(self, step: int) -> None:
        """Set every learning rate, and count, for the step about to be made."""
        for counter in self.counters:
            counter.fill_(step)
        factor = learning_rate_factor(self.config.schedule, step, self.total_steps)
        for group, lr in zip(self._groups(), self.base, strict=True):
            group["lr"] = lr * factor

    @property
    def dense_lr(self) -> float:
        return self.dense.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        self.fused.zero_grad()  # sends the learning rate to FBGEMM, before the backward that uses it
        self.gradients.zero_()
        self.missing, self.exchange = len(self.parameters), None

    def _arrived(self, parameter: Tensor) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.exchange = dist.all_reduce(self.gradients, async_op=True)

    def step(self) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            exchange = self.exchange or dist.all_reduce(self.gradients, async_op=True)  # a parameter was not used in this step
            exchange.wait()
        if self.gradients.is_cuda and isinstance(self.dense, torch.optim.Adam):
            self.dense.found_inf = (~self.trained()).float()  # its kernel looks there itself: the host need not wait for the step
        elif not bool(self.trained()):
            return
        if self.config.clip_norm:
            norm = self.gradients.norm()
            self.gradients.mul_((self.config.clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0))
        self.dense.step()

    def dense_state(self) -> dict[str, Any]:
        """Optimizer state by parameter name."""
        state = self.dense.state_dict()["state"]
        return {name: state[i] for i, name in enumerate(self.parameters) if i in state}

    def load_dense_state(self, state: dict[str, Any]) -> None:
        whole = self.dense.state_dict()
        whole["state"] = {i: state[name] for i, name in enumerate(self.parameters) if name in state}
        self.dense.load_state_dict(whole)


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from 1/warmup_steps to 1, then decay reaching `final` at the last step."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    done = min((step - schedule.warmup_steps) / max(total_steps - 1 - schedule.warmup_steps, 1), 1.0)
    left = 1.0 - done if schedule.decay == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return schedule.final + (1.0 - schedule.final) * left


def _flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Give every parameter a gradient that is a view of one buffer."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    start = 0
    for p in parameters:
        p.grad = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return flat


def dense_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    match config.dense:
        case AdamDense(lr=lr, betas=betas, eps=eps):
            return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, fused=True)
        case AdamWDense(lr=lr, betas=betas, eps=eps, weight_decay=decay):
            return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
        case AdagradDense(lr=lr, eps=eps):
            on_cpu = parameters[0].device.type == "cpu"  # torch 2.11 has no fused kernel of it elsewhere
            return torch.optim.Adagrad(parameters, lr=lr, eps=eps, fused=on_cpu)
        case SgdDense(lr=lr, momentum=momentum):
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, fused=True)
