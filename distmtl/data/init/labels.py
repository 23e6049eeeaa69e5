"""Labels → tasks, which of them come before which, and columns that give them away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.data.init.guess import round_to
from distmtl.data.init.sample import Column, instants
from distmtl.errors import DistmtlError

LEVELS = 10  # labels 0 … 9 at most are ordinal
PURE = 0.999  # of the rows where one happened the other did too: the rest is noise, as data.max_contradictions has it
CHANCE = 1e-6  # that so many rows all lie where a label is 1
ENOUGH = 10  # positives and negatives, to say anything
SAME = 0.995  # AUC, or its mirror, above which a column is the label
FEW_VALUES = 20
ROWS = 50_000  # of the sample are compared


def task_of(column: Column, name: str) -> tuple[dict[str, Any], str]:
    """The task that a label is, and why.

    Raises:
        DistmtlError: it is no number, all null, or of one value.
    """
    at = {"name": name} if name == column.name else {"name": name, "label": column.name}
    if not len(column.known):
        raise DistmtlError(f"label {column.name!r} is null in all {column.rows:,} rows; name a label that is known somewhere")
    if column.holds not in ("integer", "number", "boolean"):
        example = f"{column.known[0].as_py()!r:.40}"
        raise DistmtlError(
            f"label {column.name!r} holds {column.holds}s such as {example}; write it as 0 and 1, or as a number, null where unknown"
        )
    y = column.numbers
    if y.min() == y.max():
        raise DistmtlError(
            f"label {column.name!r} is {y[0]:g} in all {len(y):,} rows where it is known; there is nothing to learn from one class"
        )
    unknown = f", {column.nulls / column.rows:.1%} unknown" if column.nulls else ""
    values = np.unique(y)
    if set(values) <= {0.0, 1.0}:
        return {"kind": "binary", **at}, f"0 and 1; {_rate(y.mean())} are 1{unknown}"
    if column.holds == "integer" and values[0] == 0 and values[-1] < LEVELS:
        levels = int(values[-1]) + 1
        return {
            "kind": "ordinal",
            **at,
            "levels": levels,
        }, f"0 to {levels - 1}, taken as levels in an order; kind multiclass if they are none{unknown}"
    task = {"kind": "regression", **at, "bias": round_to(y.mean(), 4), "weight": round_to(1 / y.var(), 2)}
    zeros = f"; {_rate((y == 0).mean())} are 0, see also kind zero_inflated_lognormal" if y.min() == 0 and (y == 0).mean() > 0.3 else ""
    return task, f"a number; bias is its mean, weight 1/variance, so that its loss is of the size of the others'{zeros}{unknown}"


def parents_of(labels: dict[str, Column]) -> dict[str, str]:
    """Binary label → the one that has to happen before it: it is 1 only where that is 1, more often than chance would have it.

    Of several the rarest, which is the nearest: click → cart → purchase.
    """
    binary = {name: y for name, column in labels.items() if set(np.unique((y := _numbers(column))[~np.isnan(y)])) == {0.0, 1.0}}
    out = {}
    for name, y in binary.items():
        happened = y == 1
        before = {
            other: (x == 1).sum()
            for other, x in binary.items()
            if (x == 1).sum() > happened.sum() and _only_where(happened, x == 1, ~np.isnan(x))
        }
        if before:
            out[name] = min(before, key=lambda other: before[other])
    return out


def gives_away(column: Column, label: Column) -> str | None:
    """Why a column is (nearly) the label, or comes after it; None if it does not look so."""
    step = max(1, column.rows // ROWS)
    y = _numbers(label)[::step]
    known = ~np.isnan(y)
    values = column.values.take(pa.array(np.arange(0, column.rows, step))) if step > 1 else column.values
    there = values.is_valid().to_numpy(zero_copy_only=False)
    x = _numbers(column)[::step] if column.holds in ("integer", "number", "boolean", "time") else None
    if set(np.unique(y[known])) != {0.0, 1.0}:
        both = known & there
        if x is None or both.sum() < ENOUGH or x[both].std() == 0 or y[both].std() == 0:
            return None
        r = np.corrcoef(x[both], y[both])[0, 1]
        return f"correlation with label {label.name} {r:.4f}: it is the label" if abs(r) > PURE else None
    positive = y == 1
    if min(positive.sum(), (known & ~positive).sum()) < ENOUGH:
        return None
    happened = there if x is None or column.holds == "time" else there & (x != 0)
    if happened.sum() >= ENOUGH and _only_where(happened & known, positive, known):
        what = "there" if x is None or column.holds == "time" else "other than 0"
        return f"{what} only where label {label.name} is 1: known only after it"
    if x is not None and column.holds != "time":
        auc = _auc(x[known & there], positive[known & there])
        return f"AUC {auc:.4f} for label {label.name}: it is the label, or known only after it" if max(auc, 1 - auc) > SAME else None
    if column.holds == "string" and column.distinct <= FEW_VALUES:
        codes = pc.dictionary_encode(values, null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        of_ones, of_all = (np.bincount(codes[rows], minlength=codes.max() + 1) for rows in (positive, known))
        wrong = np.minimum(of_ones, of_all - of_ones).sum()
        if wrong <= (1 - SAME) * min(positive.sum(), (known & ~positive).sum()):
            return f"tells label {label.name} in all but {wrong:,} of {known.sum():,} rows: it is the label"
    return None


def comes_before(column: Column, label: Column) -> bool:
    """Whether a 0/1 column that is no label is 1 wherever the label is 1: an earlier step, a click perhaps."""
    if column.holds not in ("integer", "number", "boolean"):
        return False
    x, y = _numbers(column), _numbers(label)
    if not set(np.unique(x[~np.isnan(x)])) <= {0.0, 1.0} or (x == 1).mean() > 0.5 or (y == 1).sum() < ENOUGH:
        return False
    return (x == 1).sum() > (y == 1).sum() and _only_where(y == 1, x == 1, ~np.isnan(x))


def _only_where(happened: np.ndarray, condition: np.ndarray, known: np.ndarray) -> bool:
    count = happened.sum()
    if count < ENOUGH or (happened & condition).sum() < PURE * count:
        return False
    rate = condition.sum() / max(known.sum(), 1)
    return bool(count * np.log(max(rate, 1e-12)) < np.log(CHANCE))


def _auc(x: np.ndarray, positive: np.ndarray) -> float:
    """P(x of a 1 > x of a 0) + ½·P(=); ½ where there are too few of either."""
    n1 = int(positive.sum())
    n0 = len(x) - n1
    if min(n0, n1) < ENOUGH:
        return 0.5
    values, where = np.unique(x, return_inverse=True)
    ones = np.bincount(where[positive], minlength=len(values))
    zeros = np.bincount(where[~positive], minlength=len(values))
    below = np.cumsum(zeros) - zeros
    return float((ones * (below + zeros / 2)).sum() / (n0 * n1))


def _numbers(column: Column) -> np.ndarray:
    """NaN where null."""
    return instants(column.values).cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def _rate(share: float) -> str:
    return f"{100 * share:.3g} %"
