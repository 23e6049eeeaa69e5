"""STAR, PEPNet, HoME and the normalisation under them, each against a loop written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.model.head import Head
from distmtl.model.home import HoME
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense
from distmtl.model.normalisation import PartitionedNorm
from distmtl.model.pepnet import PEPNet
from distmtl.model.shared_bottom import SharedBottom
from distmtl.model.star import STAR

DOMAIN = {"kind": "id", "name": "domain", "rows": 3, "dim": 4}
HEADS = [
    {"kind": "star", "domain": "domain", "bottom": [16, 8], "auxiliary": [4]},
    {"kind": "home", "groups": [["click", "rating"], ["conversion"]], "experts": 2, "expert": [16, 8], "feature_rank": 4},
    {"kind": "home", "experts": 1, "expert": [8]},
    {"kind": "pepnet", "domain_features": ["domain"], "gate_features": ["user", "item"], "tower": [16, 8], "gate_hidden": 6},
]
B, TASKS, EPS = 40, 3, 1e-5
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


def config(model: dict) -> Config:
    raw = tiny.raw(Path(), Path(), model=model)
    raw["features"].insert(2, DOMAIN)
    return parse_config(raw)


def head(model: dict, seed: int = 0) -> Head:
    built = Head(config(model), Layout.of(config(model)))
    initialise_dense(built, seed)
    return built


def rows(n: int, width: int, dtype: torch.dtype = torch.float32, padding: int = 0) -> Features:
    """Random rows; the last ones are padding."""
    real = torch.arange(n) < n - padding
    return Features((torch.randn(n, width, dtype=dtype),), torch.where(real, torch.randint(0, 3, (n,)), 0), real)


def randomised(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module


@pytest.mark.parametrize("model", HEADS, ids=lambda m: f"{m['kind']}-{m.get('experts', '')}")
class TestContract:
    def test_every_parameter_gets_gradient(self, model):
        h = head(model)
        with torch.no_grad():  # what starts at zero hides what lies behind it
            for p in h.parameters():
                p += 0.1 * torch.randn_like(p)
        features = rows(256, Layout.of(config(model)).width)
        features.x.requires_grad_()
        outputs = h(features)
        assert outputs.shape == (256, TASKS) and outputs.dtype == torch.float32
        (outputs.sigmoid() * torch.randn(256, TASKS)).sum().backward()
        assert [n for n, p in h.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
        assert features.x.grad.abs().sum() > 0

    def test_a_domain_without_rows_has_a_gradient_of_zero(self, model):
        h, features = head(model), rows(9, Layout.of(config(model)).width)
        h(Features(features.vectors, torch.zeros_like(features.domain), features.real)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())

    def test_initial_weights_come_from_seed_and_name(self, model):
        a, b, c = head(model), head(model), head(model, seed=1)
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))

    def test_padding_changes_nothing_and_rows_do_not_see_each_other_in_evaluation(self, model):
        width = Layout.of(config(model)).width
        a, b = head(model), head(model)
        features = rows(B, width, padding=5)
        half = [v[:-5] for v in (features.x, features.domain, features.real)]
        torch.testing.assert_close(a(features)[:-5], b(Features((half[0],), half[1], half[2])))
        assert all(torch.allclose(v, b.state_dict()[k], atol=1e-6) for k, v in a.state_dict().items())
        a.eval()
        one = Features((features.x[7:8],), features.domain[7:8], features.real[7:8])
        torch.testing.assert_close(a(features)[7:8], a(one))

    def test_in_bfloat16_it_is_about_the_same(self, model):
        features, whole, half = rows(B, Layout.of(config(model)).width), head(model), head(model)
        half.bf16 = True
        torch.testing.assert_close(half(features), whole(features), rtol=0.1, atol=0.1)
        kept = [(k, v) for k, v in half.state_dict().items() if "norm." in k]
        assert all(v.dtype in (torch.float32, torch.int64) for _, v in kept) and bool(kept) == (model["kind"] != "pepnet")


# --------------------------------------------------------------------------------------------------------- normalisation


def norm_by_hand(norm: PartitionedNorm, z: torch.Tensor, domain: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(z)
    for p in range(norm.domains):
        mine = [i for i in range(len(z)) if real[i] and domain[i] == p]
        for d in range(z.shape[1]):
            mean = sum(z[i, d] for i in mine) / max(len(mine), 1)
            variance = sum((z[i, d] - mean) ** 2 for i in mine) / max(len(mine), 1)
            gamma = norm.weight[d] * (1 if norm.own_weight is None else 1 + norm.own_weight[p, d])
            beta = norm.bias[d] + (0 if norm.own_bias is None else norm.own_bias[p, d])
            for i in mine:
                out[i, d] = gamma * (z[i, d] - mean) / (variance + EPS) ** 0.5 + beta
    return out


@pytest.mark.parametrize("domains", [1, 3])
def test_norm_by_hand(domains):
    norm = randomised(PartitionedNorm(3, domains))
    z = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    domain, real = torch.randint(0, domains, (12,)), torch.arange(12) < 9
    expected = norm_by_hand(norm, z, domain, real)
    torch.testing.assert_close(norm(z, domain, real)[real], expected[real], **DOUBLE)
    weights = torch.randn(12, 3, dtype=torch.float64) * real[:, None]  # as of rows that count for nothing
    inputs = [z, *norm.parameters()]
    for a, b in zip(
        torch.autograd.grad((norm(z, domain, real) * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **DOUBLE)


def test_norm_is_one_batch_norm_per_domain():
    """torch's, with no momentum: its running statistics then are the means over batches, as ours are while all have one size."""
    ours, theirs = PartitionedNorm(5, 3), [nn.BatchNorm1d(5, momentum=None) for _ in range(3)]
    domain, real = torch.tensor([0, 1, 2, 1, 0, 2, 0, 1] * 4 + [0, 0]), torch.arange(34) < 32
    for _ in range(6):
        z = 2 + 3 * torch.randn(34, 5)
        out = ours(z, domain, real)
        for p in range(3):
            mine = (domain == p) & real
            torch.testing.assert_close(out[mine], theirs[p](z[mine]), rtol=1e-4, atol=1e-5)
    assert ours.seen.tolist() == [72, 72, 48]
    for p in range(3):
        torch.testing.assert_close(ours.mean[p], theirs[p].running_mean)
        torch.testing.assert_close(ours.variance[p], theirs[p].running_var, rtol=1e-4, atol=1e-5)
    ours.eval()
    out = ours(z, domain, real)
    for p in range(3):
        mine = (domain == p) & real
        torch.testing.assert_close(out[mine], theirs[p].eval()(z[mine]), rtol=1e-4, atol=1e-5)


def test_running_statistics_move_by_momentum_in_the_long_run():
    norm = PartitionedNorm(1, momentum=0.25)
    for value in (0.0, 4.0, 4.0, 4.0, 8.0, 8.0):
        norm(torch.full((2, 1), value))
    mean = 3.0  # of the first four batches
    for value in (8.0, 8.0):
        mean += 0.25 * (value - mean)
    assert norm.mean.item() == pytest.approx(mean)


def test_few_rows_leave_running_statistics_sound():
    norm = PartitionedNorm(2, 3)
    one = torch.tensor([[3.0, 4.0]])
    assert torch.equal(norm(one, torch.tensor([1])), torch.zeros(1, 2))
    assert norm.seen.tolist() == [0, 1, 0] and torch.equal(norm.mean, torch.tensor([[0.0, 0], [3, 4], [0, 0]]))
    assert torch.equal(norm.variance, torch.ones(3, 2))  # one row has none
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm(torch.full((4, 2), torch.nan), torch.tensor([1, 1, 0, 0]))  # the loss is not finite either, and the step is skipped
    norm(one, torch.tensor([1]), torch.tensor([False]))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("far", [1e2, 1e3, 1e4])
def test_a_mean_that_is_large_beside_the_deviation(far):
    """A year, a time stamp, a price: float32's squares of such numbers have lost what they differ by."""
    norm, z, domain = PartitionedNorm(3, 2), far + torch.randn(4096, 3), torch.arange(4096) % 2
    expected = torch.empty_like(z)
    for p in range(2):
        mine = domain == p
        expected[mine] = nn.functional.batch_norm(z[mine].double(), None, None, training=True).float()
    torch.testing.assert_close(norm(z, domain), expected, rtol=0, atol=1e-5 * far)


def test_statistics_are_in_full_precision_under_autocast():
    norm, z, domain = PartitionedNorm(8, 3), 1 + torch.randn(64, 8), torch.randint(0, 3, (64,))
    expected = norm(z, domain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(z, domain), expected)
        assert norm(z.bfloat16(), domain).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------------ STAR

LAYOUT = Layout({"user": (0, 4), "domain": (4, 8), "item": (8, 10), "x": (10, 12)}, 12, domains=3)


def star(**sizes) -> STAR:
    return STAR(LAYOUT, "domain", TASKS, sizes.get("bottom", (7, 5)), sizes.get("auxiliary", (6, 2)))


def test_star_by_hand():
    m, features = randomised(star()), rows(B, 12, torch.float64, padding=3)
    others = torch.cat([features.x[:, :4], features.x[:, 8:]], dim=1)
    z = norm_by_hand(m.norm, others, features.domain, features.real)
    outputs = m(features)
    assert len(outputs) == TASKS and m.output_width == 7
    for i in range(B):
        p, h, a = int(features.domain[i]), z[i], features.x[i, 4:8]
        for layer in m.bottom:
            h = ((1 + layer.own_weight[p]) * layer.weight @ h + layer.own_bias[p] + layer.bias).clamp(min=0)
        for weight, bias in zip(m.auxiliary.weights, m.auxiliary.biases, strict=True):
            a = (weight[0] @ a + bias[0]).clamp(min=0)
        for out in outputs:
            torch.testing.assert_close(out[i], torch.cat([h, a]), **DOUBLE)


def test_star_starts_as_the_shared_network():
    m, shared, features = star().eval(), SharedBottom(8, TASKS, (7, 5)), rows(B, 12)
    initialise_dense(m, 3)
    with torch.no_grad():
        for depth, layer in enumerate(m.bottom):
            shared.bottom.weights[depth][0], shared.bottom.biases[depth][0] = layer.weight, layer.bias
    others = torch.cat([features.x[:, :4], features.x[:, 8:]], dim=1) / (1 + EPS) ** 0.5  # running statistics are 0 and 1
    torch.testing.assert_close(m(features)[0][:, :5], shared(Features((others,)))[0])


def test_a_domain_trains_its_own_weights_alone():
    m, features = star(), rows(B, 12)
    m(features)[0][features.domain == 1].sum().backward()
    for p in (*(layer.own_weight for layer in m.bottom), *(layer.own_bias for layer in m.bottom), m.norm.own_weight, m.norm.own_bias):
        assert p.grad[1].abs().sum() > 0 and p.grad[0].abs().sum() == p.grad[2].abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------------- PEPNet


def pepnet() -> PEPNet:
    return PEPNet(LAYOUT, 10, ["domain"], ["item", "user"], TASKS, (7, 5), 6)


def gate_by_hand(gate, number: int, u: torch.Tensor) -> torch.Tensor:
    mine = slice(number * gate.hidden, (number + 1) * gate.hidden)
    h = (gate.first.weight[mine] @ u + gate.first.bias[mine]).clamp(min=0)
    return 2 / (1 + (-(gate.scales[number].weight @ h + gate.scales[number].bias)).exp())


def test_pepnet_by_hand():
    """Outputs, and the gradient to the features: none through what the gates read of what they scale."""
    m, features = randomised(pepnet()), rows(B, 12, torch.float64)
    features.x.requires_grad_()
    outputs, weights, total = m(features), torch.randn(B, 5, dtype=torch.float64), 0.0
    for i, x in enumerate(features.x):
        scaled = torch.cat([gate_by_hand(m.epnet, 0, torch.cat([x[4:8], x[:10].detach()])) * x[:10], x[10:]])
        u = torch.cat([x[8:10], x[:4], scaled.detach()])
        for t in range(TASKS):
            h = scaled
            for depth, layer in enumerate(m.layers):
                gate = gate_by_hand(m.ppnet, t * 2 + depth, u)
                h = (layer.weights[0][t] @ h + layer.biases[0][t]).clamp(min=0) * gate
            torch.testing.assert_close(outputs[t][i], h, **DOUBLE)
            total = total + (h * weights[i]).sum()
    (expected,) = torch.autograd.grad(total, features.x)
    (gradient,) = torch.autograd.grad(sum((out * weights).sum() for out in outputs), features.x)
    torch.testing.assert_close(gradient, expected, **DOUBLE)


def test_gates_of_pepnet_start_at_one():
    m, features = pepnet(), rows(B, 12)
    initialise_dense(m, 0)
    h = [features.x] * TASKS
    for layer in m.layers:
        h = layer(h)
    assert all(torch.equal(a, b) for a, b in zip(m(features), h, strict=True))


def test_gates_of_pepnet_train_their_own_features_alone():
    """With the weights of the layers at 0 and their biases at 1, only gates remain between features and outputs."""
    m = randomised(pepnet()).float()
    with torch.no_grad():
        for layer in m.layers:
            layer.weights[0].zero_()
            layer.biases[0].fill_(1)
    x = torch.randn(B, 12, requires_grad=True)
    sum(out.sum() for out in m(Features((x,)))).backward()
    read = x.grad.abs().sum(0) > 0
    assert read.tolist() == [True] * 4 + [False] * 4 + [True] * 2 + [False] * 2  # user and item, PPNet's own features


# ------------------------------------------------------------------------------------------------------------------ HoME


@pytest.mark.parametrize("own", [1, 2])
def test_home_by_hand(own, monkeypatch):
    monkeypatch.setattr("distmtl.model.experts.F.softmax", lambda x, dim, dtype: torch.softmax(x, dim))  # the oracle is in float64
    groups = [[0, 2], [1]]
    m, features = randomised(HoME(12, groups, own, (7, 5), 3)), rows(B, 12, torch.float64, padding=4)
    for norm in (m.meta.experts.norm, m.tasks.experts.norm):
        norm.eps = EPS

    def experts_of(level, s: int, x: torch.Tensor) -> list[torch.Tensor]:
        gate, experts = level.feature_gates[s], level.experts
        x = x * 2 * (x @ gate.down.weight.T @ gate.scale.weight.T + gate.scale.bias).sigmoid()
        out = []
        for e in range(s * own, (s + 1) * own):
            z = (x @ experts.weights[0][e].T + experts.biases[0][e]).clamp(min=0) @ experts.weights[1][e].T
            mine, norm = slice(e * 5, (e + 1) * 5), experts.norm
            z = z[:-4]
            z = (z - z.mean(0)) / (z.var(0, correction=0) + EPS).sqrt() * norm.weight[mine] + norm.bias[mine]
            out.append(nn.functional.pad(z / (1 + (-z).exp()), (0, 0, 0, 4)))
        return out

    def mixture(level, number: int, u: torch.Tensor, seen: list[list[torch.Tensor]]) -> torch.Tensor:
        gate, self_gate = level.gates[number], level.self_gates[number]
        g = torch.softmax(u @ gate.weight.T + gate.bias, dim=1)
        s = u @ self_gate.weight.T + self_gate.bias
        s = s.sigmoid() if own == 1 else torch.softmax(s, dim=1)
        everything = [e for some in seen for e in some]
        return sum(g[:, [k]] * e for k, e in enumerate(everything)) + sum(s[:, [k]] * e for k, e in enumerate(seen[0]))

    x = features.x
    first = [experts_of(m.meta, s, x) for s in range(3)]  # of group 0, of group 1, shared
    z = [mixture(m.meta, g, x, [first[g], first[2]]) for g in range(2)]
    shared = mixture(m.meta, 2, x, [first[2], first[0], first[1]])
    outputs = m(features)
    for t, g in enumerate([0, 1, 0]):
        u = torch.cat([z[g], shared], dim=1)
        seen = [experts_of(m.tasks, t, z[g]), experts_of(m.tasks, TASKS + g, z[g]), experts_of(m.tasks, TASKS + 2, shared)]
        torch.testing.assert_close(outputs[t][:-4], mixture(m.tasks, t, u, seen)[:-4], **DOUBLE)


def test_a_task_of_home_does_not_touch_other_groups_experts_of_the_second_level():
    m = HoME(12, [[0, 2], [1]], 1, (5,), 3)
    m(rows(B, 12))[1].sum().backward()  # sets: tasks 0, 1, 2, groups 0 and 1, shared
    trained = [bool(g.abs().sum() > 0) for g in m.tasks.experts.weights[0].grad]
    assert trained == [False, True, False, False, True, True]
