"""Calibration of binary tasks: curves from logits to logits, fitted on rows that were not trained on (docs/training.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import CalibrationConfig
from distmtl.errors import DistmtlError

NO_SLICE = -1  # of rows that do not have exactly one value
CLIP = 1e-6  # isotonic probabilities keep this far from 0 and 1
MAX_KNOTS = 1000
RIDGE = 1e-8  # towards a = 1, b = 0, in the mean log loss: finite on rows that a threshold separates


@dataclass(frozen=True)
class Observed:
    """n scored rows that count, float64: logits, labels, weights > 0; and the slice of each, int64."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    slices: np.ndarray

    def __getitem__(self, rows: Any) -> Observed:
        return Observed(self.logits[rows], self.labels[rows], self.weights[rows], self.slices[rows])

    @property
    def one_class(self) -> bool:
        return bool((self.labels > 0.5).all() or (self.labels < 0.5).all())


class Lines(nn.Module):
    """Curves z → a·z + b. forward: logits (B,), which curve each takes (B,) → (B,)"""

    kind = "platt"

    def __init__(self, a: list[float], b: list[float]):
        super().__init__()
        self.register_buffer("a", torch.tensor(a, dtype=torch.float64))
        self.register_buffer("b", torch.tensor(b, dtype=torch.float64))

    def forward(self, z: Tensor, curve: Tensor) -> Tensor:
        return self.a[curve] * z + self.b[curve]

    def to_dict(self) -> dict[str, Any]:
        return {"a": self.a.tolist(), "b": self.b.tolist()}

    @classmethod
    def fit(cls, parts: list[Observed]) -> Lines:
        fits = [_logistic(rows) for rows in parts]
        return cls([a for a, _ in fits], [b for _, b in fits])


class Steps(nn.Module):
    """Curves through knots: probabilities at increasing logits, straight in between, constant outside; returned as logits.

    forward: logits (B,), which curve each takes (B,) → (B,)
    """

    kind = "isotonic"

    def __init__(self, logits: list[list[float]], probabilities: list[list[float]]):
        super().__init__()
        sizes = torch.tensor([len(x) for x in logits])
        self.register_buffer("x", torch.tensor([v for curve in logits for v in curve], dtype=torch.float64))
        self.register_buffer("p", torch.tensor([v for curve in probabilities for v in curve], dtype=torch.float64))
        self.register_buffer("ends", sizes.cumsum(0))
        self.register_buffer("starts", self.ends - sizes)
        self.halvings = int(sizes.max()).bit_length()

    def forward(self, z: Tensor, curve: Tensor) -> Tensor:
        z, low, high = z.double(), self.starts[curve], self.ends[curve] - 1
        for _ in range(self.halvings):  # the knots around z, every row among those of its own curve
            middle = (low + high) // 2
            right = self.x[middle] <= z
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        width = self.x[high] - self.x[low]
        share = ((z - self.x[low]) / torch.where(width > 0, width, 1.0)).clamp(0, 1)
        return torch.lerp(self.p[low], self.p[high], share).clamp(CLIP, 1 - CLIP).logit()

    def to_dict(self) -> dict[str, Any]:
        sizes = (self.ends - self.starts).tolist()
        return {"logits": [x.tolist() for x in self.x.split(sizes)], "probabilities": [p.tolist() for p in self.p.split(sizes)]}

    @classmethod
    def fit(cls, parts: list[Observed]) -> Steps:
        fits = [_isotonic(rows) for rows in parts]
        return cls([x for x, _ in fits], [p for _, p in fits])


CURVES = {curves.kind: curves for curves in (Lines, Steps)}


class Calibration(nn.Module):
    """Of one task: the first curve for all rows, then one for every slice in `values`.

    forward: logits (B,), slice of every row (B,) or None → calibrated logits (B,), float32

    Args:
        slices: the feature whose values are the slices.
        values: of it, increasing.
    """

    def __init__(self, curves: Lines | Steps, slices: str | None = None, values: list[int] | None = None):
        super().__init__()
        self.curves, self.slices = curves, slices
        self.register_buffer("values", torch.tensor(values or [], dtype=torch.int64))

    def forward(self, logits: Tensor, slices: Tensor | None) -> Tensor:
        curve = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        if slices is not None and len(self.values):
            at = torch.searchsorted(self.values, slices).clamp(max=len(self.values) - 1)
            curve = torch.where(self.values[at] == slices, at + 1, 0)
        return self.curves(logits, curve).float()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.curves.kind, "slices": self.slices, "values": self.values.tolist(), **self.curves.to_dict()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Calibration:
        curves = {k: v for k, v in saved.items() if k not in ("kind", "slices", "values")}
        return cls(CURVES[saved["kind"]](**curves), saved["slices"], saved["values"])


def slices_of(ids: KeyedJaggedTensor, feature: str) -> Tensor:
    """The value of every row, as its row in the feature's table: (B,) int64, NO_SLICE for a row that has none or several."""
    bag = ids[feature]
    values = torch.cat([bag.values(), bag.values().new_zeros(1)])  # the last row may be empty
    return torch.where(bag.lengths() == 1, values[bag.offsets()[:-1].long()], NO_SLICE)


def fit(task: str, config: CalibrationConfig, rows: Observed) -> tuple[Calibration, list[str]]:
    """The task's calibration, and what is worth saying about it.

    Raises:
        DistmtlError: no row, rows of one class only, or logits that are not finite.
    """
    if not np.isfinite(rows.logits).all():
        raise DistmtlError(f"task {task!r}: its calibration cannot be fitted: {(~np.isfinite(rows.logits)).sum()} logits are not finite")
    if rows.one_class:
        what = f"all {len(rows.labels):,} known labels are {rows.labels[0]:g}" if len(rows.labels) else "no label is known"
        raise DistmtlError(
            f"task {task!r}: its calibration cannot be fitted: {what} on the validation split; give data.validation rows of both classes, "
            "or leave calibration out"
        )
    values, parts, of_one_class = [], [rows], []
    for value, part in _slices(rows, config.min_rows) if config.slices else ():
        if part.one_class:
            of_one_class.append(f"{value} ({len(part.labels):,} rows, all {part.labels[0]:g})")
        else:
            values.append(value)
            parts.append(part)
    notes = [f"task {task!r}: {config.kind} calibration fitted on {len(rows.labels):,} rows of the validation split"]
    if config.slices:
        notes[0] += f"; {len(values)} of {len(np.unique(rows.slices[rows.slices != NO_SLICE]))} values of {config.slices} by their own rows"
    if of_one_class:
        more = f" and {len(of_one_class) - 3} more" if len(of_one_class) > 3 else ""
        notes.append(
            f"task {task!r}: {config.slices} {', '.join(of_one_class[:3])}{more}: rows of one class fit no curve; they use the overall one"
        )
    return Calibration(CURVES[config.kind].fit(parts), config.slices, values), notes


def _slices(rows: Observed, min_rows: int) -> Iterator[tuple[int, Observed]]:
    """Values and their rows, of those that have enough."""
    order = np.argsort(rows.slices, kind="stable")
    values, starts = np.unique(rows.slices[order], return_index=True)
    for value, first, last in zip(values.tolist(), starts, [*starts[1:], len(order)], strict=True):
        if value != NO_SLICE and last - first >= min_rows:
            yield value, rows[order[first:last]]


def _logistic(rows: Observed) -> tuple[float, float]:
    """a, b that minimise the mean log loss of σ(a·z + b), by Newton's method."""
    x, y = np.stack([rows.logits, np.ones_like(rows.logits)]), rows.labels
    w, start = rows.weights / rows.weights.sum(), np.array([1.0, 0.0])

    def loss(line: np.ndarray) -> float:
        z = line @ x
        return float(w @ (np.logaddexp(0, z) - y * z) + RIDGE / 2 * ((line - start) ** 2).sum())

    line, now = start, loss(start)
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(0.5 * (line @ x)))
        gradient = x @ (w * (p - y)) + RIDGE * (line - start)
        step = np.linalg.solve((x * (w * p * (1 - p))) @ x.T + RIDGE * np.eye(2), gradient)
        while (then := loss(line - step)) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        if then >= now:
            break
        line, now = line - step, then
    return float(line[0]), float(line[1])


def _isotonic(rows: Observed) -> tuple[list[float], list[float]]:
    """Logits and probabilities of the knots."""
    from sklearn.isotonic import IsotonicRegression  # it takes a second to import

    found = IsotonicRegression(y_min=0, y_max=1).fit(rows.logits, rows.labels, sample_weight=rows.weights)
    x, p = found.X_thresholds_, found.y_thresholds_
    if len(x) > MAX_KNOTS:
        kept = np.linspace(0, len(x) - 1, MAX_KNOTS).round().astype(int)
        x, p = x[kept], p[kept]
    return x.tolist(), p.tolist()
