"""Calibration, ROC and precision-recall curves of a binary task's scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 10
POINTS = 200  # of a curve that is drawn

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Bin:
    """Rows whose predictions are neighbours."""

    rows: int
    predicted: float  # weighted means
    observed: float
    low: float  # Wilson's 95 % interval of `observed`
    high: float


@dataclass(frozen=True)
class Curves:
    bins: list[Bin]  # of about equal weight, by prediction
    roc: Points  # false positive rate, true positive rate
    auc: float  # the area below the whole ROC curve, before points are left out
    recall: Points  # recall, precision
    pr_auc: float
    base_rate: float


def curves_of(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Curves | None:
    """(n,) each, weights above 0; None where there is one class only, or a score that is no number."""
    positive, negative = float(weights @ labels), float(weights @ (1 - labels))
    if not (positive and negative and np.isfinite(logits).all()):
        return None
    order = np.argsort(-logits, kind="stable")
    scores, y, w = logits[order], labels[order], weights[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of every run of equal scores
    hits, misses = (np.concatenate([[0.0], np.cumsum(v)[last]]) for v in (w * y, w * (1 - y)))
    tpr, fpr = hits / positive, misses / negative
    precision = hits[1:] / (hits[1:] + misses[1:])
    return Curves(
        bins=bins_of(1 / (1 + np.exp(-scores)), y, w),
        roc=thinned(fpr, tpr),
        auc=float(np.trapezoid(tpr, fpr)),
        recall=thinned(tpr[1:], precision),
        pr_auc=float(np.diff(tpr) @ precision),
        base_rate=positive / (positive + negative),
    )


def bins_of(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> list[Bin]:
    """From rows in descending order of their predictions."""
    through = np.cumsum(weights)
    of = np.minimum((BINS * (through - weights / 2) / through[-1]).astype(int), BINS - 1)
    out = []
    for b in np.unique(of)[::-1]:
        p, y, w = predictions[of == b], labels[of == b], weights[of == b]
        mean = float(w @ y / w.sum())
        out.append(Bin(len(p), float(w @ p / w.sum()), mean, *wilson(mean, float(w.sum() ** 2 / (w @ w)))))
    return out


def wilson(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of n rows (Wilson 1927); weighted rows count as Kish's effective number of them."""
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max((middle - half) / (1 + z**2 / n), 0.0), min((middle + half) / (1 + z**2 / n), 1.0)


def thinned(x: np.ndarray, y: np.ndarray) -> Points:
    """At most POINTS of a curve, evenly along its length; its ends stay."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS)).clip(max=len(x) - 1))
    kept = np.unique(np.concatenate([[0], kept, [len(x) - 1]]))
    return list(zip(x[kept].tolist(), y[kept].tolist(), strict=True))
