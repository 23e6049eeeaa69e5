"""Metrics against scikit-learn and O(n²) oracles: ties, weights, masked rows; pooled against merged over ranks."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn import metrics as sk

from distmtl.config import TaskConfig
from distmtl.errors import DistmtlError
from distmtl.metrics import COLUMNS, Accumulator, Metrics, _bin, better, format_metrics, select
from distmtl.scores import Column, Scored

torch.set_num_threads(1)

TASKS = (Column("click", "binary"), Column("buy", "binary"), Column("watch", "value"))


def make_rows(n: int = 600, seed: int = 0, decimals: int = 1) -> dict[str, np.ndarray]:
    """Logits rounded (ties), real weights, a third of `buy` masked and its labels garbage; `click` alone has an oracle."""
    r = np.random.default_rng(seed)
    logits = r.normal(-0.5, 1.5, (n, 3)).round(decimals)
    truth = 1 / (1 + np.exp(-logits - r.normal(0, 1, (n, 3))))
    labels = (r.random((n, 3)) < truth).astype(float)
    labels[:, 2] = logits[:, 2] + r.normal(0, 2, n) + 1
    weights = r.uniform(0.1, 3, (n, 1)) * np.ones((n, 3))
    masked = r.random((n, 3)) < [0.05, 0.35, 0.2]
    weights[masked] = 0
    labels[masked] = r.choice([np.nan, 7.0, -3.0, np.inf], masked.sum())
    logits[masked] = r.choice([np.nan, 50.0], masked.sum())
    oracle = np.stack([truth[:, 0].round(2), np.full(n, np.nan), np.full(n, np.nan)], 1)
    oracle[masked] = np.nan
    out = {k: v.astype("f4") for k, v in (("logits", logits), ("labels", labels), ("weights", weights))}
    return out | {"groups": r.geometric(0.02, n) - 9, "oracle": oracle.astype("f4")}  # many small groups, some of one class


def accumulate(rows: dict[str, Any], part: slice = slice(None), batch: int = 97, exact_rows: int = 10**6, grouped: bool = True) -> Metrics:
    total = len(rows["logits"])
    accumulator = Accumulator(TASKS, total_rows=total, exact_rows=exact_rows, grouped=grouped)
    mine = [torch.from_numpy(rows[k][part]) for k in ("logits", "labels", "weights", "groups", "oracle")]
    for b in zip(*(t.split(batch) for t in mine), strict=True):
        if len(b[0]):
            accumulator.update(Scored(*b[:3], b[4]), b[3])
    first = accumulator.compute()
    assert accumulator.compute() == first, "compute changes nothing"
    return first


def kept(rows: dict[str, Any], t: int) -> tuple[np.ndarray, ...]:
    """(logit, label, weight, group, oracle) of the rows that count for task t, float64."""
    keep = rows["weights"][:, t] > 0
    x, y, w, o = (rows[k][keep, t].astype(float) for k in ("logits", "labels", "weights", "oracle"))
    return x, y, w, rows["groups"][keep], o


def auc_by_pairs(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    pairs = np.outer(w * (y == 1), w * (y == 0))
    return float((pairs * ((x[:, None] > x) + 0.5 * (x[:, None] == x))).sum() / pairs.sum())


def gauc_by_loop(x: np.ndarray, y: np.ndarray, w: np.ndarray, groups: np.ndarray) -> float:
    aucs, sizes = [], []
    for g in np.unique(groups):
        i = groups == g
        if 0 < y[i].sum() < i.sum():
            aucs.append(auc_by_pairs(x[i], y[i], w[i]))
            sizes.append(w[i].sum())
    assert 0 < len(aucs) < len(np.unique(groups)), "some groups should have one class"
    return float(np.average(aucs, weights=sizes))


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_equal_their_definitions(t, seed):
    rows = make_rows(seed=seed)
    got = accumulate(rows)[TASKS[t].task]
    x, y, w, groups, oracle = kept(rows, t)
    p = 1 / (1 + np.exp(-x))
    base = np.average(y, weights=w)
    logloss = sk.log_loss(y, p, sample_weight=w)
    want = {
        "auc": auc_by_pairs(x, y, w),
        "gauc": gauc_by_loop(x, y, w, groups),
        "pr_auc": sk.average_precision_score(y, x, sample_weight=w),
        "logloss": logloss,
        "ne": logloss / sk.log_loss(y, np.full(len(y), base), sample_weight=w),
        "calibration": (w * p).sum() / (w * y).sum(),
        "rows": len(y),
        "positives": int(y.sum()),
    }
    if t == 0:
        want["best_possible_auc"] = auc_by_pairs(oracle, y, w)
        assert len(np.unique(x)) < len(x) / 3, "ties are the point"
    assert got == pytest.approx(want, rel=1e-12)
    assert got["auc"] == pytest.approx(sk.roc_auc_score(y, x, sample_weight=w), rel=1e-9)
    assert type(got["rows"]) is int
    assert type(got["positives"]) is int


def test_regression_metrics_equal_their_definitions():
    rows = make_rows()
    x, y, w, *_ = kept(rows, 2)
    assert accumulate(rows)["watch"] == pytest.approx(
        {
            "rmse": sk.root_mean_squared_error(y, x, sample_weight=w),
            "mae": sk.mean_absolute_error(y, x, sample_weight=w),
            "calibration": (w * x).sum() / (w * y).sum(),
            "rows": len(y),
        },
        rel=1e-12,
    )


def test_batches_and_order_do_not_matter():
    rows = make_rows()
    shuffled = {k: v[np.random.default_rng(1).permutation(600)] for k, v in rows.items()}
    for exact_rows in (600, 200):
        want = accumulate(rows, exact_rows=exact_rows)
        for got in (accumulate(rows, batch=600, exact_rows=exact_rows), accumulate(shuffled, batch=7, exact_rows=exact_rows)):
            assert got == {t: pytest.approx(v, rel=1e-12) for t, v in want.items()}


def test_integer_weights_are_repeated_rows():
    rows = make_rows(200)
    rows["weights"] = np.ceil(rows["weights"])
    times = rows["weights"].max(1).astype(int)
    repeated = {k: np.repeat(v, times, 0) for k, v in rows.items()}
    repeated["weights"] = np.minimum(repeated["weights"], 1)
    weighted, counted = accumulate(rows), accumulate(repeated)
    for task in weighted:
        same = [m for m in weighted[task] if m not in ("rows", "positives")]
        assert {m: weighted[task][m] for m in same} == pytest.approx({m: counted[task][m] for m in same}, rel=1e-12)


def test_exact_up_to_and_including_exact_rows():
    rows = make_rows()
    assert "auc_error_bound" not in accumulate(rows, exact_rows=600)["click"]
    assert "auc_error_bound" in accumulate(rows, exact_rows=599)["click"]


@pytest.mark.parametrize("decimals", [0, 1, 7])
def test_histogram_is_within_its_bound(decimals):
    rows = make_rows(4000, decimals=decimals)
    x, y, w, *_ = kept(rows, 0)
    got, exact = accumulate(rows, exact_rows=1000)["click"], accumulate(rows)["click"]
    assert abs(got["auc"] - exact["auc"]) <= got["auc_error_bound"]
    assert got["auc_error_bound"] < (0.2 if decimals == 0 else 0.02)
    assert got["pr_auc"] == pytest.approx(exact["pr_auc"], abs=2e-3)
    assert got["best_possible_auc"] == pytest.approx(exact["best_possible_auc"], abs=1e-3)
    by_sums = ("logloss", "ne", "calibration", "rows", "positives")
    assert {m: got[m] for m in by_sums} == {m: exact[m] for m in by_sums}
    if decimals < 7:  # each of these values has a bin of its own, so nothing is lost
        assert (got["auc"], got["pr_auc"]) == pytest.approx((exact["auc"], exact["pr_auc"]), rel=1e-12)
    else:
        assert got["auc"] != exact["auc"]
    mass = {b: ((w * (1 - y))[_bin(x) == b].sum(), (w * y)[_bin(x) == b].sum()) for b in np.unique(_bin(x))}
    n, p = np.array(list(mass.values())).T
    assert got["auc_error_bound"] == pytest.approx((n * p).sum() / (2 * n.sum() * p.sum()), rel=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_histogram_bound_is_reached_by_the_worst_case(order):
    """All scores in one bin, ranked perfectly or perfectly wrong: error ½ and bound ½."""
    x = 1 + np.arange(8, dtype="f4") * np.float32(1e-4)
    rows = one_task(x[::order].copy(), np.repeat([0, 1], 4))
    got = accumulate(rows, exact_rows=1)["click"]
    assert (got["auc"], got["auc_error_bound"]) == (0.5, 0.5)
    assert accumulate(rows)["click"]["auc"] == (order + 1) / 2


def test_bins_keep_order_and_ties():
    r = np.random.default_rng(0)
    special = [-np.inf, np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]
    x = np.sort(np.concatenate([r.normal(0, 10.0 ** r.integers(-30, 30, 5000)), special]).astype("f4"))
    bins = _bin(x)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << 16
    assert all(len(set(bins[x == v])) == 1 for v in np.unique(x)), "-0.0 and 0.0 tie"
    assert _bin(np.float32([-1.0, 1.0])).tolist() != [_bin(np.float32([0.0]))[0]] * 2


def test_sampled_gauc_takes_whole_groups():
    rows = make_rows(20_000)
    rows["groups"] = np.random.default_rng(0).integers(0, 2000, 20_000)
    got = accumulate(rows, batch=5000, exact_rows=5000)["click"]
    x, y, w, groups, _ = kept(rows, 0)
    assert got["gauc_sampled_share"] == pytest.approx(0.25, abs=0.05)
    assert got["gauc"] == pytest.approx(gauc_by_loop(x, y, w, groups), abs=0.03)

    alone = [accumulate(rows | {"groups": np.full(20_000, g)}, batch=5000, exact_rows=5000)["click"] for g in range(12)]
    assert {a["gauc_sampled_share"] for a in alone} == {0.0, 1.0}
    exact = sk.roc_auc_score(y, x, sample_weight=w)
    assert all(a["gauc"] is None if a["gauc_sampled_share"] == 0 else a["gauc"] == pytest.approx(exact, rel=1e-9) for a in alone)


def one_task(x: Any, y: Any, w: Any = 1.0) -> dict[str, np.ndarray]:
    """`click` has logits x, labels y, weights w; the other tasks have no rows."""
    n = len(x)
    rows = {k: np.zeros((n, 3), "f4") for k in ("logits", "labels", "weights")} | {"oracle": np.full((n, 3), np.nan, "f4")}
    rows["logits"][:, 0], rows["labels"][:, 0], rows["weights"][:, 0] = x, y, w
    return rows | {"groups": np.zeros(n, np.int64)}


@pytest.mark.parametrize("exact_rows", [1, 100])
def test_constant_scores_have_auc_one_half(exact_rows):
    got = accumulate(one_task(np.full(6, 0.3), [0, 0, 0, 1, 1, 0]), exact_rows=exact_rows)["click"]
    assert got["auc"] == 0.5
    assert got["pr_auc"] == pytest.approx(1 / 3)
    assert accumulate(one_task([0.0, -0.0], [0, 1]), exact_rows=exact_rows)["click"]["auc"] == 0.5


@pytest.mark.parametrize("exact_rows", [1, 100])
def test_undefined_is_none(exact_rows):
    positive = accumulate(one_task([1.0, 2.0], [1, 1]), exact_rows=exact_rows)
    negative = accumulate(one_task([1.0, 2.0], [0, 0]), exact_rows=exact_rows)["click"]
    for got in (positive["click"], negative):
        assert all(got[m] is None for m in ("auc", "gauc", "pr_auc", "ne"))
        assert got["logloss"] > 0
        assert got["rows"] == 2
    assert negative["calibration"] is None
    assert positive["click"]["calibration"] < 1
    assert all(v is None for m, v in positive["buy"].items() if m not in ("rows", "positives"))
    assert positive["buy"]["rows"] == positive["buy"]["positives"] == positive["watch"]["rows"] == 0
    assert positive["watch"] == {"rmse": None, "mae": None, "calibration": None, "rows": 0}
    broken = accumulate(one_task([np.nan, 1.0, np.inf], [1, 0, 0]), exact_rows=exact_rows)["click"]
    assert all(broken[m] is None for m in ("auc", "gauc", "pr_auc", "logloss", "ne", "calibration"))
    assert broken["rows"] == 3
    json.dumps([positive, negative, broken], allow_nan=False)


def test_no_batch_at_all():
    got = Accumulator(TASKS, total_rows=0, exact_rows=9, grouped=True).compute()
    assert got["click"]["rows"] == 0
    assert got["click"]["auc"] is None
    assert "best_possible_auc" not in got["click"]


def test_keys_follow_what_was_given():
    rows = make_rows()
    assert "gauc" not in accumulate(rows, grouped=False)["click"]
    got = accumulate(rows)
    assert "best_possible_auc" in got["click"]
    assert "best_possible_auc" not in got["buy"]
    rows["oracle"][np.flatnonzero(rows["weights"][:, 0])[0], 0] = np.nan  # of other rows than auc
    assert accumulate(rows)["click"]["best_possible_auc"] is None
    accumulator = Accumulator(TASKS, total_rows=1, exact_rows=9, grouped=False)
    ones = (torch.ones(1, 3, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float32))
    accumulator.update(Scored(*ones, torch.full((1, 3), torch.nan)), None)
    assert "best_possible_auc" not in accumulator.compute()["click"]


def test_logloss_is_in_nats_and_finite():
    assert accumulate(one_task([0.0], [1]))["click"]["logloss"] == pytest.approx(np.log(2), rel=1e-15)
    assert accumulate(one_task([100.0, -100.0], [0, 1]))["click"]["logloss"] == pytest.approx(100, rel=1e-15)
    assert accumulate(one_task([100.0, -100.0], [1, 0]))["click"]["logloss"] == pytest.approx(np.exp(-100), rel=1e-12)


def test_counts_do_not_saturate():
    """float32 would stop at 2²⁴."""
    got = accumulate(one_task([0.0, 0.0, 1.0], [0, 1, 1], [2**24, 1, 1]))["click"]
    assert got["calibration"] == pytest.approx((2**24 / 2 + 0.5 + 1 / (1 + np.exp(-1))) / 2, rel=1e-15)


# ---------------------------------------------------------------------------------------------------------------- ranks


def on_ranks(world_size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """work(rank) in forked processes with a gloo group; the results, which must be valid JSON."""

    def body(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        (folder / f"{rank}.json").write_text(json.dumps(work(rank), allow_nan=False))
        dist.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=body, args=(rank,)) for rank in range(world_size)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0] * world_size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("cuts", [(0, 200, 600), (0, 0, 130, 600), (0, 600, 600)], ids=["two", "three, first empty", "two, last empty"])
def test_merged_over_ranks_equals_pooled(tmp_path, cuts):
    rows = make_rows()
    sizes = (10**6, 250)
    got = on_ranks(len(cuts) - 1, tmp_path, lambda rank: [accumulate(rows, slice(cuts[rank], cuts[rank + 1]), exact_rows=e) for e in sizes])
    assert all(g == got[0] for g in got), "every rank has the same numbers"
    for merged, exact_rows in zip(got[0], sizes, strict=True):
        pooled = accumulate(rows, exact_rows=exact_rows)
        assert ("auc_error_bound" in merged["click"]) == (exact_rows == 250)
        assert merged == {t: pytest.approx(v, rel=1e-12) for t, v in pooled.items()}


# --------------------------------------------------------------------------------------------------------------- choose


def test_select_reads_the_monitor():
    metrics: Metrics = {
        "click": {"auc": 0.8, "ne": 0.5, "rows": 9},
        "buy": {"auc": 0.6, "ne": 0.9, "rows": 9},
        "watch": {"rmse": 2.0, "rows": 9},
    }
    assert select(metrics, 0.25, "loss") == (0.25, False)
    assert select(metrics, None, "auc") == (pytest.approx(0.7), True)
    assert select(metrics, None, "buy.auc") == (0.6, True)
    assert select(metrics, None, "click.ne") == (0.5, False)
    assert select(metrics, None, "rmse") == (2.0, False)
    assert better(0.8, 0.7, "buy.auc")
    assert not better(0.7, 0.7, "auc")
    assert better(0.1, 0.2, "loss")
    assert not better(3.0, 2.0, "watch.rmse")
    assert better(9.0, None, "loss")


@pytest.mark.parametrize(
    ("rows", "monitor", "words"),
    [
        (one_task([1.0, 2.0], [0, 0]), "click.auc", "auc of task 'click' is undefined.*all 2 labels are 0"),
        (one_task([1.0, 2.0], [1, 1]), "ne", "ne of task 'click' is undefined.*all 2 labels are 1"),
        (one_task([1.0, 2.0], [0, 1]), "auc", "auc of task 'buy' is undefined.*no row with a label"),
        (one_task([1.0, 2.0], [0, 1]), "watch.rmse", "rmse of task 'watch' is undefined.*no row with a label"),
        (one_task([1.0, np.nan], [0, 1]), "click.logloss", "logloss of task 'click' is undefined.*not finite"),
        (one_task([1.0, 2.0], [0, 1]) | {"groups": np.arange(2)}, "click.gauc", "gauc of task 'click'.*no group has labels of both"),
        (one_task([1.0, 2.0], [0, 1]), "loss", "'loss' is None"),
        (one_task([1.0, 2.0], [0, 1]), "watch.auc", "task 'watch' has no metric 'auc'"),
    ],
)
def test_select_says_why_a_metric_is_undefined(rows, monitor, words):
    with pytest.raises(DistmtlError, match=words):
        select(accumulate(rows), None, monitor)


def test_select_without_groups_names_the_setting():
    with pytest.raises(DistmtlError, match=r"no task has metric 'gauc'; gauc needs data\.group"):
        select(accumulate(make_rows(), grouped=False), None, "gauc")


def test_format_metrics_is_an_aligned_table():
    text = format_metrics(
        {
            "validation": {"click": {"auc": 0.71234, "best_possible_auc": 0.75, "rows": 12345, "positives": 17, "logloss": 0.2}},
            "test": {"watch": {"rmse": 1234.56, "rows": 9, "mae": None}},
        }
    )
    header, click, watch = text.split("\n")
    assert header.split() == ["split", "task", "AUC", "best", "AUC", "logloss", "RMSE", "MAE", "rows", "positives"]
    assert click.split() == ["validation", "click", "0.7123", "0.7500", "0.2000", "-", "-", "12,345", "17"]
    assert watch.split() == ["test", "watch", "-", "-", "-", "1234.6", "-", "9", "-"]
    assert len(header) == len(click) == len(watch)
    for title in ("AUC", "best AUC", "rows", "positives"):
        end = header.index(" " + title) + len(title)
        assert click[end] != " "
        assert watch[end] != " "
        assert click[end + 1 : end + 2] in ("", " ")
    assert format_metrics({}).split() == ["split", "task"]


@pytest.mark.parametrize("kind", get_args(get_args(TaskConfig)[0]))
def test_every_metric_that_a_config_may_name_has_a_column(kind):
    assert set(kind.metrics) <= set(COLUMNS)


def test_of_joint_metrics_two_are_printed():
    values = {"joint_auc": 0.7, "joint_gauc": 0.7, "joint_pr_auc": 0.2, "joint_logloss": 0.1, "joint_ne": 0.9, "joint_calibration": 1.0}
    assert format_metrics({"test": {"buy": values}}).split("\n")[0].split() == ["split", "task", "joint", "AUC", "joint", "calib."]
