"""Calibration: fits against scikit-learn and definitions, slices, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from sklearn.linear_model import LogisticRegression
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.calibration import CLIP, MAX_KNOTS, NO_SLICE, Calibration, Observed, fit, slices_of
from distmtl.config import Isotonic, Platt
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError

PLATT, ISOTONIC = Platt(kind="platt"), Isotonic(kind="isotonic")
SLICED = [Platt(kind="platt", slices="city", min_rows=100), Isotonic(kind="isotonic", slices="city", min_rows=100)]


def observed(n: int = 400, seed: int = 0, decimals: int = 1) -> Observed:
    """Logits rounded (ties) that are half as steep as they should be, real weights, slices 3, 5 and 8, each with a bias of its own."""
    r = np.random.default_rng(seed)
    z, slices = r.normal(-0.5, 1, n).round(decimals), r.choice([3, 5, 8], n)
    truth = 1 / (1 + np.exp(-(2 * z + 0.3 * (slices - 5))))
    return Observed(z, (r.random(n) < truth).astype(float), r.uniform(0.2, 3, n), slices)


def applied(calibration: Calibration, logits, slices=None) -> np.ndarray:
    """Probabilities."""
    slices = None if slices is None else torch.as_tensor(slices)
    return calibration(torch.as_tensor(logits, dtype=torch.float32), slices).double().sigmoid().numpy()


def test_platt_is_logistic_regression():
    rows = observed()
    line, _ = fit("t", PLATT, rows)
    expected = LogisticRegression(C=np.inf, tol=1e-10).fit(rows.logits[:, None], rows.labels, sample_weight=rows.weights)
    assert line.curves.a.item() == pytest.approx(expected.coef_.item(), abs=1e-4)
    assert line.curves.b.item() == pytest.approx(expected.intercept_.item(), abs=1e-4)
    p = applied(line, rows.logits)
    assert (rows.weights * p).sum() == pytest.approx((rows.weights * rows.labels).sum(), rel=1e-6)  # calibrated: Σp = Σy


@pytest.mark.parametrize("logits", [[-2, -1, 1, 2], [0.5, 0.5, 0.5, 0.5], [-80, -80, 80, 80]])
def test_platt_stays_finite_where_the_optimum_is_not(logits):
    """Separated classes, constant logits, saturated ones."""
    rows = Observed(np.array(logits, float), np.array([0.0, 0, 1, 1]), np.ones(4), np.zeros(4, int))
    p = applied(fit("t", PLATT, rows)[0], logits)
    assert p.sum() == pytest.approx(2, abs=1e-3)


def test_isotonic_is_its_definition():
    """The min-max formula of Barlow et al. 1972: p(z) = max over a ≤ z of min over b ≥ z of the mean label between a and b."""
    rows = observed(150)
    curve, _ = fit("t", ISOTONIC, rows)
    grid = np.unique(rows.logits)

    def mean(a, b):
        inside = (rows.logits >= a) & (rows.logits <= b)
        return np.average(rows.labels[inside], weights=rows.weights[inside])

    expected = np.array([max(min(mean(a, b) for b in grid if b >= z) for a in grid if a <= z) for z in grid])
    knots = torch.tensor(grid)  # float64: a knot rounded to float32 may lie before its step
    found = curve(knots, None).double().sigmoid().numpy()
    np.testing.assert_allclose(found, expected.clip(CLIP, 1 - CLIP), atol=1e-6)
    between, outside = (grid[1:] + grid[:-1]) / 2, np.array([-50.0, 50.0])
    np.testing.assert_allclose(curve(torch.tensor(between), None).double().sigmoid(), (found[1:] + found[:-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(curve(torch.tensor(outside), None).double().sigmoid(), found[[0, -1]], atol=1e-6)


def test_isotonic_of_many_steps_keeps_few_knots_and_its_order():
    n = 40_000
    z = np.random.default_rng(0).permutation(np.linspace(-4, 4, n))
    labels = 1 / (1 + np.exp(-z))  # every row a step of its own
    steps, _ = fit("t", ISOTONIC, Observed(z, labels, np.ones(n), np.zeros(n, int)))
    assert len(steps.curves.x) == MAX_KNOTS
    np.testing.assert_allclose(applied(steps, z), labels, atol=1e-4)
    assert (np.diff(applied(steps, np.sort(z))) >= 0).all()


@pytest.mark.parametrize("config", SLICED, ids=lambda c: c.kind)
def test_every_slice_has_its_own_fit_and_the_rest_the_overall_one(config):
    rows = observed(900)
    small = np.flatnonzero(rows.slices == 8)[:99]  # one row fewer than it takes
    rows = rows[np.sort(np.concatenate([np.flatnonzero(rows.slices != 8), small]))]
    sliced, notes = fit("click", config, rows)
    assert sliced.values.tolist() == [3, 5] and "2 of 3 values of city" in notes[0]
    alone = {v: fit("click", config, rows[rows.slices == v])[0] for v in (3, 5)}
    overall = fit("click", config, Observed(rows.logits, rows.labels, rows.weights, np.full(len(rows.slices), NO_SLICE)))[0]
    z = np.tile(np.linspace(-3, 3, 31), 6)
    slices = np.repeat([3, 5, 8, 4, 1000, NO_SLICE], 31)
    expected = np.concatenate([applied(alone.get(v, overall), z[:31]) for v in (3, 5, 8, 4, 1000, NO_SLICE)])
    np.testing.assert_array_equal(applied(sliced, z, slices), expected)
    again = Calibration.from_dict(json.loads(json.dumps(sliced.to_dict())))
    np.testing.assert_array_equal(applied(again, z, slices), expected)


def test_a_slice_of_one_class_uses_the_overall_fit_and_says_so():
    rows = observed(900)
    rows = Observed(rows.logits, np.where(rows.slices == 3, 0.0, rows.labels), rows.weights, rows.slices)
    sliced, notes = fit("click", SLICED[0], rows)
    n = (rows.slices == 3).sum()
    assert notes[1] == f"task 'click': city 3 ({n} rows, all 0): rows of one class fit no curve; they use the overall one"
    assert sliced.values.tolist() == [5, 8]


def test_rows_without_exactly_one_value_have_no_slice():
    ids = KeyedJaggedTensor(keys=["a", "b"], values=torch.tensor([7, 8, 9, 1, 2, 3]), lengths=torch.tensor([1, 2, 0, 0, 1, 1, 1, 0]))
    assert slices_of(ids, "a").tolist() == [7, NO_SLICE, NO_SLICE, NO_SLICE]
    assert slices_of(ids, "b").tolist() == [1, 2, 3, NO_SLICE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.zeros(400)}, "task 'click': its calibration cannot be fitted: all 400 known labels are 0 on the validation split"),
        ({"labels": np.ones(400)}, "all 400 known labels are 1"),
        ({"logits": np.full(400, np.nan)}, "400 logits are not finite"),
        (dict.fromkeys(("logits", "labels", "weights", "slices"), np.zeros(0)), "no label is known"),
    ],
)
def test_what_cannot_be_fitted(change, words):
    with pytest.raises(DistmtlError, match=words):
        fit("click", PLATT, Observed(**{**vars(observed()), **change}))


LISTED = [{"kind": "sequence", "name": "seen", "column": "tags", "rows": 20, "dim": 8, "max_length": 5}]


@pytest.mark.parametrize(
    ("sections", "calibration", "words"),
    [
        ({"data": {"validation": None}}, {"kind": "platt"}, "calibration is fitted on the validation split; set data.validation"),
        ({}, {"kind": "platt", "slices": "cty"}, "calibration.slices 'cty' is no id or bucket feature; did you mean 'city'?"),
        ({"features": LISTED}, {"kind": "platt", "slices": "seen"}, "calibration.slices 'seen' is no id or bucket feature"),
        ({}, {"kind": "isotonic", "slices": "image"}, "calibration.slices 'image' is no id or bucket feature"),
    ],
)
def test_refused_configs(sections, calibration, words):
    raw = tiny.raw(Path(), Path(), **sections)
    raw["tasks"][0]["calibration"] = calibration
    with pytest.raises(DistmtlError, match=words.replace("?", r"\?")):
        parse_config(raw)
