"""Feature crosses against loops in float64, and what the head makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.autograd import gradcheck

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.model.embeddings import FeatureVector
from distmtl.model.head import Head
from distmtl.model.interaction import Cross, Dot
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense

B, WIDTH = 7, 44
CROSSES = [{"kind": "cross", "layers": 2}, {"kind": "cross", "layers": 3, "rank": 4}, {"kind": "dot"}]


def config_with(interaction, precision="fp32", bucket=8):
    raw = tiny.raw(Path(), Path(), interaction=interaction, train={"global_batch_size": 8, "precision": precision})
    raw["features"][4]["dim"] = bucket
    return parse_config(raw)


def head_with(interaction, precision="fp32"):
    config = config_with(interaction, precision)
    head = Head(config, Layout.of(config))
    initialise_dense(head, 0)
    return head


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_by_hand(rank):
    width, layers = 5, 3
    cross, x0 = Cross(width, layers, rank).double(), torch.randn(B, width, dtype=torch.float64)
    out = cross(x0)
    for row in range(B):
        x = x0[row].tolist()
        for layer in cross.layers:
            if rank is None:
                weight, bias = layer.weight.tolist(), layer.bias.tolist()
            else:
                u, v, bias = layer[1].weight.tolist(), layer[0].weight.tolist(), layer[1].bias.tolist()
                weight = [[sum(u[i][k] * v[k][j] for k in range(rank)) for j in range(width)] for i in range(width)]
            wx = [sum(weight[i][j] * x[j] for j in range(width)) + bias[i] for i in range(width)]
            x = [x0[row, i].item() * wx[i] + x[i] for i in range(width)]
        assert out[row].tolist() == pytest.approx(x, abs=1e-12)


def test_dot_by_hand():
    features, dim, rest = 4, 3, 2
    x = torch.randn(B, features * dim + rest, dtype=torch.float64)
    out = Dot(features, dim)(x)
    for row in range(B):
        v = [x[row, f * dim : (f + 1) * dim].tolist() for f in range(features)]
        dots = [sum(a * b for a, b in zip(v[i], v[j], strict=True)) for i in range(features) for j in range(i + 1, features)]
        assert out[row].tolist() == pytest.approx([*x[row].tolist(), *dots], abs=1e-12)
    assert gradcheck(Dot(features, dim), x.requires_grad_())


def test_dots_are_of_the_embeddings_and_places_stay():
    """The first product is of the first two features, whatever else is in the vector."""
    config = config_with({"kind": "dot"})
    layout = Layout.of(config)
    head = Head(config, layout)
    x = torch.randn(B, layout.width)
    crossed = head.interaction(x)
    assert crossed.shape == (B, layout.width + 10) and torch.equal(crossed[:, : layout.width], x)
    user, item = (x[:, slice(*layout.places[name])] for name in ("user", "item"))
    torch.testing.assert_close(crossed[:, layout.width], (user * item).sum(1))


@pytest.mark.parametrize("interaction", CROSSES, ids=["cross", "low rank", "dot"])
def test_gradient_reaches_everything(interaction):
    head = head_with(interaction)
    x = torch.randn(64, WIDTH, requires_grad=True)
    (head(Features((x,))) * torch.randn(64, 3)).sum().backward()
    assert [n for n, p in head.named_parameters() if "gates" not in n and not p.grad.abs().sum() > 0] == []
    assert (x.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("interaction", CROSSES, ids=["cross", "low rank", "dot"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bf16_is_fp32_but_for_rounding(interaction, given):
    x, (exact, rounded) = torch.randn(64, WIDTH), (head_with(interaction, p) for p in ("fp32", "bf16"))
    a, b = exact(Features((x,))), rounded(Features((x.to(given),)))
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.1
    for head, out in ((exact, a), (rounded, b)):
        out.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in head.parameters())


@pytest.mark.parametrize(
    ("interaction", "sentence"),
    [
        ({"kind": "dot"}, "interaction dot: embeddings need one dim, but 'x_bucket' has 4, and the others 8; make them equal"),
        ({"kind": "cros"}, "interaction: kind 'cros' is not one of cross, dot; did you mean 'cross'?"),
        ({"kind": "cross", "rnk": 3}, "interaction.rnk: unknown key; did you mean 'rank'?"),
    ],
    ids=["dims", "kind", "key"],
)
def test_mistakes(interaction, sentence):
    with pytest.raises(DistmtlError) as e:
        config_with(interaction, bucket=4)
    assert str(e.value) == f"config: 1 mistake\n  - {sentence}"


def test_a_dot_of_one_embedding_is_refused():
    raw = tiny.raw(Path(), Path(), interaction={"kind": "dot"})
    raw["features"] = [raw["features"][0], raw["features"][5]]
    with pytest.raises(DistmtlError, match="two embedded features or more"):
        parse_config(raw)


def test_projected_vectors_by_hand():
    """Places follow the projected width; only the projected feature is touched; its layer has a name of its own."""
    raw = tiny.raw(Path(), Path())
    raw["features"][5:] = [
        {"kind": "vector", "name": "image", "width": 3, "project": 2},
        raw["features"][5],
        {"kind": "vector", "name": "keys", "column": "image", "width": 3},
    ]
    config = parse_config(raw)
    dense = FeatureVector(config).dense.double()
    assert Layout.of(config).places["image"] == (36, 38) and Layout.of(config).places["keys"] == (39, 42)
    assert [n for n, _ in dense.named_parameters()] == ["linear.of_image.weight", "linear.of_image.bias"]
    x = torch.randn(B, 7, dtype=torch.float64)
    weight, bias = dense.linear["of_image"].weight.tolist(), dense.linear["of_image"].bias.tolist()
    for row, out in zip(x.tolist(), dense(x).tolist(), strict=True):
        projected = [sum(w * a for w, a in zip(weight[i], row[:3], strict=True)) + bias[i] for i in range(2)]
        assert out == pytest.approx([*projected, *row[3:]], abs=1e-12)
