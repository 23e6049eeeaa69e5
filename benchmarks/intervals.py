"""Means over seeds with their 95 % intervals, by Student's t; differences and ratios are of the same seed, paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distmtl.leaderboard import Mean


@dataclass(frozen=True)
class Interval:
    """Where a mean over n seeds lies."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 4, sign: str = "") -> str:
        return f"{self.mean:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"

    def side(self, of: float = 0.0) -> int:
        """-1 if the interval is below a value, 1 if above, 0 if it holds it."""
        return (self.low > of) - (self.high < of)


def interval(values: Sequence[float]) -> Interval:
    """Of the mean; infinite for a single value."""
    found = Mean.of(values)
    assert found, "no values"
    half = math.inf if found.half is None else found.half
    return Interval(found.mean, found.mean - half, found.mean + half, found.n)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of the mean of a - b."""
    return interval(np.subtract(a, b).tolist())


def ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of the geometric mean of a / b."""
    logs = interval(np.log(np.divide(a, b)).tolist())
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)


def table(runs: dict[str, list[dict[str, float]]], baseline: str, digits: int = 4) -> tuple[dict[str, Any], list[str]]:
    """case → figures of every seed: means, and differences from a baseline's; as JSON and as Markdown."""
    names = list(runs[baseline][0])
    report: dict[str, Any] = {}
    lines = ["| |" + "".join(f" {n} | over {baseline} |" for n in names), "|---" * (2 * len(names) + 1) + "|"]
    for case, figures in runs.items():
        cells, report[case] = [], {}
        for n in names:
            ours, theirs = ([f[n] for f in of] for of in (figures, runs[baseline]))
            mean, gain = interval(ours), difference(ours, theirs)
            report[case][n] = {"values": ours, **asdict(mean), "over baseline": asdict(gain)}
            cells += [mean.text(digits), gain.text(digits, "+") if case != baseline else ""]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return report, lines
