"""Bugs of popular multi-task code, shown not to be ours: those that no other test covers. Snapshots of 2022 to 2026.

Tested elsewhere:
    torch-rechub ESMM, width of a tower from the first feature's dim    distributed/test_head_contract.py (esmm on dims 8 and 4)
    DeepCTR-Torch PLE, as many shared experts as specific ones          test_heads.py, TestContract (cgc-2-1, cgc-0-2, ple-2-2-0)
    DeepCTR-Torch, MTReclib PLE, shared gate of the last level          test_heads.py, test_ple_by_hand
    STEM's baseline PLE, shared gate that sees shared experts only      test_heads.py, test_ple_by_hand
    DeepCTR-Torch ESMM, one bias for both heads                         test_funnel.py, test_every_tower_has_a_bias_of_its_own
    DeepCTR-Torch, initial weights of one deviation (1e-4)              test_heads.py, test_an_expert_is_initialised_by_its_own_fan_in
    DeepCTR-Torch MMoE, PLE, squeeze of a batch of one row              test_heads.py, test_funnel.py; the other heads here
    AITM without its calibrator (MTReclib, torch-rechub)                test_task_heads.py, test_calibrator_by_hand
    ESCM² ports, propensity with gradient, mean before weighting        test_funnel.py, test_a_propensity_is_not_taught_…,
                                                                        test_inverse_propensity_weighting_by_hand
    LibMTL rep_grad, gradients summed over the batch before the Gram    test_cut.py, TestCut (products are row by row)
    LibMTL IMTL-G, an inverse that collinear gradients have not         test_surgery.py, test_awkward_gradients_give_finite_weights
    TorchEasyRec Pareto, the same inverse                               test_surgery.py, test_awkward_gradients_give_finite_weights
    TorchEasyRec DBMTL, parents must be listed first                    test_task_heads.py, test_children_may_be_listed_before_…
    torch-rechub GradNorm, training with it fails (loss not assigned)   distributed/test_changed_weighting.py
    torch-rechub GradNorm, one target for all tasks                     test_loss_weighting.py, test_gradnorm_by_autograd
    torch-rechub UWL, s stuck where a loss is below ½                   test_loss_weighting.py, test_where_constant_losses_lead
    LibMTL RLW, λ that add up to 1 where other methods' add up to T     test_loss_weighting.py, test_rlw_is_drawn_by_seed_and_step
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import torch.distributed as dist
from by_hand import batch_of
from worlds import run_world

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.collate import ROW, Collator
from distmtl.data.rows import batch_of as batch_of_rows
from distmtl.model.experts import Gate
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import JointLoss
from distmtl.model.multitask import initialise_dense
from distmtl.model.weighting import Cut
from distmtl.model.weighting.surgery import PCGrad
from distmtl.model.weighting.weighting import Seen
from distmtl.scores import Scores

HEADS: dict[str, dict[str, Any]] = {
    "single_task": {},
    "shared_bottom": {},
    "omoe": {},
    "mmoe": {},
    "cgc": {},
    "ple": {},
    "esmm": {"network": {"kind": "mmoe"}},
    "escm2": {"network": {"kind": "ple"}},
    "aitm": {},
    "dbmtl": {},
    "stem": {},
    "home": {},
    "star": {"domain": "domain"},
    "pepnet": {"domain_features": ["domain"], "gate_features": ["user", "item"]},
}
NORMALISED = ("home", "star")  # over the batch, as their papers say


def head_of(kind: str) -> tuple[Head, int, int]:
    """A head whose gates are open to different degrees, the width and number of its feature vectors."""
    raw = tiny.raw(Path(), Path(), model={"kind": kind, **HEADS[kind]})
    raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
    raw["tasks"][1]["parents"] = ["click"]
    config = parse_config(raw)
    layout = Layout.of(config)
    head = Head(config, layout)
    initialise_dense(head, 0)
    with torch.no_grad():
        for gate in (m for m in head.modules() if isinstance(m, Gate)):
            torch.nn.init.normal_(gate.weight)
    return head, layout.width, config.copies


@pytest.mark.parametrize("kind", [k for k in HEADS if k not in NORMALISED])
def test_no_gate_normalises_over_the_batch_in_training(kind):
    """torch-rechub's MMoE and PLE: BatchNorm inside the gates, so that a row's mixture depends on the rows beside it."""
    head, width, copies = head_of(kind)
    x = torch.randn(16, width)
    rows = slice(3, 5)
    assert head.training
    torch.testing.assert_close(head(Features((x,) * copies))[rows], head(Features((x[rows],) * copies)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_a_batch_of_one_row_keeps_its_rank(kind):
    """DeepCTR-Torch's MMoE and PLE: squeeze() of (B, 1, H) drops the batch where B is 1."""
    head, width, copies = head_of(kind)
    outputs = head(Features((torch.randn(1, width),) * copies, torch.tensor([1])))
    assert outputs.shape == (1, 3) and outputs.isfinite().all()


def test_the_gradient_does_not_grow_with_the_batch():
    """DeepCTR-Torch: losses summed over the batch, so that the learning rate goes with its size."""
    loss = JointLoss(tiny.config(Path(), Path()))
    z, labels, weights = torch.randn(5, 3), [[1, 0, 0.3], [0, 1, 2.0], [1, 1, -1.0], [0, 0, 0.0], [1, 0, 1.0]], [1.0, 2.0, 0.5, 1.0, 1.0]
    values, gradients = [], []
    for times in (1, 7):
        outputs = z.repeat(times, 1).requires_grad_()
        value, _ = loss(outputs, batch_of(labels * times, weights * times))
        (gradient,) = torch.autograd.grad(value, outputs)
        values.append(value.detach())
        gradients.append(gradient.view(times, 5, 3).sum(0))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_conversion_is_scored_on_clicked_rows():
    """torch-rechub's ESMM: P(conversion | click) measured on rows without a click, whose conversion is 0 in the log."""
    raw = tiny.raw(Path(), Path(), model={"kind": "esmm"}, data={"weight": None, "group": None})
    raw["features"], raw["tasks"] = [{"kind": "numeric", "name": "x"}], raw["tasks"][:2]
    raw["tasks"][1]["parents"] = ["click"]
    config = parse_config(raw)
    table = pa.table({"x": [0.0] * 5, "click": [0, 1, 1, 0, 1], "conversion": [0, 1, 0, 0, None], ROW: range(5)})
    batch = batch_of_rows([(Collator(config)(table), 0, 5)], [], 6)
    scores = Scores(config, [])
    weights = dict(zip(((c.task, c.prefix) for c in scores.columns), scores(torch.zeros(6, 2), batch).weights.T.tolist(), strict=True))
    assert weights["conversion", ""] == [0, 1, 1, 0, 0, 0]
    assert weights["conversion", "joint_"] == [1, 1, 1, 1, 0, 0]


def measured_splits(config: Config) -> tuple[list[int], int | None]:
    """Rows of every data set that a run measures, in order, and its best step."""
    from distmtl import judge, loop

    seen: list[int] = []
    measure = judge.evaluate_split

    def watched(model: Any, dataset: Any, *rest: Any) -> Any:
        seen.append(dataset.rows)
        return measure(model, dataset, *rest)

    judge.evaluate_split = watched
    result = loop.train(config, report=lambda record: None)
    return seen, result["best_step"]


def test_the_test_split_decides_nothing(tiny_data, tmp_path):
    """MTReclib: early stopping and the choice of the model on the test set."""
    (tmp_path / "test").mkdir()
    pq.write_table(tiny.table(90, seed=5), tmp_path / "test" / "part-0.parquet")
    train = {"global_batch_size": 128, "steps": 6, "eval_every": 2, "early_stopping": {"patience": 3}}
    config = tiny.config(tiny_data, tmp_path / "run", data={"test": str(tmp_path / "test")}, train=train)
    ((seen, best),) = run_world(measured_splits, 1, config)
    validation = tiny.ROWS["validation"]
    assert best is not None and seen[:3] == [validation] * 3 and seen.count(90) == 1 and seen[-1] == 90


def test_pcgrad_does_not_project_a_gradient_onto_itself():
    """LibMTL's PCGrad visits j = i too, and once vᵢ has turned away from gᵢ, takes vᵢ's part along gᵢ from it."""
    g = np.array([[1.0, 0.0], [-0.99, 0.14], [-0.5, -0.86]])  # what is left of the first, without the second, points against the first
    gram, orders = g @ g.T, {}
    for step in range(40):
        order = np.random.default_rng((0, step))
        expected, with_itself = g.copy(), g.copy()
        for i in range(3):
            for j in order.permutation(3):
                for v, allowed in ((expected, j != i), (with_itself, True)):
                    if allowed and v[i] @ g[j] < 0:
                        v[i] -= v[i] @ g[j] / (g[j] @ g[j]) * g[j]
        orders[step] = not np.allclose(expected, with_itself)
        found = PCGrad(3, 0).weigh(Seen(step, np.arange(3), np.ones(3), gram), {})
        np.testing.assert_allclose(found @ g, expected.sum(0), rtol=1e-9, atol=1e-12)
    assert any(orders.values()), "the bug would not show"


def pareto_weights(config: Config) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """λ, the Gram matrix that gave it, and this rank's own, of a step whose ranks see different rows."""
    rank = dist.get_rank()
    layout = Layout.of(config)
    head = Head(config, layout)
    initialise_dense(head, 0)
    loss = JointLoss(config, head.cut)
    torch.manual_seed(rank)
    x, labels = torch.randn(8, layout.width, requires_grad=True), torch.rand(8, 3).round()
    batch = batch_of(labels.tolist(), [1.0] * 8)
    outputs = head(Features((x,)))
    errors, weights = loss.terms(outputs, batch)
    own = head.cut.gram(head.cut.gradients((errors * weights).sum(0), outputs, loss.terms.reads))
    _, numbers = loss(head(Features((x,))), batch)
    assert numbers.gram is not None
    return numbers.weighting.tolist(), numbers.gram.tolist(), own.tolist()


def test_all_ranks_weigh_alike():
    """TorchEasyRec's Pareto: every rank weighs by the gradients of its own rows."""
    config = tiny.config(Path(), Path(), weighting={"kind": "mgda"})
    (one, gram, own), (other, _, others) = run_world(pareto_weights, 2, config)
    assert one == other and len(set(one)) > 1
    assert not np.allclose(own, others)
    scale = np.array([t.weight for t in config.tasks]) / 16  # 16 rows over both ranks
    np.testing.assert_allclose(gram, (np.array(own) + np.array(others)) * scale[:, None] * scale, rtol=1e-5)


LABELS = [[1, 0, 0.3], [0, 1, 2.0], [1, 1, -1.0], [0, 0, 0.0]]


def test_gradnorm_reads_where_sharing_ends():
    """torch-rechub's GradNorm: share_layers[-0] is the first embedding table, not the last shared layer."""
    torch.manual_seed(0)
    cut, first, last = Cut(), torch.randn(6, 5, requires_grad=True), torch.randn(5, 3)
    loss = JointLoss(tiny.config(Path(), Path(), weighting={"kind": "gradnorm", "alpha": 0.0, "lr": 0.1}), cut)
    (shared,) = cut([torch.randn(4, 6) @ first])
    outputs, batch = cut.beside([shared @ column for column in last.split(1, dim=1)]), batch_of(LABELS, [1.0] * 4)
    sums = [(error.sum() * weight / 4) for error, weight in zip(loss.terms(outputs, batch)[0].T, (1.0, 1.0, 0.5), strict=True)]
    norms = torch.stack([torch.autograd.grad(s, shared, retain_graph=True)[0].norm() for s in sums]).double()
    numbers = loss(outputs, batch)[1]
    torch.testing.assert_close(numbers.gram.diagonal(), norms**2, rtol=1e-5, atol=1e-7)  # of float32 gradients
    moved = 1 - 0.1 * (norms - norms.mean()).sign()
    torch.testing.assert_close(loss.weighting.weights, 3 * moved / moved.sum())


class Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("kind", ["famo", "dwa", "gradnorm"])
def test_no_step_keeps_the_graph_of_the_one_before(kind):
    """Both FAMOs: the losses are remembered with their graph, which lives until the step after."""
    cut, held = Cut(), type("Marker", (), {})()
    alive, loss = weakref.ref(held), JointLoss(tiny.config(Path(), Path(), weighting={"kind": kind}), cut)
    (x,) = cut([Held.apply(torch.randn(4, 3, requires_grad=True), held)])
    value, numbers = loss(cut.beside(x.split(1, dim=1)), batch_of(LABELS, [1.0] * 4))
    value.backward()
    del x, value, held
    if kind != "gradnorm":
        cut.points, cut.towers = [], ()  # only a weighting that reads gradients takes them up
    gc.collect()
    assert alive() is None and not numbers.losses.requires_grad
