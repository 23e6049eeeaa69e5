"""What oracles of heads and losses, written out in float64, are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.batch import Batch
from distmtl.model.experts import Experts, Gate

M = TypeVar("M", bound=nn.Module)


def expert_by_hand(experts: Experts, e: int, x: Tensor) -> Tensor:
    for weight, bias in zip(experts.weights, experts.biases, strict=True):
        x = (x @ weight[e].T + bias[e]).clamp(min=0)
    return x


def gate_by_hand(gate: Gate, x: Tensor) -> Tensor:
    exp = (x @ gate.weight.T + gate.bias).exp()
    return exp / exp.sum(1, keepdim=True)


def randomised(module: M) -> M:
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module


def double_softmax(monkeypatch) -> None:
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype: torch.softmax(x, dim))  # the oracle is in float64


def batch_of(labels: Sequence[Sequence[float]], weights: Sequence[float]) -> Batch:
    """Rows without features; a NaN label is unknown, and is left in place: what is masked must not be computed with."""
    y, rows = torch.tensor(labels, dtype=torch.float32), len(labels)
    known = torch.tensor(weights, dtype=torch.float32)[:, None] * ~y.isnan()
    return Batch(
        KeyedJaggedTensor.from_lengths_sync([], torch.empty(0), torch.empty(0)), torch.empty(rows, 0), y, known, torch.arange(rows)
    )
