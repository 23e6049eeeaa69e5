"""One contract for every head, and each head against a loop written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from by_hand import double_softmax, expert_by_hand, gate_by_hand, randomised

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.model.experts import Experts, Gate
from distmtl.model.head import Head
from distmtl.model.kernels import mix
from distmtl.model.layout import Features, Layout
from distmtl.model.mmoe import MMoE
from distmtl.model.multitask import initialise_dense
from distmtl.model.omoe import OMoE
from distmtl.model.ple import CGC, PLE
from distmtl.model.shared_bottom import SharedBottom
from distmtl.model.single_task import SingleTask

WIDTH, TASKS, B = 12, 3, 32
HEADS = [
    {"kind": "single_task", "bottom": [16, 8]},
    {"kind": "shared_bottom", "bottom": [16, 8]},
    {"kind": "omoe", "num_experts": 3, "expert": [16, 8]},
    {"kind": "mmoe", "num_experts": 3, "expert": [16, 8]},
    {"kind": "mmoe", "num_experts": 1, "expert": [8]},
    {"kind": "cgc", "shared_experts": 2, "task_experts": 1, "expert": [16, 8]},
    {"kind": "cgc", "shared_experts": 0, "task_experts": 2, "expert": [8]},
    {"kind": "ple", "num_levels": 3, "shared_experts": 1, "task_experts": 2, "expert": [8]},
    {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 0, "expert": [8]},
    {"kind": "aitm", "bottom": [16, 8], "calibrator": 0.0},
    {"kind": "dbmtl", "bottom": [16], "task": [8], "relation": [12, 6]},
    {"kind": "stem", "shared_experts": 1, "task_experts": 2, "expert": [16, 8]},
    {"kind": "plugin", "target": "test_heads:TwoLinear", "args": {"hidden": 6}},
]
PARENTS = {"conversion": ["click"], "rating": ["conversion", "click"]}  # of heads that pass something on from task to task


class TwoLinear(torch.nn.Module):
    """A head of a user's own."""

    def __init__(self, width, num_tasks, hidden):
        super().__init__()
        self.output_width = hidden
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, hidden) for _ in range(num_tasks))

    def forward(self, x):
        return [layer(x).relu() for layer in self.layers]


def seen(x, model=None):
    return Features((x,) * (TASKS + 1 if model and model["kind"] == "stem" else 1))


def head(model, seed=0):
    raw = tiny.raw(Path(), Path(), model=model)
    if model["kind"] in ("aitm", "dbmtl"):
        raw["tasks"] = [{**t, "parents": PARENTS.get(t["name"], []), "space": "labelled"} for t in raw["tasks"]]
    config = parse_config(raw)
    built = Head(config, Layout({}, WIDTH))
    initialise_dense(built, seed)
    return built


@pytest.mark.parametrize("model", HEADS, ids=lambda m: "-".join(str(v) for v in m.values() if not isinstance(v, dict)))
class TestContract:
    def test_shapes_and_every_parameter_gets_gradient(self, model):
        h = head(model)
        with torch.no_grad():  # gates start at zero: move them, so that what lies behind them shows
            for module in h.modules():
                if isinstance(module, Gate):
                    torch.nn.init.normal_(module.weight, std=0.5)
        for rows in (B, 1):
            logits = h(seen(torch.randn(rows, WIDTH), model))
            assert logits.shape == (rows, TASKS)
        x = torch.randn(256, WIDTH, requires_grad=True)
        (h(seen(x, model)).sigmoid() * torch.randn(256, TASKS)).sum().backward()
        dead = [n for n, p in h.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        one_expert = model["kind"] == "mmoe" and model["num_experts"] == 1
        assert [n for n in dead if not (one_expert and "gates" in n)] == []  # the softmax of one expert is constant
        assert x.grad.abs().sum() > 0

    def test_initial_weights_come_from_seed_and_name(self, model):
        a, b, c = head(model), head(model), head(model, seed=1)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))

    def test_rows_do_not_see_each_other(self, model):
        h, x = head(model).eval(), torch.randn(B, WIDTH)
        torch.testing.assert_close(h(seen(x, model))[3:5], h(seen(x[3:5], model)))


def test_mmoe_by_hand(monkeypatch):
    double_softmax(monkeypatch)
    m, x = randomised(MMoE(WIDTH, TASKS, 4, (16, 8))), torch.randn(B, WIDTH, dtype=torch.float64)
    for t, out in enumerate(m(seen(x))):
        gate = gate_by_hand(m.gates[t], x)
        expected = torch.stack([sum(gate[i, e] * expert_by_hand(m.experts, e, x[i]) for e in range(4)) for i in range(B)])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_omoe_by_hand(monkeypatch):
    double_softmax(monkeypatch)
    m, x = randomised(OMoE(WIDTH, TASKS, 4, (16, 8))), torch.randn(B, WIDTH, dtype=torch.float64)
    gate = gate_by_hand(m.gate, x)
    expected = torch.stack([sum(gate[i, e] * expert_by_hand(m.experts, e, x[i]) for e in range(4)) for i in range(B)])
    for out in m(seen(x)):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SharedBottom, SingleTask])
def test_networks_without_gates_by_hand(kind):
    """One network for all tasks, or task t's is the t-th."""
    m, x = randomised(kind(WIDTH, TASKS, (16, 8))), torch.randn(B, WIDTH, dtype=torch.float64)
    experts = m.bottom if kind is SharedBottom else m.bottoms
    for t, out in enumerate(m(seen(x))):
        mine = 0 if kind is SharedBottom else t
        expected = torch.stack([expert_by_hand(experts, mine, x[i]) for i in range(B)])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_ple_by_hand(monkeypatch):
    double_softmax(monkeypatch)
    own, shared = 2, 1
    m, x = randomised(PLE(WIDTH, TASKS, 2, shared, own, (8,))), torch.randn(B, WIDTH, dtype=torch.float64)
    inputs = [x] * (TASKS + 1)
    for depth, level in enumerate(m.levels):
        mine = [[expert_by_hand(level.experts, t * own + k, inputs[t]) for k in range(own)] for t in range(TASKS)]
        common = [expert_by_hand(level.experts, TASKS * own + k, inputs[-1]) for k in range(shared)]
        outputs = []
        for t in range(TASKS):
            gate = gate_by_hand(level.gates[t], inputs[t])  # the gate sees its level's own input, not x
            outputs.append(sum(gate[:, [k]] * f for k, f in enumerate(mine[t] + common)))
        if depth == 0:
            gate = gate_by_hand(level.shared_gate, inputs[-1])
            everything = [f for task in mine for f in task] + common
            outputs.append(sum(gate[:, [k]] * f for k, f in enumerate(everything)))
        inputs = outputs
    for out, expected in zip(m(seen(x)), inputs, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert m.levels[-1].shared_gate is None, "the last level's shared gate would be dead"


def test_one_expert_of_mmoe_is_shared_bottom():
    mmoe, bottom = MMoE(WIDTH, TASKS, 1, (16, 8)), SharedBottom(WIDTH, TASKS, (16, 8))
    bottom.bottom.load_state_dict(mmoe.experts.state_dict())
    x = torch.randn(B, WIDTH)
    for a, b in zip(mmoe(seen(x)), bottom(seen(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_cgc_without_own_experts_is_mmoe():
    cgc, mmoe = CGC(WIDTH, TASKS, 4, 0, (8,), 0.0, last=True), MMoE(WIDTH, TASKS, 4, (8,))
    mmoe.load_state_dict(cgc.state_dict())
    x = torch.randn(B, WIDTH)
    for a, b in zip(cgc([x] * (TASKS + 1)), mmoe(seen(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_closed_gate_cuts_other_tasks_off():
    cgc = CGC(WIDTH, TASKS, 1, 1, (8,), 0.0, last=True)
    x = torch.randn(B, WIDTH)
    cgc([x] * (TASKS + 1))[0].sum().backward()
    assert cgc.experts.weights[0].grad[1:TASKS].abs().sum() == 0  # experts of tasks 1 and 2
    assert cgc.experts.weights[0].grad[0].abs().sum() > 0


def test_gates_start_uniform_and_mix_keeps_the_rank():
    gate = Gate(WIDTH, 4)
    initialise_dense(torch.nn.ModuleDict({"g": gate}), 0)
    assert torch.equal(gate(torch.randn(1, WIDTH)), torch.full((1, 4, 1), 0.25))
    assert mix(gate(torch.randn(1, WIDTH)), [torch.randn(1, 8)] * 4)[0].shape == (1, 8)


def test_an_expert_is_initialised_by_its_own_fan_in():
    experts = Experts(50, 100, (64,))
    assert abs(experts.weights[0].std() / (2 / 100) ** 0.5 - 1) < 0.02


def test_a_plugin_that_is_not_there():
    with pytest.raises(DistmtlError, match="test_heads:Nothing"):
        head({"kind": "plugin", "target": "test_heads:Nothing"})


def test_a_plugin_with_state_outside_its_parameters_is_refused():
    with pytest.raises(DistmtlError, match="running_mean"):
        head({"kind": "plugin", "target": "test_heads:Normed"})


class Normed(TwoLinear):
    def __init__(self, width, num_tasks):
        super().__init__(width, num_tasks, 4)
        self.norm = torch.nn.BatchNorm1d(width)


def test_reserved_table_names():
    """Features may be called what an nn.ModuleDict may not."""
    from distmtl.config import RESERVED

    assert {a for a in dir(torch.nn.ModuleDict()) if not a.startswith("_")} <= RESERVED
    raw = tiny.raw(Path(), Path())
    raw["features"].append({"kind": "id", "name": "items", "rows": 9})
    assert "items_table" in {f.table_name for f in parse_config(raw).embedded}
    raw["features"][-1]["table"] = "items"
    with pytest.raises(DistmtlError, match="table 'items': TorchRec cannot have"):
        parse_config(raw)
