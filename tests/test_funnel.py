"""Funnels and ESCM² against float64 written out by hand, and the faults of well-known ports."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import tiny
import torch
from by_hand import batch_of
from torch.nn import functional as F

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.model.funnel import joint_labels, joint_logit, lineage
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import JointLoss, Terms
from distmtl.scores import meaning

UNKNOWN = math.nan
CLICK, CONVERSION = 1, 0  # places: the child is listed first, so that a mistaken column shows
U = UNKNOWN
LABELS = [[U, 0], [1, 1], [0, 1], [1, 1], [U, 1], [0, 1], [U, 0], [1, U], [U, 0]]  # conversion, of clicks only, as it is read; click
WEIGHTS = [1.0, 0.5, 2.0, 1.5, 1.0, 0.7, 0.9, 1.1, 0.0]  # the last row is padding
CLICKS = [i for i, (_, click) in enumerate(LABELS) if not math.isnan(click)]  # rows where it is known
CLICKED = [1, 2, 3, 5]  # and happened, and the conversion is known
ENTIRE = [0, 1, 2, 3, 5, 6, 8]  # rows where it is known whether there was a click and a conversion


def config(model, parents=None, **of_tasks):
    """Binary tasks: parents by task; `of_tasks`: more of a task's fields."""
    parents = parents or {"conversion": ["click"], "click": []}
    tasks = [{"kind": "binary", "name": n, "tower": [8], "parents": p, **of_tasks.get(n, {})} for n, p in parents.items()]
    return parse_config(tiny.raw(Path(), Path(), model=model, tasks=tasks))


def log_sigmoid(z: float) -> float:
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return math.exp(log_sigmoid(z))


def log_one_minus(log_p: float) -> float:
    """log(1 - p), exact at both ends."""
    return math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p))


def bce(z: float, y: float) -> float:
    return -(y * log_sigmoid(z) + (1 - y) * log_sigmoid(-z))


def mean(errors: list[float], weights: list[float]) -> float:
    return sum(e * w for e, w in zip(errors, weights, strict=True)) / sum(weights)


class TestJointLogit:
    POINTS = (-30.0, -9.0, -1.0, 0.0, 2.0, 11.0, 30.0)

    @pytest.mark.parametrize("stages", [1, 2, 3])
    def test_loss_is_that_of_the_product_in_float64(self, stages):
        points = list(itertools.product(self.POINTS, repeat=stages))
        logit = joint_logit(list(torch.tensor(points).unbind(1)))
        for y in (0.0, 1.0):
            found = F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, y), reduction="none")
            for zs, error in zip(points, found.tolist(), strict=True):
                log_p = sum(log_sigmoid(z) for z in zs)
                assert error == pytest.approx(-log_p if y else -log_one_minus(log_p), abs=1e-5)

    @pytest.mark.parametrize("far", [30.0, 200.0, 1e4])
    def test_gradient_is_finite_however_far_out(self, far):
        z = torch.tensor(list(itertools.product([-far, 0.0, far], repeat=3)), requires_grad=True)
        logit = joint_logit(list(z.unbind(1)))
        (F.binary_cross_entropy_with_logits(logit, torch.zeros(27)) + F.binary_cross_entropy_with_logits(logit, torch.ones(27))).backward()
        assert logit.isfinite().all() and z.grad.isfinite().all()

    def test_gradient_by_hand(self):
        points = list(itertools.product(self.POINTS, repeat=2))
        z = torch.tensor(points, requires_grad=True)
        joint_logit(list(z.unbind(1))).sum().backward()
        for zs, gradients in zip(points, z.grad.tolist(), strict=True):
            not_all = math.exp(log_one_minus(sum(log_sigmoid(x) for x in zs)))
            assert gradients == pytest.approx([sigmoid(-x) / not_all for x in zs], rel=1e-4)


class TestLineage:
    @pytest.mark.parametrize(
        ("parents", "of_tasks", "expected"),
        [
            ({"a": [], "b": ["a"], "c": ["b"]}, {}, [[0], [0, 1], [0, 1, 2]]),
            ({"c": ["b"], "b": ["a"], "a": []}, {}, [[0, 1, 2], [1, 2], [2]]),
            ({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}, {}, [[0], [0, 1], [0, 2], [0, 1, 2, 3]]),
            ({"a": [], "b": ["a"], "c": ["b"]}, {"b": {"space": "joint"}}, [[0], [1], [1, 2]]),
            ({"a": [], "b": ["a"], "c": ["b"]}, {"b": {"space": "observed"}}, [[0], [0, 1], [0, 1, 2]]),
            ({"a": [], "b": ["a"], "c": ["b"]}, {"b": {"space": "labelled"}}, [[0], [1], [1, 2]]),
        ],
        ids=["chain", "children first", "each but once", "joint already", "trained where observed", "conditional on nothing"],
    )
    def test_by_hand(self, parents, of_tasks, expected):
        built = config({"kind": "esmm"}, parents, **of_tasks)
        assert [lineage(built, t) for t in range(len(parents))] == expected


class TestJointLabels:
    def labels(self, built, rows):
        y = torch.tensor(rows)
        weights = (~y.isnan()) * torch.arange(1.0, len(rows) + 1)[:, None]
        joint, known = joint_labels(built, torch.where(y.isnan(), 0.0, y), weights)
        return [[y if w else UNKNOWN for y, w in zip(*row, strict=True)] for row in zip(joint.tolist(), known.tolist(), strict=True)], known

    def test_of_a_chain_in_every_combination(self):
        """The first 0 on the way down settles all that follows, the first unknown leaves it unknown."""
        rows = list(itertools.product([0.0, 1.0, UNKNOWN], repeat=3))
        found, weights = self.labels(config({"kind": "esmm"}, {"a": [], "b": ["a"], "c": ["b"]}), rows)
        for i, row in enumerate(rows):
            settled, expected = None, []
            for y in row:
                settled = y if settled is None and y != 1.0 else settled
                expected.append(1.0 if settled is None else settled)
            assert found[i] == pytest.approx(expected, nan_ok=True)
            assert weights[i].tolist() == [0.0 if math.isnan(y) else i + 1.0 for y in expected], "a row keeps its weight"

    def test_a_parent_of_space_labelled_keeps_its_own(self):
        """What comes before it, of any kind, is not what it is conditional on."""
        parents = {"a": [], "b": ["a"], "c": ["b"]}
        built = config({"kind": "esmm"}, parents, b={"space": "labelled"}, a={"kind": "regression"})
        assert self.labels(built, [[0.0, 1.0, 1.0], [0.0, 0.0, UNKNOWN]])[0] == [[0, 1, 1], [0, 0, 0]]

    @pytest.mark.parametrize("first", ["a", "b"])
    def test_of_two_parents_in_either_order(self, first):
        """One that did not happen settles it, whatever is known of the other."""
        built = config({"kind": "esmm"}, {"a": [], "b": [], "c": [first, "b" if first == "a" else "a"]})
        rows = list(itertools.product([0.0, 1.0, UNKNOWN], repeat=3))
        for (a, b, c), found in zip(rows, self.labels(built, rows)[0], strict=True):
            expected = 0.0 if 0.0 in (a, b) else UNKNOWN if math.isnan(a + b) else c
            assert found == pytest.approx([a, b, expected], nan_ok=True)


def outputs_of(rows: int, columns: int) -> torch.Tensor:
    return (2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))).requires_grad_()


def test_esmm_by_hand():
    """BCE(pCTR, click) and BCE(pCTR·pCVR, click·conversion), both over all impressions."""
    loss, z = JointLoss(config({"kind": "esmm"}, conversion={"weight": 0.3})), outputs_of(len(LABELS), 2)
    value, numbers = loss(z, batch_of(LABELS, WEIGHTS))
    rows, errors = z.tolist(), []
    ctr = mean([bce(rows[i][CLICK], LABELS[i][CLICK]) for i in CLICKS], [WEIGHTS[i] for i in CLICKS])
    for i in ENTIRE:
        log_p = log_sigmoid(rows[i][CLICK]) + log_sigmoid(rows[i][CONVERSION])
        errors.append(-log_p if LABELS[i] == [1, 1] else -log_one_minus(log_p))
    ctcvr = mean(errors, [WEIGHTS[i] for i in ENTIRE])
    assert value.item() == pytest.approx(ctr + 0.3 * ctcvr, rel=1e-6)
    assert numbers.losses.tolist() == pytest.approx([ctcvr, ctr], rel=1e-6)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient[-1].abs().sum() == 0 and gradient[:, CONVERSION][0] != 0, "padding teaches nothing, an impression without click does"


def counterfactual(**model):
    """Terms of ESCM² with its first term's errors, weights and outputs."""
    built = config({"kind": "escm2", **model})
    outputs = outputs_of(len(LABELS), 3 if model.get("method") == "dr" else 2)
    errors, weights = Terms(built)(outputs, batch_of(LABELS, WEIGHTS))
    return outputs, errors, weights


def inverse(z: float, most: float) -> float:
    return min(1 / sigmoid(z), most)


@pytest.mark.parametrize("most", [1e6, 2.0], ids=["as it is", "cap"])
@pytest.mark.parametrize("self_normalised", [False, True])
def test_inverse_propensity_weighting_by_hand(most, self_normalised):
    """Every row's error is weighted before the mean is taken; the rows without a click count in it, unless self-normalised."""
    outputs, errors, weights = counterfactual(self_normalised=self_normalised, max_weight=most)
    rows = outputs.tolist()
    w = {i: inverse(rows[i][CLICK], most) for i in CLICKED}
    above = sum(WEIGHTS[i] * w[i] * bce(rows[i][CONVERSION], LABELS[i][CONVERSION]) for i in CLICKED)
    below = sum(WEIGHTS[i] * w[i] for i in CLICKED) if self_normalised else sum(WEIGHTS[i] for i in ENTIRE)
    assert ((errors * weights)[:, 2].sum() / weights[:, 2].sum()).item() == pytest.approx(above / below, rel=1e-5)


def test_self_normalised_leaves_out_rows_whose_click_is_unknown():
    built = config({"kind": "escm2", "self_normalised": True})
    _, weights = Terms(built)(outputs_of(2, 2), batch_of([[1, UNKNOWN], [1, 1]], [1.0, 1.0]))
    assert weights[0, 2] == 0 and weights[1, 2] > 0


def test_doubly_robust_by_hand():
    outputs, errors, weights = counterfactual(method="dr")
    rows, corrected, imputed, w = outputs.tolist(), [], [], [WEIGHTS[i] for i in ENTIRE]
    for i in ENTIRE:
        z, guess = rows[i], -log_sigmoid(-rows[i][2])  # softplus: an error is never below 0
        error = bce(z[CONVERSION], LABELS[i][CONVERSION]) if i in CLICKED else 0.0
        weight = inverse(z[CLICK], 50.0) if i in CLICKED else 0.0
        corrected.append(guess + weight * (error - guess))
        imputed.append(weight * (error - guess) ** 2)
    found = (errors * weights).sum(0) / weights.sum(0)
    assert found[2:].tolist() == pytest.approx([mean(corrected, w), mean(imputed, w)], rel=1e-5)


@pytest.mark.parametrize("model", [{}, {"self_normalised": True}, {"method": "dr"}], ids=["ipw", "snips", "dr"])
def test_a_propensity_is_not_taught_by_the_conversions_it_weighs(model):
    """Many ports write stop_gradient, which does nothing in torch."""
    outputs, errors, weights = counterfactual(**model)
    for term in range(2, errors.shape[1]):
        (gradient,) = torch.autograd.grad((errors * weights)[:, term].sum(), outputs, retain_graph=True)
        learner = CONVERSION if term == 2 else 2  # of the second term of DR: the imputation
        assert gradient[:, learner].abs().sum() > 0
        assert gradient[:, [c for c in range(outputs.shape[1]) if c != learner]].abs().sum() == 0
        assert gradient[[i for i in range(len(LABELS)) if i not in CLICKED]].abs().sum() == 0


def test_names_and_coefficients_of_the_terms():
    terms = Terms(config({"kind": "escm2", "method": "dr", "weight": 0.2}, conversion={"weight": 0.5}))
    assert terms.names == ["conversion", "click", "conversion dr", "conversion imputation"]
    assert terms.coefficients == pytest.approx([0.5, 1.0, 0.1, 0.1])


def test_an_imputation_that_is_not_finite_is_seen():
    """Terms that a head adds read outputs that are no task's."""
    loss, z = JointLoss(config({"kind": "escm2", "method": "dr"})), outputs_of(len(LABELS), 3).detach()
    z[2, 2] = torch.inf
    value, numbers = loss(z, batch_of(LABELS, WEIGHTS))
    assert numbers.non_finite.tolist() == [0, 0, 1, 1] and not numbers.trained and value == 0
    assert numbers.bad_rows.tolist() == [2 if i == 2 else -1 for i in range(len(LABELS))]


MODELS = [{"kind": "esmm"}, {"kind": "escm2"}, {"kind": "escm2", "method": "dr"}]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: "-".join(m.values()))
def test_every_tower_has_a_bias_of_its_own(model):
    head = Head(config(model), Layout({}, 6))
    x = Features((torch.randn(4, 6),))
    before = head(x)
    towers = [*head.towers, *head.imputation]
    for t, tower in enumerate(towers):
        with torch.no_grad():
            tower.output.bias += 1.0
        moved = head(x) - before
        torch.testing.assert_close(moved, torch.eye(len(towers))[t].expand(4, -1), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            tower.output.bias -= 1.0


@pytest.mark.parametrize("model", MODELS, ids=lambda m: "-".join(m.values()))
def test_a_batch_of_one_row(model):
    built = config(model)
    head, loss = Head(built, Layout({}, 6)), JointLoss(built)
    outputs = head(Features((torch.randn(1, 6),)))
    value, numbers = loss(outputs, batch_of([[1, 1]], [1.0]))
    value.backward()
    assert outputs.shape == (1, len(head.towers) + len(head.imputation))
    assert value.item() == pytest.approx(float((numbers.losses * loss.coefficients).sum()), rel=1e-6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("task", "field", "sentence"),
    [
        (
            "conversion",
            {"pos_weight": 2.0},
            "task 'conversion': space entire is of probabilities: it needs kind binary without delay, focal",
        ),
        ("conversion", {"focal": 2.0}, "task 'conversion': space entire is of probabilities: it needs kind binary without delay, focal"),
        ("click", {"pos_weight": 2.0}, "task 'click': its focal or pos_weight bends P(click), which space entire of task 'conversion'"),
        ("click", {"delay": {"kind": "fnw"}}, "task 'click': its delay makes a negative of what may yet happen, which space entire of"),
    ],
)
def test_a_product_of_bent_probabilities_is_refused(task, field, sentence):
    with pytest.raises(DistmtlError) as e:
        config({"kind": "esmm"}, **{task: field})
    assert sentence in str(e.value)


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ("mmoe", {}, "P(conversion | click), learnt where click happened"),
        ("mmoe", {"space": "labelled"}, "P(conversion), of rows like those that have its label"),
        ("esmm", {}, "P(conversion | click), learnt from all impressions"),
        ("aitm", {}, "P(click and conversion), of any impression"),
        ("mmoe", {"kind": "regression"}, "E(conversion | click), learnt where click happened"),
    ],
)
def test_what_a_score_is_called(model, task, said):
    """The table in docs/models.md."""
    built = config({"kind": model}, conversion=task)
    assert [meaning(built, t) for t in built.tasks] == [said, "P(click)"]
