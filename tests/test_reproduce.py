"""Intervals of means over seeds, and a reproduction that goes on where it was interrupted."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import difference, interval, ratio, table
from benchmarks.reproduce import funnel
from benchmarks.reproduce.kept import measured
from benchmarks.reproduce.mmoe_synthetic import WIDTH, Synthetic
from distmtl.data.planted import BLOCK
from distmtl.data.synthetic import World
from distmtl.versions import git_commit


def test_an_interval_is_students():
    x = [0.1, 0.4, 0.2, 0.35]
    of = interval(x)
    assert (of.low, of.high) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(0.95))
    assert [of.side(value) for value in (of.low - 0.1, of.mean, of.high + 0.1)] == [1, 0, -1]
    assert interval([1.0]).side(100.0) == 0  # one seed tells nothing


def test_differences_and_ratios_are_paired():
    a, b = [1.0, 2.0, 4.0], [0.9, 1.8, 3.6]
    assert ratio(a, b).low == pytest.approx(1 / 0.9) == ratio(a, b).high
    assert difference(a, b).mean == pytest.approx(0.7 / 3)
    report, lines = table({"x": [{"m": v} for v in a], "y": [{"m": v} for v in b]}, "x")
    assert report["y"]["m"]["over baseline"]["mean"] == pytest.approx(-0.7 / 3)
    assert lines[-1].startswith("| y | 2.1000 [")


def halved(case):
    return {"of": case[1] / 2}


def test_what_was_measured_is_not_measured_again(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text(
        json.dumps({"case": ["a", 4], "figures": {"of": 7.0}, "git": "before"}) + '\n{"case": ["a", 6], "fig'
    )  # and a line cut short
    expected = {("a", 4): {"of": 7.0}, ("a", 6): {"of": 3.0}}
    for _ in range(2):
        found, commits = measured(file, halved, expected, processes=1)
        assert found == expected and commits == sorted({"before", str(git_commit())})


def test_the_two_regressions_are_as_correlated_as_asked():
    for rho in (0.5, 1.0):
        w = Synthetic("steep-5", 3, rho).w.numpy()
        assert w.shape == (WIDTH, 2) and np.linalg.norm(w, axis=0) == pytest.approx([3, 3])
        assert w[:, 0] @ w[:, 1] / 9 == pytest.approx(rho, abs=1e-6)
    x, y = Synthetic("sines-10", 3, 1.0).rows(20_000)
    assert float((y[:, 0] - y[:, 1]).var()) == pytest.approx(2 * 0.01, rel=0.05)  # the noise of both
    assert abs(float(x.mean())) < 0.01


def test_potential_conversions_leave_the_log_as_it_is():
    world, plain = funnel.Potential(3), World(3)
    test = world.block("test", 0)
    assert test.drop_columns("conversion_all").equals(plain.block("test", 0))
    p = test["p_conversion_all"].to_numpy()
    error = test["conversion_all"].to_numpy().mean() - p.mean()
    assert abs(error) < 4 * math.sqrt((p * (1 - p)).sum()) / BLOCK
