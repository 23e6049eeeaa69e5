"""Kinds of tasks: losses, predictions, labels, funnels and scored columns against loops in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from torch.distributions import LogNormal
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.batch import Batch
from distmtl.calibration import Calibration, Lines
from distmtl.config import Config, TaskConfig
from distmtl.config_file import parse_config
from distmtl.data.collate import ROW, Collator
from distmtl.data.rows import batch_of
from distmtl.errors import DistmtlError
from distmtl.evaluation import as_measured
from distmtl.metrics import Accumulator
from distmtl.model.experts import Thresholds
from distmtl.model.funnel import joint_labels
from distmtl.model.kinds import logit_shift, of_all_negatives, output_layer, prediction, row_loss
from distmtl.model.loss import JointLoss, Terms
from distmtl.scores import Scored, Scores

B = 64


def config_of(*tasks: dict, **sections) -> Config:
    return parse_config(tiny.raw(Path(), Path(), tasks=[{"kind": "binary", **t} for t in tasks], **sections))


def task_of(**task) -> TaskConfig:
    return config_of({"name": "t", **task}).tasks[0]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def bce(z: float, y: float) -> float:
    return -(y * math.log(sigmoid(z)) + (1 - y) * math.log(1 - sigmoid(z)))


# ------------------------------------------------------------------------------------------------ one row, by the formulas

GRID = {"quantiles": [[0.0, 1.0, 4.0], [2.0, 6.0, 30.0]], "duration": "length", "duration_edges": [10.0]}


def focal(z, y, _):
    p = sigmoid(z[0])
    return -(3.0 * y * (1 - p) ** 1.5 * math.log(p) + (1 - y) * p**1.5 * math.log(1 - p))


def fake_negative_weighted(z, y, _):
    p = sigmoid(z[0])
    return -(y * (1 + p) * math.log(p) + (1 - y) * (1 - p) * (1 + p) * math.log(1 - p))


def delayed(z, y, elapsed):
    p, rate = sigmoid(z[0]), math.exp(z[1])
    density, later = p * rate * math.exp(-rate * elapsed), p * math.exp(-rate * elapsed)
    return -math.log(density) if y else -math.log(1 - p + later)


def huber(z, y, _):
    d = abs(z[0] - y)
    return d**2 / 2 if d <= 0.7 else 0.7 * (d - 0.35)


def multiclass(z, y, _):
    return math.log(sum(math.exp(v) for v in z)) - z[int(y)]


def quantile(y: float, duration: float) -> float:
    grid = GRID["quantiles"][duration >= 10.0]
    if y >= grid[-1]:
        return 1.0
    return max(next((k + (y - a) / (b - a)) / 2 for k, (a, b) in enumerate(pairwise(grid)) if y < b), 0.0)


def value(q: float, duration: float) -> float:
    low, middle, high = GRID["quantiles"][duration >= 10.0]
    return low + 2 * q * (middle - low) if q < 0.5 else middle + (2 * q - 1) * (high - middle)


def lognormal(z, y, _):
    if y == 0:
        return bce(z[0], 0)
    scale = math.log1p(math.exp(z[2]))
    return bce(z[0], 1) + math.log(y * scale * math.sqrt(2 * math.pi)) + (math.log(y) - z[1]) ** 2 / (2 * scale**2)


def expected_lognormal(z, _):
    return sigmoid(z[0]) * math.exp(z[1] + math.log1p(math.exp(z[2])) ** 2 / 2)


KINDS = {  # name: task, its loss of outputs, label and extra column, its prediction
    "binary": ({}, lambda z, y, _: bce(z[0], y), lambda z, _: z[0]),
    "weighted": (
        {"pos_weight": 3.0, "kept_negatives": 0.1},
        lambda z, y, _: bce(z[0], y) * (3 if y else 1),
        lambda z, _: z[0] + math.log(0.1) - math.log(3),
    ),
    "focal": ({"pos_weight": 3.0, "focal": 1.5}, focal, lambda z, _: z[0] - math.log(3)),
    "fnw": ({"delay": {"kind": "fnw"}}, fake_negative_weighted, lambda z, _: z[0]),
    "dfm": ({"delay": {"kind": "dfm", "elapsed": "length"}}, delayed, lambda z, _: z[0]),
    "half squared": ({"kind": "regression"}, lambda z, y, _: (z[0] - y) ** 2 / 2, lambda z, _: z[0]),
    "squared": ({"kind": "regression", "loss": "squared"}, lambda z, y, _: (z[0] - y) ** 2, lambda z, _: z[0]),
    "absolute": ({"kind": "regression", "loss": "absolute"}, lambda z, y, _: abs(z[0] - y), lambda z, _: z[0]),
    "huber": ({"kind": "regression", "loss": "huber", "delta": 0.7}, huber, lambda z, _: z[0]),
    "ordinal": (
        {"kind": "ordinal", "levels": 4},
        lambda z, y, _: sum(bce(v, float(y > k)) for k, v in enumerate(z)),
        lambda z, _: sum(map(sigmoid, z)),
    ),
    "multiclass": ({"kind": "multiclass", "classes": 4}, multiclass, lambda z, _: [-multiclass(z, c, 0) for c in range(4)]),
    "watch time": (
        {"kind": "watch_time"},
        lambda z, y, _: -(y * math.log(sigmoid(z[0])) + math.log(1 - sigmoid(z[0]))),
        lambda z, _: math.exp(z[0]),
    ),
    "quantile": (
        {"kind": "quantile", **GRID},
        lambda z, y, length: bce(z[0], quantile(y, length)),
        lambda z, length: value(sigmoid(z[0]), length),
    ),
    "lognormal": ({"kind": "zero_inflated_lognormal"}, lognormal, expected_lognormal),
}


def labels_of(kind: str, r: np.random.Generator, n: int = B) -> np.ndarray:
    if kind in ("ordinal", "multiclass"):
        return r.integers(0, 4, n).astype(float)
    if kind in ("watch time", "quantile", "lognormal"):
        return r.exponential(5, n) * (r.random(n) < 0.7)
    return r.normal(size=n) if "kind" in KINDS[kind][0] else (r.random(n) < 0.4).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_prediction_by_hand(kind):
    fields, loss, predicted = KINDS[kind]
    task, r = task_of(**fields), np.random.default_rng(0)
    z, y, extra = r.normal(0, 1.5, (B, task.outputs)), labels_of(kind, r), r.choice([0.0, 3.0, 9.5, 10.0, 25.0], B)
    tensors = [torch.tensor(a, dtype=torch.float64) for a in (z, y, extra)]
    found = row_loss(task, *tensors[:2], tensors[2] if task.extra else None)
    np.testing.assert_allclose(found, [loss(*row) for row in zip(z.tolist(), y.tolist(), extra.tolist(), strict=True)], rtol=1e-9)
    found = prediction(task, tensors[0], tensors[2] if task.extra else None)
    np.testing.assert_allclose(found, [predicted(*row) for row in zip(z.tolist(), extra.tolist(), strict=True)], rtol=1e-9)


# ------------------------------------------------------------------------------------------------- what the losses promise


def minimiser(loss) -> float:
    """Of a convex loss of one number, by Newton's method."""
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        (slope,) = torch.autograd.grad(loss(z), z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, z)
        with torch.no_grad():
            z -= (slope / curvature).clamp(-1, 1)
    return z.item()


def mean_loss(task: TaskConfig, y: torch.Tensor):
    return lambda z: row_loss(task, z.expand(len(y), 1), y, None).mean()


def test_the_odds_of_watch_time_are_its_mean():
    y = torch.tensor(labels_of("watch time", np.random.default_rng(1)))
    assert math.exp(minimiser(mean_loss(task_of(kind="watch_time"), y))) == pytest.approx(y.mean().item(), rel=1e-9)


@pytest.mark.parametrize("fields", [{"kept_negatives": 0.25}, {"pos_weight": 7.0}, {"kept_negatives": 0.25, "pos_weight": 0.5}])
def test_the_shift_gives_back_the_true_rate(fields):
    """100 positives of 2,100; of the 2,000 negatives a quarter is trained on."""
    task = task_of(**fields)
    kept = int(2000 * task.kept_negatives)
    y = torch.cat([torch.ones(100), torch.zeros(kept)]).double()
    assert sigmoid(minimiser(mean_loss(task, y)) + logit_shift(task)) == pytest.approx(100 / 2100, rel=1e-9)


@pytest.mark.parametrize("fields", [{"kept_negatives": 0.1}, {"delay": {"kind": "fnw"}}], ids=["thinned", "FNW"])
def test_the_loss_of_evaluation_is_least_at_the_true_rate(fields):
    """Validation data is neither thinned nor full of early negatives: what chooses the best checkpoint must not punish the true rate."""
    config = config_of({"name": "t", **fields}, **NO_WEIGHT)
    terms, y = Terms(as_measured(config)), torch.tensor([[1.0]] * 100 + [[0.0]] * 900)
    batch = batch_with(y, torch.ones(1000, 1))

    def loss(z):
        return terms(of_all_negatives(config, z.expand(1000, 1)), batch)[0].mean()

    z = minimiser(loss)
    assert prediction(config.tasks[0], torch.tensor([[z]]), None).sigmoid().item() == pytest.approx(0.1, abs=1e-5)


def test_focal_loss_is_not_calibrated():
    y = torch.cat([torch.ones(100), torch.zeros(1900)]).double()
    assert sigmoid(minimiser(mean_loss(task_of(focal=2.0), y))) > 1.5 * 100 / 2000


def test_fake_negatives_cancel_out():
    """1,000 impressions counted as negatives, the 100 that converted once more as positives: the gradient vanishes at 10 %."""
    task = task_of(delay={"kind": "fnw"})
    z = torch.tensor(math.log(0.1 / 0.9), dtype=torch.float64, requires_grad=True)
    y = torch.cat([torch.ones(100), torch.zeros(1000)]).double()
    (slope,) = torch.autograd.grad(row_loss(task, z.expand(1100, 1), y, None).sum(), z)
    assert abs(slope.item()) < 1e-9


def test_delayed_feedback_is_a_probability():
    """Converted at some time until e, or not yet at e: together 1."""
    task, e = task_of(delay={"kind": "dfm", "elapsed": "length"}), 4.0
    times = torch.linspace(0, e, 20_001, dtype=torch.float64)
    z = torch.tensor([[0.4, -0.8]], dtype=torch.float64)
    density = (-row_loss(task, z.expand(len(times), 2), torch.ones_like(times), times)).exp()
    not_yet = (-row_loss(task, z, torch.zeros(1, dtype=torch.float64), times[-1:])).exp().item()
    assert torch.trapezoid(density, times).item() + not_yet == pytest.approx(1, abs=1e-7)


def test_lognormal_is_torchs():
    task, r = task_of(kind="zero_inflated_lognormal"), np.random.default_rng(2)
    z, y = torch.tensor(r.normal(size=(B, 3))), torch.tensor(labels_of("lognormal", r))
    amount = LogNormal(z[:, 1], torch.nn.functional.softplus(z[:, 2]))
    happened = torch.distributions.Bernoulli(logits=z[:, 0])
    log_p = happened.log_prob((y > 0).double()) + torch.where(y > 0, amount.log_prob(y.clamp(min=1e-9)), 0.0)
    torch.testing.assert_close(row_loss(task, z, y, None), -log_p)
    torch.testing.assert_close(prediction(task, z, None), happened.mean * amount.mean)


def test_quantiles_and_values_are_inverse_within_every_group():
    task, q = task_of(kind="quantile", **GRID), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for duration, grid in ((9.99, GRID["quantiles"][0]), (10.0, GRID["quantiles"][1])):
        extra = torch.full_like(q, duration)
        y = prediction(task, q.logit()[:, None], extra)
        z = q.logit()[:, None].requires_grad_()
        (slope,) = torch.autograd.grad(row_loss(task, z, y, extra).sum(), z)
        assert slope.abs().max() < 1e-12, "the label's quantile is the target, so its own logit is the optimum"
        beyond, ends = torch.tensor([grid[0] - 1, grid[-1] + 9]).double(), torch.tensor([grid[0], grid[-1]]).double()
        at_ends = [row_loss(task, torch.ones(2, 1).double(), y, extra[:2]) for y in (beyond, ends)]
        torch.testing.assert_close(*at_ends)  # labels beyond the grid count as its ends
    assert prediction(task, torch.tensor([[-900.0], [900.0]]), torch.tensor([0.0, 0.0])).tolist() == [0.0, 4.0]


def test_levels_are_in_order_whatever_is_learnt():
    task = task_of(kind="ordinal", levels=6)
    layer = output_layer(task, 8)
    assert isinstance(layer, Thresholds)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=3)
    z = layer(torch.randn(B, 8))
    assert (z.diff(dim=1) < 0).all(), "P(y > k) falls with k"
    level = prediction(task, z, None)
    assert z.shape == (B, 5) and level.min() >= 0 and level.max() <= 5


# ------------------------------------------------------------------------------------------------------------ whole batches


def batch_with(labels, weights, extras=None, oracle=None, slices: dict[str, list[int]] | None = None) -> Batch:
    labels, weights = torch.as_tensor(labels, dtype=torch.float32), torch.as_tensor(weights, dtype=torch.float32)
    n, ids = len(labels), slices or {}
    sparse = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([v for f in ids.values() for v in f]),
        lengths=torch.ones(n * len(ids), dtype=torch.int32),
        stride=n,
    )
    return Batch(sparse, torch.zeros(n, 0), labels, weights, torch.arange(n), extras=extras, oracle=oracle)


@pytest.mark.parametrize("size", [1.0, 200.0])
def test_masked_labels_never_reach_the_graph(size):
    """Of every kind: NaN labels and extras of weight 0, outputs that saturate; γ < 1, whose power has no gradient at 0."""
    kinds = {**KINDS, "flat focal": ({"focal": 0.5}, None, None)}
    config = config_of(*({"name": name.replace(" ", "_"), **fields} for name, (fields, _, _) in kinds.items()))
    r, T = np.random.default_rng(3), len(kinds)
    labels = np.stack([labels_of(k if k in KINDS else "binary", r) for k in kinds], axis=1)
    known = r.random((B, T)) < 0.5
    labels[~known] = np.nan
    extras = torch.tensor(np.where(known, r.uniform(0, 20, (B, T)), np.nan), dtype=torch.float32)
    outputs = torch.tensor(size * r.choice([-1.0, 0.5, 1.0], (B, sum(t.outputs for t in config.tasks)))).float().requires_grad_()
    batch = batch_with(labels, known, extras)
    errors, weights = Terms(config)(outputs, batch)
    assert torch.isfinite(errors).all() and (errors[weights == 0] == 0).all()
    loss, numbers = JointLoss(config)(outputs, batch)
    loss.backward()
    assert bool(numbers.trained) and torch.isfinite(outputs.grad).all()
    for t, place in enumerate(Terms(config).places):
        assert (outputs.grad[~known[:, t], place] == 0).all()
        assert outputs.grad[known[:, t], place].abs().sum() > 0


BAD = {
    "a binary label is 0 or 1": ({}, 2.0),
    "an ordinal label of 4 levels is 0 … 3": ({"kind": "ordinal", "levels": 4}, 4.0),
    "a label of 4 classes is 0 … 3": ({"kind": "multiclass", "classes": 4}, 1.5),
    "a label of kind watch_time is at least 0": ({"kind": "watch_time"}, -1.0),
    "a label of kind quantile is at least 0": ({"kind": "quantile", "quantiles": [[0, 1]]}, -1.0),
    "a label of kind zero_inflated_lognormal is at least 0": ({"kind": "zero_inflated_lognormal"}, -0.5),
}


def rows_of(config: Config, **columns):
    """The tiny table's first rows with other columns, collated."""
    n = len(next(iter(columns.values())))
    table = tiny.table(n).append_column(ROW, [list(range(n))])
    for name, values in columns.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=False))
    return Collator(config)(table)


@pytest.mark.parametrize("words", BAD)
def test_a_bad_label(words):
    fields, bad = BAD[words]
    config = config_of({"name": "t", **fields})
    assert rows_of(config, t=[0.0, None, 1.0]).weights[:, 0].tolist() == pytest.approx(
        [w if i != 1 else 0 for i, w in enumerate(tiny.table(3)["w"].to_pylist())]
    )
    with pytest.raises(DistmtlError, match=f"^label 't': {bad:g} at row 2; {words}, or null where unknown$"):
        rows_of(config, t=[0.0, None, bad])


def test_a_regression_label_may_be_any_number():
    assert rows_of(config_of({"name": "t", "kind": "regression"}), t=[-3.5, None, 1e9]).labels[:, 0].tolist() == [-3.5, 0, 1e9]


@pytest.mark.parametrize(("bad", "words"), [(None, "None"), (-1.0, "-1.0")])
def test_a_bad_delay(bad, words):
    config = config_of({"name": "t", "delay": {"kind": "dfm", "elapsed": "age"}})
    with pytest.raises(DistmtlError, match=f"^column 'age': {words} at row 2; task 't' needs a number ≥ 0$"):
        rows_of(config, t=[0.0, 1.0, 1.0], age=[0.0, 5.0, bad])
    rows_of(config, t=[0.0, 1.0, None], age=[0.0, 5.0, None])


# ----------------------------------------------------------------------------------------------------------------- funnels

FUNNEL = ({"name": "click"}, {"name": "conversion", "parents": ["click"]})
NO_WEIGHT = {"data": {"weight": None}}


def test_what_could_not_happen_is_left_out_and_contradictions_are_counted():
    config = config_of(*FUNNEL, data={"weight": None, "max_contradictions": 0.2})
    rows = rows_of(config, click=[1, 1, 0, 0, None, 0], conversion=[1, 0, 0, 1, 1, None])
    assert rows.weights.tolist() == [[1, 1], [1, 1], [1, 0], [1, 0], [0, 1], [1, 0]]
    assert rows.contradicting.tolist() == [0, 0, 0, 1, 0, 0]
    assert batch_of([(rows, 1, 6)], Collator(config).keys, 7).contradictions == 1


@pytest.mark.parametrize(("share", "limit"), [(0.0, 0), (0.001, 3), (0.01, 9)])
def test_more_contradictions_than_allowed_are_refused(share, limit):
    """Of 250 rows: ¼ and 2½ are expected, and four deviations, √ of that, are left to chance."""
    config = config_of(*FUNNEL, data={"weight": None, "max_contradictions": share})
    table = {n: {"click": [0] * 250, "conversion": [0] * 7 + [1] * n + [0] * (243 - n)} for n in (limit, limit + 1)}
    assert rows_of(config, **table[limit]).contradicting.sum() == limit
    with pytest.raises(
        DistmtlError, match=rf"label 'conversion': {limit + 1} of 250 rows have conversion without click, such as row 7; mend"
    ):
        rows_of(config, **table[limit + 1])


def test_a_conversion_rate_is_not_diluted_by_impressions_without_click():
    """5 clicks in 100, 2 of them convert, the log says 0 elsewhere: trained on all rows, the rate would be 2 % instead of 40 %."""
    config = config_of(*FUNNEL, **NO_WEIGHT)
    rows = rows_of(config, click=[1] * 5 + [0] * 95, conversion=[1, 1] + [0] * 98)
    batch = batch_of([(rows, 0, 100)], Collator(config).keys, 104)

    def loss(z):
        errors, weights = Terms(config)(torch.stack([z * 0, z]).expand(104, 2), batch)
        return (errors * weights).sum(0)[1] / weights.sum(0)[1]

    assert sigmoid(minimiser(loss)) == pytest.approx(0.4, abs=1e-6)
    diluted = config_of(FUNNEL[0], {**FUNNEL[1], "space": "labelled"}, **NO_WEIGHT)
    assert rows_of(diluted, click=[1, 0], conversion=[0, 0]).weights.tolist() == [[1, 1], [1, 1]]


def test_joint_labels_are_three_valued_logic():
    """A task of two parents, every combination of yes, no and unknown: no if any is no, else unknown if any is unknown."""
    config = config_of({"name": "a"}, {"name": "b"}, {"name": "both", "parents": ["a", "b"], "space": "entire"})
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, math.nan])] * 3)
    weights = torch.where(values.isnan(), 0.0, 0.5)
    labels, known = joint_labels(config, values.nan_to_num(), weights)
    for row, y, w in zip(values.tolist(), labels[:, 2].tolist(), known[:, 2].tolist(), strict=True):
        never = 0.0 in row[:2]
        unknown = not never and any(map(math.isnan, row))
        assert w == (0.0 if unknown else 0.5), row
        assert unknown or y == float(row == [1, 1, 1]), row


def columns_of(config: Config, outputs, batch: Batch, oracle=()) -> dict[tuple[str, str], list[np.ndarray]]:
    """(task, prefix) → scores, labels, weights, oracle."""
    scores = Scores(config, list(oracle))
    scored = scores(torch.as_tensor(outputs, dtype=torch.float32), batch)
    assert isinstance(scored, Scored) and scored.scores.shape == (len(batch.rows), len(scores.columns))
    parts = [v.double().numpy() for v in (scored.scores, scored.labels, scored.weights, scored.oracle)]
    return {(c.task, c.prefix): [v[:, i] for v in parts] for i, c in enumerate(scores.columns)}


def test_columns_of_the_kinds_by_hand():
    config = config_of(
        {"name": "stars", "kind": "ordinal", "levels": 3},
        {"name": "genre", "kind": "multiclass", "classes": 3},
        {"name": "spent", "kind": "zero_inflated_lognormal"},
        {"name": "watched", "kind": "watch_time"},
    )
    z = [[2.0, 1.0, 0.0, 1.0, 3.0, -1.0, 0.2, 0.1, 1.5], [0.5, -2.0, 2.0, 1.0, 0.0, 4.0, -0.3, 0.7, -1.0]]
    batch = batch_with([[2, 2, 0, 3], [0, 1, 7, 0]], [[1, 1, 1, 1], [1, 0.5, 2, 1]])
    found = columns_of(config, z, batch)
    expected = {
        ("stars", ""): [sigmoid(2) + sigmoid(1), sigmoid(0.5) + sigmoid(-2)],
        ("stars", "accuracy"): [1, 0],  # predicted: level 2, level 1
        ("genre", "accuracy"): [1, 0],
        ("genre", "logloss"): [multiclass([0, 1, 3], 2, 0), multiclass([2, 1, 0], 1, 0)],
        ("spent", ""): [expected_lognormal(row[5:8], 0) for row in z],
        ("spent", "positive_"): [-1, 4],
        ("watched", ""): [math.exp(1.5), math.exp(-1)],
    }
    assert found.keys() == expected.keys()
    for column, scores in expected.items():
        np.testing.assert_allclose(found[column][0], scores, rtol=1e-6)
    assert found["spent", "positive_"][1].tolist() == [0, 1] and found["spent", ""][1].tolist() == [0, 7]
    assert found["genre", "logloss"][2].tolist() == [1, 0.5]


def funnel_batch(n: int = 40, seed: int = 4):
    r = np.random.default_rng(seed)
    click = (r.random(n) < 0.5).astype(float)
    conversion = (r.random(n) < 0.4) * click
    weight = r.uniform(0.5, 2, n) * (r.random(n) < 0.9)
    weights = np.stack([weight, weight * click * (r.random(n) < 0.8)], axis=1)  # some clicks whose conversion is not known
    oracle = torch.full((n, 4), math.nan)
    oracle[:, 3] = torch.tensor(r.uniform(0.05, 0.95, n).round(2))
    oracle[::7, 3] = math.nan
    outputs = r.normal(size=(n, 2)).round(1)
    return batch_with(np.stack([click, conversion], axis=1), weights, oracle=oracle), outputs


def soft_auc(x, y, w) -> float:
    """A row counts y as a positive and 1 - y as a negative; all pairs, a row with itself included."""
    right = total = 0.0
    for a in range(len(x)):
        for b in range(len(x)):
            pair = w[a] * y[a] * w[b] * (1 - y[b])
            total += pair
            right += pair * (1.0 if x[a] > x[b] else 0.5 if x[a] == x[b] else 0.0)
    return right / total


def test_joint_and_entire_columns_by_hand():
    config = config_of(FUNNEL[0], {**FUNNEL[1], "true_probability_entire": "p"}, model={"kind": "esmm"})
    batch, z = funnel_batch()
    names = [None, None, None, "p"]
    found = columns_of(config, z, batch, names)
    assert list(found) == [("click", ""), ("conversion", ""), ("conversion", "joint_"), ("conversion", "entire_")]
    (y, w), truth = (v.numpy() for v in (batch.labels, batch.weights)), batch.oracle[:, 3].numpy()
    np.testing.assert_allclose(found["conversion", ""][0], z[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(found["conversion", ""][2], w[:, 1])
    scores, labels, weights, _ = found["conversion", "joint_"]
    for i in range(len(y)):
        assert sigmoid(scores[i]) == pytest.approx(sigmoid(z[i, 0]) * sigmoid(z[i, 1]), rel=1e-5)
        assert weights[i] == (w[i, 0] if y[i, 0] == 0 else w[i, 1])
        assert weights[i] == 0 or labels[i] == y[i, 0] * y[i, 1]
    scores, labels, weights, _ = found["conversion", "entire_"]
    np.testing.assert_array_equal(weights, np.where(np.isnan(truth), 0, w.max(1)))
    np.testing.assert_array_equal(labels[weights > 0], truth[weights > 0])

    accumulator = Accumulator(Scores(config, names).columns, total_rows=len(y), exact_rows=10**6, grouped=False)
    accumulator.update(Scores(config, names)(torch.tensor(z).float(), batch), None)
    metrics = accumulator.compute()["conversion"]
    for prefix in ("joint_", "entire_"):
        x, y_, w_, _ = (v[found["conversion", prefix][2] > 0] for v in found["conversion", prefix])
        assert metrics[f"{prefix}auc"] == pytest.approx(soft_auc(x, y_, w_), rel=1e-6)
        p = 1 / (1 + np.exp(-x))
        assert metrics[f"{prefix}calibration"] == pytest.approx((w_ * p).sum() / (w_ * y_).sum(), rel=1e-6)
    _, y_, w_, o = (v[found["conversion", "entire_"][2] > 0] for v in found["conversion", "entire_"])
    assert metrics["entire_best_possible_auc"] == pytest.approx(soft_auc(o, y_, w_), rel=1e-6)


def test_a_joint_task_is_scored_on_all_impressions():
    config = config_of(*FUNNEL, model={"kind": "aitm"})
    batch, z = funnel_batch()
    scores, labels, weights, _ = columns_of(config, z, batch)["conversion", ""]
    np.testing.assert_allclose(scores, z[:, 1], rtol=1e-6)
    y, w = batch.labels.numpy(), batch.weights.numpy()
    np.testing.assert_array_equal(weights, np.where(y[:, 0] == 0, w[:, 0], w[:, 1]))
    assert (labels[y[:, 0] == 0] == 0).all()


def test_calibrations_come_after_the_shift_and_before_the_joint_probability():
    config = config_of(FUNNEL[0] | {"kept_negatives": 0.5}, FUNNEL[1], model={"kind": "esmm"})
    batch = batch_with([[1, 1], [1, 0]], [[1, 1], [1, 1]], slices={"city": [4, 9]})
    calibration = Calibration(Lines([2.0, 3.0], [0.5, -1.0]), "city", [9])
    scores = Scores(config, [], {"click": calibration})(torch.tensor([[0.3, 0.1], [-0.2, 0.4]]), batch).scores
    click = [2 * (0.3 - math.log(2)) + 0.5, 3 * (-0.2 - math.log(2)) - 1]
    assert scores[:, 0].tolist() == pytest.approx(click, rel=1e-5)
    joint = [sigmoid(c) * sigmoid(v) for c, v in zip(click, (0.1, 0.4), strict=True)]
    assert scores[:, 2].sigmoid().tolist() == pytest.approx(joint, rel=1e-5)
