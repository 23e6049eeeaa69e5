"""The hand-written backward passes against finite differences; both precisions; the kernel that is chosen."""

from pathlib import Path

import pytest
import tiny
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from distmtl.config_file import parse_config
from distmtl.distributed import matmul
from distmtl.model.head import Head
from distmtl.model.kernels import Late, Run, linear_relu, mix, side_by_side
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense

B = 7


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reads", [(0, 0, 0), (0, 1, 2), (1, 0, 1)], ids=["shared", "own", "mixed"])
def test_linear_relu(reads):
    inputs, weight, bias = [normal(B, 5) for _ in range(max(reads) + 1)], normal(3, 4, 5), normal(3, 4)

    def layers(weight, bias, *inputs):
        return tuple(linear_relu([inputs[i] for i in reads], weight, bias))

    assert gradcheck(layers, (weight, bias, *inputs))
    for e, out in enumerate(layers(weight, bias, *inputs)):
        torch.testing.assert_close(out, F.relu(F.linear(inputs[reads[e]], weight[e], bias[e])))


class Passed(torch.autograd.Function):
    """Notes when a gradient passes."""

    @staticmethod
    def forward(ctx, x, log, name):
        ctx.log, ctx.name = log, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append(ctx.name)
        return gradient, None, None


def test_a_late_weight_read_twice_in_bf16_gets_the_sum_of_both_at_every_backward():
    x, weight, bias = torch.randn(B, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found = []
    for late in (None, Late(weight)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(out.float().square().sum() for out in linear_relu([x] * 3, weight, bias, late))
            loss = loss + sum(out.float().sum() for out in linear_relu([2 * x, x, x], weight, bias, late))
        of_once, _ = torch.autograd.grad(loss, (weight, x), retain_graph=True)
        of_twice, of_x = torch.autograd.grad(loss, (weight, x))
        assert of_once.dtype == torch.float32 and torch.equal(of_once, of_twice)
        found.append((of_twice, of_x))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2**-7, atol=1e-2)  # a sum of two in bf16, and in float32
    assert torch.equal(found[1][1], found[0][1])


def test_a_late_weight_gets_the_same_gradient_after_what_was_called_later():
    leaf, weight, bias, log = normal(B, 5), normal(3, 4, 5), normal(3, 4), []
    weight.register_post_accumulate_grad_hook(lambda _: log.append("weight"))

    def loss(late):
        sent = Passed.apply(leaf, log, "sent")
        late = Late(weight) if late else None
        return sum((out**2).sum() for out in linear_relu([Passed.apply(sent, log, "awaited")] * 3, weight, bias, late))

    found = []
    for late in (False, True):
        leaf.grad = weight.grad = bias.grad = None
        loss(late).backward()
        found.append((weight.grad, bias.grad, leaf.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert log == ["weight", "awaited", "sent", "awaited", "weight", "sent"]
    (of_leaf,) = torch.autograd.grad(loss(True), leaf)  # nobody asks for the weight's
    torch.testing.assert_close(of_leaf, leaf.grad, rtol=0, atol=0)


def test_mix():
    gates, experts = normal(2, 3, B), [normal(B, 4) for _ in range(3)]
    assert gradcheck(lambda g, *e: tuple(mix(g, e)), (gates, *experts))
    torch.testing.assert_close(torch.stack(mix(gates, experts), 1), torch.bmm(gates.permute(2, 0, 1), torch.stack(experts, 1)))


def test_side_by_side():
    pooled, dense, scales = normal(B, 8), torch.randn(B, 3, dtype=torch.float64), torch.rand(1, B, dtype=torch.float64)
    blocks = [[Run(5, 3), Run(0, 2, scale=0)], [Run(2, 3)]]
    assert gradcheck(lambda p: side_by_side(p, blocks, scales, dense), (pooled,))
    assert gradcheck(lambda p, d: side_by_side(p, blocks, scales, d), (pooled, normal(B, 3)))
    expected = torch.cat([pooled[:, 5:], pooled[:, :2] * scales[0, :, None], dense], 1), torch.cat([pooled[:, 2:5], dense], 1)
    torch.testing.assert_close(side_by_side(pooled, blocks, scales, dense), expected)


@pytest.mark.parametrize("model", [{"kind": "mmoe", "num_experts": 3, "expert": [16, 8]}, {"kind": "shared_bottom", "bottom": [16, 8]}])
def test_a_head_in_bf16_is_the_one_in_fp32_but_for_rounding(model):
    heads = []
    for precision in ("fp32", "bf16"):
        config = parse_config(tiny.raw(Path(), Path(), model=model, train={"global_batch_size": 8, "precision": precision}))
        heads.append(Head(config, Layout({}, 12)))
        initialise_dense(heads[-1], 0)
    x = torch.randn(64, 12)
    exact, rounded = (head(Features((x,))) for head in heads)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05
    for head, logits in zip(heads, (exact, rounded), strict=True):
        logits.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in head.parameters())
    a, b = (torch.cat([p.grad.flatten() for p in head.parameters()]) for head in heads)
    assert F.cosine_similarity(a, b, dim=0) > 0.999


def test_onednn_is_refused_where_it_rounds(monkeypatch):
    """As on a CPU with AMX, where the same switch may compute in bfloat16."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    errors = iter([1e-6, 1e-3])
    monkeypatch.setattr(matmul, "_error", lambda: next(errors))
    try:
        assert "are not float32 here" in matmul.fastest_fp32.__wrapped__()
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
