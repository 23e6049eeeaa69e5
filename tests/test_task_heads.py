"""Heads in which tasks pass something on, AITM and DBMTL, or own embeddings, STEM: each against loops written out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from by_hand import batch_of, double_softmax, expert_by_hand, gate_by_hand, randomised

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.model.aitm import AITM
from distmtl.model.dbmtl import DBMTL
from distmtl.model.head import Head, descent
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import Terms
from distmtl.model.stem import STEM

WIDTH, B = 12, 16
DESCENT = {2: [], 0: [2], 1: [0, 2]}  # task 2 comes first, task 1 has two parents


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def raw(model, parents):
    """Binary tasks in the order of `parents`, which says whose parents are whose."""
    tasks = [{"kind": "binary", "name": n, "label": n, "tower": [4], "parents": p} for n, p in parents.items()]
    return tiny.raw(Path(), Path(), model=model, tasks=tasks)


def refusal(model, parents, **more):
    with pytest.raises(DistmtlError) as e:
        parse_config(raw(model, parents) | more)
    return str(e.value)


def test_aitm_by_hand(monkeypatch):
    double_softmax(monkeypatch)
    m, x, k = randomised(AITM(WIDTH, DESCENT, (10, 8))), normal(B, WIDTH), 8
    z = {2: expert_by_hand(m.bottoms, 2, x)}
    for t, parents in ((0, [2]), (1, [0, 2])):
        transfer = m.transfers[str(t)]
        h1, h2, h3 = transfer.attention.weight[:k], transfer.attention.weight[k : 2 * k], transfer.attention.weight[2 * k :]
        candidates = [expert_by_hand(transfer.passed, i, z[p]) for i, p in enumerate(parents)] + [expert_by_hand(m.bottoms, t, x)]
        z[t] = torch.zeros(B, k, dtype=torch.float64)
        for row in range(B):
            odds = [((h1 @ c[row]) @ (h2 @ c[row]) / math.sqrt(k)).exp() for c in candidates]
            for odd, c in zip(odds, candidates, strict=True):
                z[t][row] += odd / sum(odds) * (h3 @ c[row])
    for t, out in enumerate(m(Features((x,)))):
        torch.testing.assert_close(out, z[t], rtol=1e-12, atol=1e-12)


def test_aitm_weighs_candidates_against_each_other_row_by_row():
    m = AITM(WIDTH, DESCENT, (8,))
    transfer = m.transfers["1"]
    with torch.no_grad():
        transfer.attention.weight[:8] = 0.0  # every candidate scores 0: each counts a third, whatever the batch
    parents, own = [torch.randn(B, 8), torch.randn(B, 8)], torch.randn(B, 8)
    h3 = transfer.attention.weight[16:]
    expected = sum(c @ h3.T for c in (*transfer.passed(parents), own)) / 3
    torch.testing.assert_close(transfer(parents, own), expected)


def test_aitm_without_parents_is_refused():
    assert "model aitm: no task has parents, so none has anything to pass on" in refusal({"kind": "aitm"}, {"a": [], "b": []})


def test_calibrator_by_hand():
    """max(P(task) - P(parent), 0) summed over the parents, on rows that know them all; other tasks have none."""
    parents = {"click": [], "like": [], "buy": ["click", "like"]}
    terms = Terms(parse_config(raw({"kind": "aitm", "calibrator": 0.7}, parents)))
    assert (terms.names[3:], terms.coefficients[3:]) == (["buy calibrator"], [0.7])
    unknown = math.nan
    labels = [[1, 1, 1], [1, 0, 0], [0, 1, unknown], [1, 1, unknown], [unknown, 1, 1], [unknown, unknown, unknown]]
    w = [0.5, 2.0, 3.0, 1.0, 1.0, 0.0]
    logits = torch.tensor([[0.1, -1.0, 2.0], [3.0, 0.2, -2.0], [-1.0, 1.0, 0.3], [0, 0, 9], [0, 0, 9], [0, 0, 9]], requires_grad=True)
    errors, weights = terms(logits, batch_of(labels, w))
    p = [[1 / (1 + math.exp(-z)) for z in row] for row in logits.tolist()]
    known = [True, True, True, False, False, False]  # in the third, the missing click says that there was no purchase
    for i in range(6):
        expected = max(p[i][2] - p[i][0], 0) + max(p[i][2] - p[i][1], 0) if known[i] else 0.0
        assert (errors[i, 3].item(), weights[i, 3].item()) == pytest.approx((expected, w[i] * known[i]), rel=1e-5)
    (gradient,) = torch.autograd.grad((errors * weights)[:, 3].sum(), logits)
    assert gradient[3:].abs().sum() == 0 and gradient[0].abs().sum() > 0


def test_calibrator_of_a_parent_that_is_conditional_compares_what_is_joint():
    raw_config = raw({"kind": "aitm"}, {"click": [], "cart": ["click"], "buy": ["cart"]})
    raw_config["tasks"][1]["space"] = "observed"
    errors, _ = Terms(parse_config(raw_config))(torch.tensor([[-1.0, 1.0, 0.5]]), batch_of([[1, 1, 1]], [1.0]))
    p = [1 / (1 + math.exp(-z)) for z in (-1.0, 1.0, 0.5)]
    assert float(errors[0, -1]) == pytest.approx(p[2] - p[0] * p[1], rel=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_dbmtl_by_hand(detach):
    m, x = randomised(DBMTL(WIDTH, DESCENT, (10,), (8,), (7, 6), detach_parents=detach)), normal(B, WIDTH)
    own = [expert_by_hand(m.tasks, t, expert_by_hand(m.bottom, 0, x)) for t in range(3)]
    r2 = expert_by_hand(m.relations[2], 0, own[2])
    r0 = expert_by_hand(m.relations[0], 0, torch.cat([own[0], r2], 1))
    r1 = expert_by_hand(m.relations[1], 0, torch.cat([own[1], r0, r2], 1))
    out = m(Features((x,)))
    for a, b in zip(out, (r0, r1, r2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    of_parents = torch.autograd.grad(out[1].sum(), [m.relations[p].weights[0] for p in (0, 2)], allow_unused=True)
    assert all(g is None if detach else g.abs().sum() > 0 for g in of_parents)


@pytest.mark.parametrize("model", [{"kind": "dbmtl"}, {"kind": "aitm", "calibrator": 0.0}], ids=lambda m: m["kind"])
def test_children_may_be_listed_before_their_parents(model):
    """Weights are carried over by task: the order of the config is of no consequence."""
    parents = {"click": [], "cart": ["click"], "buy": ["cart", "click"]}
    heads = []
    for order in (["click", "cart", "buy"], ["buy", "click", "cart"]):
        config = parse_config(raw(model, {n: parents[n] for n in order}))
        heads.append((randomised(Head(config, Layout({}, WIDTH))), order))
    (first, names), (second, others) = heads
    place = {others.index(n): names.index(n) for n in names}  # of a task in the second config → in the first
    weights, moved = first.state_dict(), {}
    for name, like in second.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "towers":
            t, _, rest = rest.partition(".")
            moved[name] = weights[f"towers.{place[int(t)]}.{rest}"]
        elif "transfers." in name or "relations." in name:
            kind, t, rest = rest.split(".", 2)
            moved[name] = weights[f"sharing.{kind}.{place[int(t)]}.{rest}"]
        else:  # tasks stacked; a bottom that all share has one
            moved[name] = weights[name][[place[t] for t in range(3)]] if len(like) == 3 else weights[name]
    second.load_state_dict(moved)
    x = normal(B, WIDTH)
    a, b = first(Features((x,))), second(Features((x,)))
    torch.testing.assert_close(b, a[:, [place[t] for t in range(3)]])


def test_descent_has_parents_before_children():
    config = parse_config(raw({"kind": "dbmtl"}, {"buy": ["cart", "click"], "click": [], "cart": ["click"]}))
    assert list(descent(config).items()) == [(1, []), (2, [1]), (0, [2, 1])]


@pytest.mark.parametrize(
    ("parents", "sentence"),
    [
        ({"a": ["b"], "b": ["c"], "c": ["a"]}, "is a circle of parents; a task cannot come before itself"),
        ({"a": ["a"]}, "is a circle of parents; a task cannot come before itself"),
        ({"click": [], "buy": ["clik"]}, "task 'buy': no task 'clik' to be its parent; did you mean 'click'?"),
    ],
    ids=["circle", "itself", "unknown"],
)
@pytest.mark.parametrize("kind", ["dbmtl", "aitm"])
def test_parents_that_cannot_be(kind, parents, sentence):
    assert sentence in refusal({"kind": kind}, parents)


def stem(tasks=3, shared=1, own=2):
    return randomised(STEM(WIDTH, tasks, shared, own, (10, 8))), [normal(B, WIDTH).requires_grad_() for _ in range(tasks + 1)]


def test_stem_by_hand(monkeypatch):
    double_softmax(monkeypatch)
    m, xs = stem()
    outputs = [expert_by_hand(m.experts, 2 * t + i, xs[t]) for t in range(3) for i in range(2)] + [expert_by_hand(m.experts, 6, xs[3])]
    for t, out in enumerate(m(Features(tuple(xs)))):
        gate = gate_by_hand(m.gates[t], xs[t] + xs[3])
        expected = torch.stack([sum(gate[row, e] * f[row] for e, f in enumerate(outputs)) for row in range(B)])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_stem_gives_other_tasks_no_gradient():
    m, xs = stem()
    for t, out in enumerate(m(Features(tuple(xs)))):
        of_vectors = torch.autograd.grad(out.sum(), xs, retain_graph=True, allow_unused=True)
        of_experts = torch.autograd.grad(out.sum(), list(m.experts.parameters()), retain_graph=True)
        for owner in range(4):
            gradient, reached = of_vectors[owner], owner in (t, 3)
            assert (gradient is not None and float(gradient.abs().sum()) > 0) == reached
            mine = slice(2 * owner, 2 * owner + 2) if owner < 3 else slice(6, 7)
            assert all((float(g[mine].abs().sum()) > 0) == reached for g in of_experts)
        others = [e for owner in range(3) if owner != t for e in (2 * owner, 2 * owner + 1)]
        before = out.detach().clone()
        with torch.no_grad():
            m.experts.biases[-1][others] += 1.0
            assert not torch.equal(m(Features(tuple(xs)))[t], before), "other tasks' experts count in the mixture all the same"
            m.experts.biases[-1][others] -= 1.0


def test_stem_with_an_interaction_is_refused():
    message = refusal({"kind": "stem"}, {"a": [], "b": []}, interaction={"kind": "cross"})
    assert "interaction: model stem has embeddings per task, which no interaction crosses" in message
