"""The synthetic log: the same for a seed, consistent with its own true probabilities, whole or absent."""

import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from distmtl.__main__ import main
from distmtl.config_file import load_config
from distmtl.data import synthetic
from distmtl.data.output import SPLITS
from distmtl.data.planted import BLOCK
from distmtl.data.synthetic import World, write_log
from distmtl.data.wide import WideWorld
from distmtl.errors import DistmtlError

ROWS = 100_000


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "log"
    seen = []
    write_log(
        out, World(users=3000, items=500), rows=ROWS, eval_share=0.4, rows_per_file=BLOCK, progress=lambda done, of: seen.append((done, of))
    )
    assert seen[-1] == (ROWS, ROWS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    return out


@pytest.fixture(scope="module")
def test_rows(log) -> pd.DataFrame:
    return pq.read_table(log / "test").to_pandas()


def _within(y: pd.Series, p: pd.Series, sigmas: float = 4) -> bool:
    return abs((y - p).sum()) < sigmas * math.sqrt((p * (1 - p)).sum())


def test_rows_are_split_over_files_of_whole_blocks(log):
    rows = {s: [pq.read_metadata(f).num_rows for f in sorted((log / s).iterdir())] for s in SPLITS}
    assert rows == {
        "train": [BLOCK, ROWS // 5 - BLOCK],
        "validation": [BLOCK, BLOCK, ROWS * 2 // 5 - 2 * BLOCK],
        "test": [BLOCK, BLOCK, ROWS * 2 // 5 - 2 * BLOCK],
    }


def test_a_seed_gives_the_same_log_however_it_is_cut_and_a_longer_one_begins_with_it(log, tmp_path):
    write_log(tmp_path / "again", World(users=3000, items=500), rows=2 * ROWS, eval_share=0.4, rows_per_file=10**6)
    write_log(tmp_path / "other", World(1, users=3000, items=500), rows=ROWS, eval_share=0.4)
    for split in SPLITS:
        first = pq.read_table(log / split)
        assert pq.read_table(tmp_path / "again" / split)[: len(first)].equals(first)
        assert not pq.read_table(tmp_path / "other" / split).equals(first)


def test_splits_differ(log):
    heads = [pq.read_table(log / s)["user_id"].to_numpy()[:1000] for s in SPLITS]
    assert not (heads[0] == heads[1]).all()
    assert not (heads[1] == heads[2]).all()


def test_labels_follow_the_true_probabilities(test_rows):
    clicked = test_rows[test_rows.click == 1]
    assert _within(test_rows.click, test_rows.p_click)
    assert _within(clicked.conversion, clicked.p_conversion)
    assert test_rows.p_click.mean() == pytest.approx(synthetic.CLICK_RATE, rel=0.05)
    assert clicked.p_conversion.mean() == pytest.approx(synthetic.CONVERSION_RATE, rel=0.1)
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 1)):  # in every range of p, not only on average
        some = test_rows[test_rows.p_click.between(low, high)]
        assert _within(some.click, some.p_click)


def test_later_labels_are_unknown_where_nothing_happened(test_rows):
    assert (test_rows.conversion.isna() == (test_rows.click == 0)).all()
    rated, converted = test_rows.rating.notna(), test_rows.conversion == 1
    assert not (rated & ~converted).any()
    assert 0.8 < rated.sum() / converted.sum() < 0.97
    assert set(test_rows.rating.dropna()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert 0.04 < test_rows.days_since_visit.isna().mean() < 0.06


def test_no_column_orders_the_rows_as_well_as_the_true_probability(test_rows):
    best = roc_auc_score(test_rows.click, test_rows.p_click)
    assert 0.75 < best < 0.82
    features = [c for c in test_rows.columns if c not in ("click", "conversion", "rating", "interests") and not c.startswith("p_")]
    for name in features:
        filled = test_rows[name].fillna(test_rows[name].mean())
        alone = roc_auc_score(test_rows.click, filled)
        assert max(alone, 1 - alone) < best - 0.05, name


def test_true_probabilities_are_kept_from_training(log):
    names = pq.read_table(log / "train").column_names
    assert not [n for n in names if n.startswith("p_")]
    assert {"p_click", "p_conversion", "p_conversion_all"} <= set(pq.read_table(log / "validation").column_names)


def test_ids_are_in_their_tables_skewed_and_their_attributes_constant(log):
    rows = pq.read_table(log / "train").to_pandas()
    config = load_config(log / "mmoe.yaml")
    for feature in config.embedded:
        ids = np.concatenate(rows[feature.name].to_list()) if feature.name == "interests" else rows[feature.name]
        assert ids.min() >= 0, feature.name
        assert ids.max() < feature.rows, feature.name
    counts = rows.user_id.value_counts()
    assert counts.iloc[:30].sum() > 0.15 * len(rows)
    assert (rows.groupby("user_id")[["age", "city"]].nunique() == 1).all(axis=None)
    assert (rows.groupby("item_id")[["category", "brand", "price"]].nunique() == 1).all(axis=None)


def test_without_confounding_the_clicked_convert_as_everybody_would(test_rows):
    assert np.array_equal(test_rows.p_conversion, test_rows.p_conversion_all)


def test_a_hidden_confounder_makes_the_clicked_likelier_to_convert():
    rows = pd.concat([World(0, 3000, 500, 1, confounding=1.5).block("test", b).to_pandas() for b in range(3)])
    clicked = rows[rows.click == 1]
    assert (rows.p_conversion > rows.p_conversion_all).all()
    assert _within(rows.click, rows.p_click)
    assert _within(clicked.conversion, clicked.p_conversion)
    assert not _within(clicked.conversion, clicked.p_conversion_all)


def test_integrals_over_the_hidden_equal_simulation():
    world, rng = World(0, 3000, 500, 1, confounding=1.5), np.random.default_rng(0)
    a, q = np.array([-3.0, 0.5]), np.array([-2.0, 1.0])
    h, e, f = rng.standard_normal((3, 400_000, 1))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    click, conversion = sigmoid(a + 0.5 * e + 1.5 * h), sigmoid(q + 0.5 * f + 1.5 * h)
    assert world.marginal(a) == pytest.approx(click.mean(0), rel=0.01)
    assert world.p_conversion(a, q) == pytest.approx((click * conversion).mean(0) / click.mean(0), rel=0.01)


def test_huge_id_spaces_and_domains_cost_no_memory(tmp_path):
    write_log(tmp_path / "log", World(users=10**8, items=10**8, domains=3), rows=1000)
    rows = pq.read_table(tmp_path / "log" / "train").to_pandas()
    assert 10**6 < rows.user_id.max() < 10**8
    assert rows.domain.nunique() == 3
    assert "domain" in [f.name for f in load_config(tmp_path / "log" / "mmoe.yaml").features]


@pytest.mark.parametrize("head", ["mmoe", "ple", "shared_bottom"])
def test_ready_configs_load(log, head):
    config = load_config(log / f"{head}.yaml")
    assert config.model.kind == head
    assert config.data.train == str(log / "train")
    assert [t.true_probability for t in config.tasks] == ["p_click", "p_conversion"]


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 3}, {"eval_share": 0.5}, {"users": 0}, {"domains": 0}, {"seed": -1},
        {"confounding": -1.0}, {"confounding": float("nan")}, {"confounding": float("inf")}, {"kept_negatives": float("nan")},
    ],
)  # fmt: skip
def test_options_out_of_range_leave_nothing(tmp_path, options):
    sizes = {k: v for k, v in options.items() if k in ("rows", "eval_share")}
    world = {k: v for k, v in options.items() if k not in sizes}
    with pytest.raises(DistmtlError, match=next(iter(options))):
        write_log(tmp_path / "log", World(**world), **{"rows": 1000, **sizes})
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DistmtlError, match="not empty"):
        write_log(tmp_path, World(), rows=1000)
    with pytest.raises(DistmtlError, match="is a file"):
        write_log(tmp_path / "mine.txt", World(), rows=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    write_log(tmp_path / "empty", World(), rows=1000)
    assert (tmp_path / "empty" / "mmoe.yaml").exists()


def test_an_interrupted_log_leaves_nothing(tmp_path):
    def interrupt(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_log(tmp_path / "log", World(), rows=1000, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_wide_log(tmp_path):
    """As many features as it says, over tables as large as it says, with a signal; labels nest."""
    write_log(tmp_path / "log", WideWorld(ids=6, bags=1, numbers=2, largest=10_000), rows=40_000, eval_share=0.4)
    config, rows = load_config(tmp_path / "log" / "mmoe.yaml"), pq.read_table(tmp_path / "log" / "test").to_pandas()
    assert [f.rows for f in config.embedded] == [100, 251, 631, 1585, 3981, 10_000, 1585]
    assert len(config.features) == 9
    assert rows.id05.between(9_000, 9_999).any()
    assert (rows.conversion <= rows.click).all()
    assert _within(rows.click, rows.p_click)
    assert _within(rows.conversion, rows.p_conversion)
    assert roc_auc_score(rows.click, rows.p_click) > 0.75


def test_sizes_that_a_wide_log_does_not_have_are_refused(tmp_path, capsys):
    assert main(["synth", "--wide", "--users", "5", "--out", str(tmp_path / "log")]) == 1
    assert "--users says nothing about a --wide log" in capsys.readouterr().err
