"""The layers that experts, gates and towers are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.model.kernels import Late, linear_relu


class Experts(nn.Module):
    """E networks of one shape, their weights stacked: (E, out, in) per layer. ReLU and dropout after every layer.

    A slice of a stacked weight is contiguous, so every expert runs its own fast GEMM (kernels.py); nothing is stacked at run time.

    forward: (B, in), or one (B, in) per expert → E tensors (B, out)
    """

    def __init__(self, num_experts: int, width: int, layers: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        sizes = list(zip((width, *layers), layers, strict=False))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out, into)) for into, out in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out)) for _, out in sizes)
        self.late: Late | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = math.sqrt(6.0 / weight.shape[2])  # He et al. 2015, fan-in of one expert
            nn.init.uniform_(weight, -bound, bound)
            nn.init.zeros_(bias)

    def postpone(self) -> None:
        """In the next forward the first layer's weight is one whose gradient is found late (kernels.Late)."""
        self.late = Late(self.weights[0])

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        hs = [x] * self.weights[0].shape[0] if isinstance(x, Tensor) else x
        late, self.late = self.late, None
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hs, late = linear_relu(hs, weight, bias, late), None
            if self.dropout:
                hs = [F.dropout(h, self.dropout, self.training) for h in hs]
        return list(hs)


class Gate(nn.Linear):
    """Softmax over experts (Ma et al. 2018, eq. 7). Zero weights at start: every expert counts the same.

    forward: (B, in) → (1, E, B)
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return gates([self], x)


def gates(several: Iterable[Gate], x: Tensor) -> Tensor:
    """Gates of one size over one input, as one GEMM: T gates, (B, in) → (T, E, B), float32. Over its last dimension softmax is slow."""
    several = list(several)
    logits = F.linear(x, torch.cat([g.weight for g in several]), torch.cat([g.bias for g in several]))
    return F.softmax(logits.T.unflatten(0, (len(several), -1)), dim=1, dtype=torch.float32)


def over_all(weights: Sequence[Tensor], places: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """Gates of several tasks side by side, 0 for experts that a task does not see, and without gradient: T × (1, e, B) → (T, E, B)."""
    whole = weights[0].new_zeros(len(weights), num_experts, weights[0].shape[2])
    for row, weight, place in zip(whole, weights, places, strict=True):
        row[place] = weight[0].detach()
    return whole


class Scale(nn.Linear):
    """2·sigmoid(Wx + b), a factor of something else. Zero weights at start: exactly 1.

    forward: (B, in) → (B, out)
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).sigmoid()


class Output(nn.Linear):
    """The last layer of a tower, with a chosen bias at start; in full precision, whatever came before.

    forward: (B, in) → (B, out)
    """

    def __init__(self, width: int, outputs: int = 1, start: float = 0.0):
        self.start = start
        super().__init__(width, outputs)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Thresholds(nn.Module):
    """One score less each of K thresholds, logits of being above them; never in the wrong order (Cao et al. 2020, CORAL).

    The k-th threshold is the first plus softplus steps, so they increase whatever is learnt.

    forward: (B, in) → (B, K)
    """

    def __init__(self, width: int, thresholds: int):
        super().__init__()
        self.score = Output(width)
        self.steps = nn.Parameter(torch.empty(thresholds - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.steps, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            steps = F.softplus(self.steps)
            below = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
            return self.score(x) - below + below.mean()


class Tower(nn.Module):
    """A task's own network down to its outputs.

    forward: (B, in) → (B, outputs)
    """

    def __init__(self, width: int, layers: Sequence[int], output: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.hidden = nn.ModuleList(nn.Linear(into, out) for into, out in zip((width, *layers), layers, strict=False))
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            (x,) = linear_relu([x], layer.weight[None], layer.bias[None])
            x = F.dropout(x, self.dropout, self.training)
        return self.output(x)
