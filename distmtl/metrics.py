"""Per-task metrics of logits over every rank's rows: exact up to a number of rows, then from a histogram with a bound.

    scores = Scores(config, oracle=[])
    accumulator = Accumulator(scores.columns, total_rows=n, exact_rows=config.evaluation.exact_rows, grouped=True)
    for batch in batches:
        accumulator.update(scores(outputs, batch), batch.groups)
    metrics = accumulator.compute()  # {"click": {"auc": 0.71, "logloss": 0.21, …}}, the same on every rank

Everything is weighted; rows of weight 0 (masked labels, padding) count for nothing, whatever their other values. What is
undefined (AUC of one class, anything of no rows, scores that are NaN) is None, so the result is valid JSON. With w the
weights, y the labels, p the predictions (sigmoid of a binary column's score; any other score itself):

    auc                Σ over pairs of a positive and a negative of w⁺w⁻·[1 if ranked right, ½ if tied] / Σ w⁺w⁻
    gauc               Σ_g n_g·AUC_g / Σ_g n_g over the groups with both classes, n_g = Σ_{i∈g} w (Zhou et al. 2018, DIN)
    pr_auc             average precision Σ (R_k - R_{k-1})·P_k over distinct scores, as scikit-learn
    logloss            Σ w·BCE / Σ w, nats
    ne                 logloss / entropy of ȳ = Σ wy / Σ w (He et al. 2014)
    calibration        Σ wp / Σ wy
    rmse, mae          √(Σ w(p - y)² / Σ w), Σ w|p - y| / Σ w
    rows, positives    counts of rows with w > 0, and of those with y > ½
    best_possible_auc  auc of the true probabilities, where the data set knows them
    accuracy           share of rows whose class or level is the predicted one

joint_… are those of a task and all before it on all impressions, entire_… those against the true probabilities had all before it
happened: y there is that probability, and a row counts y as a positive and 1 - y as a negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distmtl.batch import NO_GROUP
from distmtl.data.hashing import mix
from distmtl.errors import DistmtlError
from distmtl.scores import Column, Scored

Values = dict[str, float | int | None]  # metric → value
Metrics = dict[str, Values]  # task → metric → value

HIGHER_IS_BETTER = ("auc", "gauc", "pr_auc", "accuracy")
OF_ENTIRE = ("auc", "auc_error_bound", "best_possible_auc", "calibration", "rows")  # of labels that are probabilities
BINS = 1 << 16
SUMS = ("weight", "prediction", "label", "bce", "squared", "absolute", "rows", "positives", "oracle_rows")
ROW = np.dtype([("logit", "f4"), ("label", "f4"), ("weight", "f4"), ("oracle", "f4"), ("group", "i8")])


class Accumulator:
    """Metrics of C columns over all batches of all ranks.

    Beyond `exact_rows`, `auc`, `pr_auc` and `best_possible_auc` come from a histogram (scores in one bin count as tied):
    |auc - exact auc| ≤ `auc_error_bound`; `gauc` comes from whole groups, drawn by a hash of their id so that about
    `exact_rows` rows are kept: `gauc_sampled_share` is the share of the task's rows that was.

    Args:
        total_rows: rows over all ranks; decides exact or not, so every rank must pass the same number.
        grouped: batches carry groups and `gauc` is wanted.
    """

    def __init__(self, columns: Sequence[Column], *, total_rows: int, exact_rows: int, grouped: bool):
        self.columns = tuple(columns)
        self.exact = total_rows <= exact_rows
        self.grouped = grouped
        self.hash_limit = 0 if self.exact else exact_rows * 2**64 // total_rows
        self.sums = torch.zeros(len(self.columns), len(SUMS), dtype=torch.float64)
        # Negative and positive mass of the logits, then of the oracle's: 2 MiB a task.
        self.histograms = np.zeros((len(self.columns), 4, 0 if self.exact else BINS))
        # Of dtype ROW: 24 bytes a row and task, three times that while one task is ranked.
        self.rows: list[list[np.ndarray]] = [[] for _ in self.columns]

    def update(self, scored: Scored, groups: Tensor | None) -> None:
        """Add a batch; groups (B,). Copies to the CPU."""
        self.sums += _sum([c.family == "binary" for c in self.columns], scored).cpu()
        assert not self.grouped or groups is not None, "grouped, but the batch carries no groups"
        group = 0 if not self.grouped or groups is None else groups.cpu().numpy()
        x, y, w, o = (t.detach().float().cpu().numpy() for t in (scored.scores, scored.labels, scored.weights, scored.oracle))
        for c, column in enumerate(self.columns):
            if column.family == "binary":
                rows = np.empty(len(x), ROW)
                rows["logit"], rows["label"], rows["weight"], rows["oracle"], rows["group"] = x[:, c], y[:, c], w[:, c], o[:, c], group
                self._add(c, rows[w[:, c] > 0])

    def _add(self, t: int, rows: np.ndarray) -> None:
        if not self.exact:
            known = rows[~np.isnan(rows["oracle"])]
            for part, score, of in ((0, rows["logit"], rows), (2, _logit(known["oracle"]), known)):
                bins, weight, label = _bin(score), of["weight"].astype(np.float64), of["label"]
                self.histograms[t, part] += np.bincount(bins, weight * (1 - label), BINS)
                self.histograms[t, part + 1] += np.bincount(bins, weight * label, BINS)
            rows = rows[mix(rows["group"]) < np.uint64(self.hash_limit)] if self.grouped else rows[:0]
        self.rows[t].append(rows)

    def compute(self) -> Metrics:
        """task → metric → value over all ranks. Collective; rank 0 gathers one task's rows at a time. Changes nothing."""
        sums, histograms = _all_reduce(self.sums), self.histograms
        if not self.exact:
            histograms = _all_reduce(torch.from_numpy(histograms)).numpy()
        out: Metrics = {}
        for c, column in enumerate(self.columns):
            total, of_task = dict(zip(SUMS, sums[c].tolist(), strict=True)), out.setdefault(column.task, {})
            if column.family == "mean":
                of_task |= {column.prefix: _ratio(total["prediction"], total["weight"]), "rows": int(total["rows"])}
            elif column.family == "value":
                of_task |= _regression(total)
            else:
                rows = _gather(np.concatenate([np.empty(0, ROW), *self.rows[c]]))
                if rows is not None:
                    ranking = self._exact(rows, total) if self.exact else self._approximate(rows, total, histograms[c])
                    values = _binary(total, ranking)
                    of_task |= {column.prefix + k: v for k, v in values.items() if column.prefix != "entire_" or k in OF_ENTIRE}
        return _broadcast(out)

    def _exact(self, rows: np.ndarray, total: dict[str, float]) -> Values:
        mass = _mass(rows["logit"], rows)
        out: Values = {"auc": _auc(*mass), "pr_auc": _average_precision(*mass)}
        if self.grouped:
            out["gauc"] = _gauc(rows)
        if total["oracle_rows"]:
            out["best_possible_auc"] = _auc(*_mass(rows["oracle"], rows))
        return out

    def _approximate(self, rows: np.ndarray, total: dict[str, float], histogram: np.ndarray) -> Values:
        negative, positive, *oracle = histogram
        out: Values = {"auc": _auc(negative, positive), "pr_auc": _average_precision(negative, positive)}
        out["auc_error_bound"] = _ratio(float(negative @ positive), 2 * float(negative.sum()) * float(positive.sum()))
        if self.grouped:
            out |= {"gauc": _gauc(rows), "gauc_sampled_share": _ratio(len(rows), total["rows"])}
        if total["oracle_rows"]:
            out["best_possible_auc"] = _auc(*oracle)
        return out


# ----------------------------------------------------------------------------------------------------------- one batch


def _sum(binary: list[bool], scored: Scored) -> Tensor:
    """SUMS of a batch, float64 (C, len(SUMS))."""
    keep = scored.weights > 0
    x, y, w = (torch.where(keep, t.detach().double(), 0.0) for t in (scored.scores, scored.labels, scored.weights))
    p = torch.where(torch.tensor(binary, device=x.device), x.sigmoid(), x)
    bce = -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    known = keep & ~scored.oracle.isnan()
    sums = (w, w * p, w * y, w * bce, w * (p - y) ** 2, w * (p - y).abs(), keep, keep & (y > 0.5), known)
    return torch.stack([s.sum(0, dtype=torch.float64) for s in sums], dim=1)


def _bin(scores: np.ndarray) -> np.ndarray:
    """Top 16 bits of float32 scores (n,) in their order: 128 bins an octave, equal scores in one bin."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 + 0 is 0.0, which it ties with
    return (np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> 16).astype(np.int64)


def _logit(probabilities: np.ndarray) -> np.ndarray:
    p = probabilities.astype(np.float64)
    with np.errstate(divide="ignore"):  # ±inf at 0 and 1 have bins too
        return np.log(p) - np.log1p(-p)


# ------------------------------------------------------------------------------------------------------------- formulas


def _mass(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Negative and positive weight at each distinct score, ascending."""
    order = np.argsort(scores)
    return _masses(rows[order], _starts(scores[order]))


def _masses(rows: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight, label = rows["weight"].astype(np.float64), rows["label"]
    return _segment_sum(weight * (1 - label), starts), _segment_sum(weight * label, starts)


def _starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """Index of the first of every run of equal keys."""
    changed = np.ones(len(sorted_keys[0]), bool)
    changed[1:] = np.logical_or.reduce([k[1:] != k[:-1] for k in sorted_keys])
    return np.flatnonzero(changed)


def _segment_sum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts) if len(starts) else np.zeros(0)


def _auc(negative: np.ndarray, positive: np.ndarray) -> float | None:
    """Σ_b P_b·(N_{<b} + N_b/2) / (P·N) over score bins b, ascending."""
    below = np.cumsum(negative) - negative
    return _ratio(float(positive @ (below + negative / 2)), float(negative.sum()) * float(positive.sum()))


def _average_precision(negative: np.ndarray, positive: np.ndarray) -> float | None:
    """Σ_b P_b/P · P_{≥b} / (P_{≥b} + N_{≥b}) over score bins b; None for one class, as auc."""
    filled = positive > 0
    p, n = np.cumsum(positive[::-1])[::-1][filled], np.cumsum(negative[::-1])[::-1][filled]
    return _ratio(float(positive[filled] @ (p / (p + n))), float(positive.sum())) if negative.any() else None


def _gauc(rows: np.ndarray) -> float | None:
    """Σ_g n_g·AUC_g / Σ_g n_g over the groups g with both classes. Rows without a group count for none."""
    rows = rows[rows["group"] != NO_GROUP]
    if not len(rows):
        return None
    rows = rows[np.lexsort((rows["logit"], rows["group"]))]
    starts = _starts(rows["group"], rows["logit"])
    negative, positive = _masses(rows, starts)  # of every distinct (group, score)
    first = _starts(rows["group"][starts])
    below = np.cumsum(negative) - negative
    below -= np.repeat(below[first], np.diff(first, append=len(starts)))
    n, p, right = (_segment_sum(v, first) for v in (negative, positive, positive * (below + negative / 2)))
    both = (n > 0) & (p > 0)
    n, p, right = n[both], p[both], right[both]
    return _ratio(float(((n + p) * right / (n * p)).sum()), float((n + p).sum()))


def _ratio(a: float, b: float) -> float | None:
    """a / b, None where that is undefined or not finite."""
    return a / b if b and math.isfinite(a) and math.isfinite(b) else None


def _binary(total: dict[str, float], ranking: Values) -> Values:
    logloss, mean = _ratio(total["bce"], total["weight"]), _ratio(total["label"], total["weight"])
    entropy = -(mean * math.log(mean) + (1 - mean) * math.log1p(-mean)) if mean and mean < 1 else 0.0
    if math.isnan(total["prediction"]):  # NaN has no rank
        ranking = {k: v if k in ("best_possible_auc", "gauc_sampled_share") else None for k, v in ranking.items()}
    if 0 < total["oracle_rows"] < total["rows"]:  # known on some of the rows only: not comparable with auc
        ranking["best_possible_auc"] = None
    return ranking | {
        "logloss": logloss,
        "ne": None if logloss is None else _ratio(logloss, entropy),
        "calibration": _ratio(total["prediction"], total["label"]),
        "rows": int(total["rows"]),
        "positives": int(total["positives"]),
    }


def _regression(total: dict[str, float]) -> Values:
    mse = _ratio(total["squared"], total["weight"])
    return {
        "rmse": None if mse is None else math.sqrt(mse),
        "mae": _ratio(total["absolute"], total["weight"]),
        "calibration": _ratio(total["prediction"], total["label"]),
        "rows": int(total["rows"]),
    }


# ---------------------------------------------------------------------------------------------------------------- ranks


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(local: Tensor) -> Tensor:
    """Sum over ranks, on the CPU; a copy."""
    if not _distributed():
        return local.clone()
    summed = local.clone().to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(summed)
    return summed.cpu()


def _gather(rows: np.ndarray) -> np.ndarray | None:
    """All ranks' rows, on rank 0; None on the others."""
    if not _distributed():
        return rows
    parts: list[np.ndarray] | None = [rows] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, parts)
    return None if parts is None else np.concatenate(parts)


def _broadcast(metrics: Metrics) -> Metrics:
    """Rank 0's metrics."""
    if not _distributed():
        return metrics
    box = [metrics]
    dist.broadcast_object_list(box)
    return box[0]


# --------------------------------------------------------------------------------------------------------------- choose


def select(metrics: Metrics, loss: float | None, monitor: str) -> tuple[float, bool]:
    """(value, higher is better) of `monitor`: loss, METRIC (mean over the tasks that have it) or TASK.METRIC.

    Raises:
        DistmtlError: undefined on these rows; says which metric of which task, and why.
    """
    task, _, metric = monitor.rpartition(".")
    if monitor == "loss":
        if loss is None or not math.isfinite(loss):
            raise DistmtlError(
                f"train.monitor 'loss' is {loss} on the validation split: it has no labelled row, or the model's outputs are not finite"
            )
        return loss, False
    found = {name: values for name, values in metrics.items() if metric in values and task in ("", name)}
    if not found:
        hint = "; gauc needs data.group" if metric == "gauc" else ""
        raise DistmtlError(f"train.monitor {monitor!r}: {f'task {task!r} has no' if task else 'no task has'} metric {metric!r}{hint}")
    values = []
    for name, of in found.items():
        value = of[metric]
        if value is None:
            raise DistmtlError(
                f"train.monitor {monitor!r}: {metric} of task {name!r} is undefined on the validation split: {_why(of, metric)}"
            )
        values.append(value)
    return sum(values) / len(values), higher_is_better(metric)


def _why(values: Values, metric: str) -> str:
    rows, positives = values["rows"], values.get("positives")
    if not rows:
        return "it has no row with a label of this task; give it more rows, or choose another monitor"
    if positives is not None and positives in (0, rows):
        return f"all {rows} labels are {1 if positives else 0} (one class only); give it more rows, or choose another monitor"
    if metric == "gauc" and values.get("auc") is not None:
        return "no group has labels of both classes; choose another data.group or monitor"
    return "the model's outputs are not finite; lower the learning rate"


def better(new: float, old: float | None, monitor: str) -> bool:
    """Whether `new` strictly beats `old` (None: nothing yet) under `monitor`."""
    if old is None:
        return True
    return new > old if higher_is_better(monitor) else new < old


def higher_is_better(metric: str) -> bool:
    """Of a metric, or of TASK.METRIC; of a loss not."""
    metric = metric.rpartition(".")[2]
    return metric.removeprefix("joint_").removeprefix("entire_").removeprefix("positive_") in HIGHER_IS_BETTER


# ---------------------------------------------------------------------------------------------------------------- print

COLUMNS = {  # metric: (header, format)
    "auc": ("AUC", ".4f"), "best_possible_auc": ("best AUC", ".4f"), "auc_error_bound": ("AUC ±", ".1e"), "gauc": ("GAUC", ".4f"),
    "gauc_sampled_share": ("GAUC share", ".3f"), "pr_auc": ("PR-AUC", ".4f"), "logloss": ("logloss", ".4f"), "ne": ("NE", ".4f"),
    "joint_auc": ("joint AUC", ".4f"), "joint_calibration": ("joint calib.", ".4f"), "entire_auc": ("entire AUC", ".4f"),
    "entire_best_possible_auc": ("best entire", ".4f"), "entire_calibration": ("entire calib.", ".4f"),
    "accuracy": ("accuracy", ".4f"), "positive_auc": ("AUC of > 0", ".4f"), "rmse": ("RMSE", ".5g"), "mae": ("MAE", ".5g"),
    "calibration": ("calibration", ".4f"), "rows": ("rows", ",d"), "positives": ("positives", ",d"),
    "joint_gauc": ("joint GAUC", ".4f"), "joint_pr_auc": ("joint PR-AUC", ".4f"), "joint_logloss": ("joint logloss", ".4f"),
    "joint_ne": ("joint NE", ".4f"),
}  # fmt: skip
ON_REQUEST = ("joint_gauc", "joint_pr_auc", "joint_logloss", "joint_ne")  # a leaderboard's column; too many for every table


def called(metric: str) -> str:
    """A metric as tables head it."""
    return COLUMNS[metric][0] if metric in COLUMNS else metric


def format_metrics(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """split → task → metric → value as an aligned table, a row for each split, task and slice; '-' where there is no value."""
    lines: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
    for split, task, values in ((split, task, values) for split, tasks in metrics.items() for task, values in tasks.items()):
        lines.append(((split, task, ""), values))
        lines += [((split, task, f"{f} {name}"), of) for f, found in values.get("slices", {}).items() for name, of in found.items()]
    named = 3 if any(names[2] for names, _ in lines) else 2
    shown = [m for m in COLUMNS if m not in ON_REQUEST and any(m in values for _, values in lines)]
    table = [[*("split", "task", "slice")[:named], *(COLUMNS[m][0] for m in shown)]]
    for names, values in lines:
        table.append([*names[:named], *("-" if (v := values.get(m)) is None else format(v, COLUMNS[m][1]) for m in shown)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < named else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in table
    )
