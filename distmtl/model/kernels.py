"""The operations that a step spends its time in outside the tables, with backward passes that make no copy they need not make.

They run on every device; on CPU linear and ReLU are one oneDNN kernel. Under autocast inputs are cast as F.linear's would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

UNREAD = [0.0]  # relu has no parameters, but torch.export cannot write an empty list of them


class Late:
    """A weight whose gradient is found late in backward: when nothing is left to do of what was called after this was made.

    Of the nodes that are ready autograd runs the one that was made last. Made when a batch's lookups are under way to other ranks, before
    they are waited for, this one's turn is when the vectors' gradients are under way back: the products of a weight's gradient hide
    them, and one that is found at once would have delayed them.
    """

    def __init__(self, weight: Tensor):
        self.work: list[Callable[[], Tensor]] = []
        self.token = _Late.apply(self.work, weight)


def linear_relu(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, late: Late | None = None) -> list[Tensor]:
    """ReLU(xₑ·Wₑᵀ + bₑ) of E layers of one shape; the same tensor given several times is one input.

    xs: E tensors (B, in); weight (E, out, in), bias (E, out) → E tensors (B, out)
    """
    inputs = {id(x): x for x in xs}
    place = {key: i for i, key in enumerate(inputs)}
    weight, bias, *given = _cast(weight, bias, *inputs.values())
    reads, owner = tuple(place[id(x)] for x in xs), late.token if late else weight
    return list(_LinearReLU.apply(reads, late and late.work, owner, weight.detach(), bias, *given))


def mix(gates: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """Σₑ gates[t, e]·expertₑ for every t, accumulated without stacking the experts.

    gates (T, E, B), E tensors (B, H) → T tensors (B, H)
    """
    return list(_Mix.apply(gates.to(experts[0].dtype), *experts))


@dataclass(frozen=True)
class Run:
    """Neighbouring columns: first … first+width-1, multiplied by a row of the scales."""

    first: int
    width: int
    scale: int | None = None


def side_by_side(
    pooled: Tensor, blocks: Sequence[Sequence[Run]], scales: Tensor | None, dense: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """For every block its runs of columns of `pooled`, then `dense`; cast on the way. Every column of `pooled` is in one run.
    `dense` gets a gradient where it is no data. dtype: that of `dense` unless given.

    pooled (B, D), scales (S, B), dense (B, N) → as many (B, width of the block's runs + N)
    """
    return _SideBySide.apply(pooled, tuple(map(tuple, blocks)), scales, dense, dtype or dense.dtype)


def with_dots(x: Tensor, features: int, dim: int) -> Tensor:
    """x, then vᵢ·vⱼ of the vectors in its first features·dim columns, (0, 1), (0, 2), …, (1, 2), …

    (B, D) → (B, D + features·(features-1)/2)
    """
    (x,) = _cast(x)
    return _WithDots.apply(x, features, dim)


def segment_sum(x: Tensor, lengths: Tensor) -> Tensor:
    """Sums of neighbouring rows, the first lengths[0] of them, the next lengths[1], …: (N, …), (B,) → (B, …)"""
    return _SegmentSum.apply(x, lengths)


def spread(x: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Row b of x lengths[b] times, `total` rows in all: (B, …), (B,) → (N, …)"""
    return _Spread.apply(x, lengths, total)


def _cast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) for t in tensors]


def _relu_of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_dynamo_compiling():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "relu", UNREAD, "")
    return F.relu(F.linear(x, weight, bias))


def _relu_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """A bfloat16 is positive where its bits are as an integer, and CPUs compare those faster."""
    if gradient.dtype == torch.bfloat16:
        return torch.ops.aten.threshold_backward(gradient.view(torch.int16), output.view(torch.int16), 0).view(torch.bfloat16)
    return torch.ops.aten.threshold_backward(gradient, output, 0)


def _wanted(ctx: Any) -> list[bool]:
    """Of which of its tensors this backward pass is to find the gradient: fewer than need one in torch.autograd.grad(…, inputs)."""
    return [node is not None and _runs(node) for node, _ in ctx.next_functions]


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it does not answer for leaves that are themselves among the inputs
        return True


class _LinearReLU(torch.autograd.Function):
    """Arguments: for every layer the number of its input; where to leave the work of the weight's gradient, or None; what has that
    gradient, the weight or what stands for it (Late); the weight as numbers, bias, the distinct inputs."""

    @staticmethod
    def forward(
        ctx: Any, reads: tuple[int, ...], late: list[Callable[[], Tensor]] | None, _: Tensor, weight: Tensor, bias: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = [_relu_of_linear(inputs[i], weight[e], bias[e]) for e, i in enumerate(reads)]
        ctx.reads, ctx.late = reads, late
        ctx.save_for_backward(weight, *inputs, *outputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        inputs, outputs = saved[: -len(ctx.reads)], saved[-len(ctx.reads) :]
        of_inputs: list[Tensor | None] = [None] * len(inputs)
        needs_weight, _, needs_bias, *needs = _wanted(ctx)
        of_bias = weight.new_empty(weight.shape[:2]) if needs_bias else None
        of_weight = torch.empty_like(weight) if needs_weight and ctx.late is None else None
        later: list[tuple[Tensor, Tensor]] = []
        for e, (i, gradient, output) in enumerate(zip(ctx.reads, gradients, outputs, strict=True)):
            g = _relu_backward(gradient, output)
            if of_weight is not None:
                torch.mm(g.T, inputs[i], out=of_weight[e])
            elif needs_weight:
                later.append((g, inputs[i]))
            if of_bias is not None:
                torch.sum(g, 0, out=of_bias[e])
            if needs[i]:
                so_far = of_inputs[i]
                of_inputs[i] = g @ weight[e] if so_far is None else so_far.addmm_(g, weight[e])
        if later:
            ctx.late.append(lambda: _products(torch.empty_like(weight), later))
        return None, None, of_weight, None, of_bias, *of_inputs


def _products(of_weight: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Every layer's gᵀ·x in its place."""
    for out, (g, x) in zip(of_weight, layers, strict=True):
        torch.mm(g.T, x, out=out)
    return of_weight


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: list[Callable[[], Tensor]], weight: Tensor) -> Tensor:
        ctx.work, ctx.dtype = work, weight.dtype
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        found = [find().to(ctx.dtype) for find in ctx.work]
        ctx.work.clear()
        return None, sum(found[1:], found[0])


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, blocks: tuple[tuple[Run, ...], ...], scales: Tensor | None, dense: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.scales, ctx.like, ctx.dense = blocks, scales, (pooled.shape, pooled.dtype), (dense.shape[1], dense.dtype)
        outs = []
        for runs in blocks:
            out = dense.new_empty(dense.shape[0], sum(r.width for r in runs) + dense.shape[1], dtype=dtype)
            start = 0
            for run in runs:
                columns = pooled[:, run.first : run.first + run.width]
                out[:, start : start + run.width] = columns if run.scale is None else columns * scales[run.scale, :, None]  # type: ignore[index]
                start += run.width
            out[:, start:] = dense
            outs.append(out)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        shape, dtype = ctx.like
        of_pooled = gradients[0].new_empty(shape, dtype=dtype)
        for runs, gradient in zip(ctx.blocks, gradients, strict=True):
            start = 0
            for run in runs:
                columns = gradient[:, start : start + run.width]
                if run.scale is not None:
                    columns = columns * ctx.scales[run.scale, :, None]
                of_pooled[:, run.first : run.first + run.width] = columns
                start += run.width
        of_dense = None
        if ctx.needs_input_grad[3]:
            columns, dtype = ctx.dense
            of_dense = torch.stack([g[:, g.shape[1] - columns :] for g in gradients]).sum(0, dtype=dtype)
        return of_pooled, None, None, of_dense, None


class _WithDots(torch.autograd.Function):
    """With the dots' gradients as a symmetric matrix, that of the vectors is one product too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.features, ctx.dim = features, dim
        vectors = x[:, : features * dim].view(-1, features, dim)
        i, j = _pairs(features, x.device)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([x, dots.index_select(1, i * features + j)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,), features, dim = ctx.saved_tensors, ctx.features, ctx.dim
        i, j = _pairs(features, x.device)
        symmetric, of_dots = gradient.new_zeros(x.shape[0], features * features), gradient[:, x.shape[1] :]
        symmetric.index_copy_(1, i * features + j, of_dots).index_copy_(1, j * features + i, of_dots)
        of_x = gradient[:, : x.shape[1]].clone()
        vectors, of_vectors = (t[:, : features * dim].view(-1, features, dim) for t in (x, of_x))
        of_vectors += torch.bmm(symmetric.view(-1, features, features), vectors)
        return of_x, None, None


def _pairs(features: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # what torch.export makes there is no tensor that could be used again
        return torch.triu_indices(features, features, offset=1, device=device)
    return _kept_pairs(features, device)


@lru_cache
def _kept_pairs(features: int, device: torch.device) -> Tensor:
    return torch.triu_indices(features, features, offset=1, device=device)


class _SegmentSum(torch.autograd.Function):
    """Its adjoint is _Spread: unlike index_add's, both results are the same in every run on CUDA too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        ctx.total = x.shape[0]
        ctx.save_for_backward(lengths)
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (lengths,) = ctx.saved_tensors
        return gradient.repeat_interleave(lengths, 0, output_size=ctx.total), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(lengths)
        return x.repeat_interleave(lengths, 0, output_size=total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (lengths,) = ctx.saved_tensors
        return torch.segment_reduce(gradient.contiguous(), "sum", lengths=lengths, unsafe=True), None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, *experts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gates, *experts)
        return tuple(_weighted_sum(gates[t], experts) for t in range(len(gates)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gates, *experts = ctx.saved_tensors
        of_gates = torch.empty_like(gates)
        for e, expert in enumerate(experts):
            for t, gradient in enumerate(gradients):
                of_gates[t, e] = torch.linalg.vecdot(gradient, expert)
        needed = ctx.needs_input_grad[1:]
        return of_gates, *(_weighted_sum(gates[:, e], gradients) if needs else None for e, needs in enumerate(needed))


def _weighted_sum(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Σᵢ weights[i]·tensorᵢ: (N, B), N tensors (B, H) → (B, H)"""
    out = weights[0, :, None] * tensors[0]
    for i in range(1, len(tensors)):
        out.addcmul_(weights[i, :, None], tensors[i])
    return out
