"""Which row of its table an id reads: unknown ids, missing ones, and those that training drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny

from distmtl.config_file import parse_config
from distmtl.data.collate import ROW, Collator
from distmtl.errors import DistmtlError
from distmtl.model.embeddings import embedding_tables
from distmtl.model.layout import Layout

ROWS = 20
BOTH = {"out_of_range": "oov", "missing": "row"}


def config_of(column="item", seed=0, more=(), **options):
    raw = tiny.raw(Path(), Path(), run={"seed": seed})
    raw["features"] = [{"kind": "id", "name": "f", "column": column, "rows": ROWS, "dim": 8, **options}, *more]
    return parse_config(raw)


def table_of(values, start=0):
    n = len(values)
    table = tiny.table(n).set_column(2, "item", [values if isinstance(values, pa.Array) else pa.array(values)])
    return table.append_column(ROW, pa.array(np.arange(start, start + n)))


def read(values, training=False, epoch=0, start=0, order=None, **options):
    """Table rows of every row, and how many ids were replaced."""
    rows = Collator(config_of(**options), training=training)(table_of(values, start), order, epoch)
    if rows.bags:
        return [rows.bags[0].values[a:b].tolist() for a, b in zip(rows.bags[0].starts, rows.bags[0].starts[1:], strict=False)], rows
    return [[i] for i in rows.single[0].tolist()], rows


@pytest.mark.parametrize(
    ("options", "expected", "table_rows"),
    [
        ({"out_of_range": "oov"}, [[3], [], [20], [20], [19]], 21),
        ({"out_of_range": "clip", "missing": "row"}, [[3], [20], [19], [19], [19]], 21),
        (BOTH, [[3], [21], [20], [20], [19]], 22),
    ],
    ids=["oov", "missing", "both"],
)
def test_extra_rows_of_single_ids(options, expected, table_rows):
    got, rows = read([3, None, 20, -1, 19], **options)
    assert got == expected and rows.replaced.tolist() == [0, 0, 1, 1, 0]
    assert config_of(**options).tables_read == {"f": (table_rows, 8)}
    assert embedding_tables(config_of(**options)).embedding_bags["f"].num_embeddings == table_rows


def test_extra_rows_of_lists():
    """In any order of rows; an empty list and a null are both missing."""
    lists = [[3, 99, 3], [], None, [19], [-5]]
    expected = [[3, 20, 3], [21], [21], [19], [20]]
    got, rows = read(lists, **BOTH)
    assert got == expected and rows.replaced.tolist() == [1, 0, 0, 0, 1]
    order = np.array([4, 2, 0, 1, 3])
    got, rows = read(lists, order=order, **BOTH)
    assert got == [expected[i] for i in order] and rows.bags[0].lengths.tolist() == [1, 1, 3, 1, 1]


@pytest.mark.parametrize("values", [pa.nulls(4), pa.array([None] * 4, pa.list_(pa.int64())), pa.array([[]] * 4, pa.list_(pa.int64()))])
def test_a_column_of_nothing_reads_the_missing_row(values):
    assert read(values, **BOTH)[0] == [[21]] * 4


def test_strings_are_hashed_into_the_rows_of_ids():
    got, rows = read([f"item {i}" for i in range(400)] + [None], **BOTH)
    assert {i for (i,) in got[:-1]} == set(range(ROWS)) and got[-1] == [21] and not rows.replaced.any()


def test_a_domain_may_be_missing_or_unknown():
    raw = tiny.raw(Path(), Path(), model={"kind": "star", "domain": "f"})
    raw["features"] = [{"kind": "id", "name": "f", "column": "item", "rows": ROWS, "dim": 8, **BOTH}]
    raw["features"].append({**raw["features"][0], "name": "again"})
    config = parse_config(raw)
    assert Collator(config)(table_of([3, None, 99])).domain.tolist() == [3, 21, 20] and Layout.of(config).domains == 22


# ---------------------------------------------------------------------------------------------------------- id dropout

DROPPING = {**BOTH, "id_dropout": 0.3}


def dropped(*args, **kw):
    return [row == [ROWS] for row in read(*args, training=True, **{**DROPPING, **kw})[0]]


def test_about_the_share_is_dropped_in_training_only():
    ids = [i % ROWS for i in range(20_000)]
    share = np.mean(dropped(ids))
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    got, rows = read(ids, training=True, **DROPPING)
    assert not rows.replaced.any() and all(g in ([i], [ROWS]) for g, i in zip(got, ids, strict=True))
    assert read(ids, **DROPPING)[0] == [[i] for i in ids], "evaluation drops nothing"


def test_what_is_dropped_depends_on_the_row_alone():
    """Not on the rows that it is read with, nor on their order."""
    ids = [i % ROWS for i in range(600)]
    whole = dropped(ids)
    assert dropped(ids[100:250], start=100) == whole[100:250]
    order = np.random.default_rng(0).permutation(600)
    assert dropped(ids, order=order) == [whole[i] for i in order]


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"start": 600}], ids=str)
def test_draws_are_others_in_another_epoch_run_and_row(other):
    ids = [i % ROWS for i in range(600)]
    agree = np.mean(np.equal(dropped(ids), dropped(ids, **other)))
    assert abs(agree - (0.3**2 + 0.7**2)) < 0.1  # as independent draws do


def test_features_are_dropped_independently():
    more = [{"kind": "id", "name": "g", "column": "item", "rows": ROWS, "dim": 8, **DROPPING}]
    single = read([i % ROWS for i in range(600)], training=True, more=more, **DROPPING)[1].single
    a, b = single == ROWS
    assert abs(np.mean(a == b) - (0.3**2 + 0.7**2)) < 0.1


def test_ids_of_a_list_are_dropped_independently_and_nothing_stays_missing():
    lists = [[7, 7] if i % 3 else [] for i in range(900)]
    got, rows = read(lists, training=True, **DROPPING)
    assert all(row == [ROWS + 1] for row in got[::3])
    pairs = [tuple(row) for i, row in enumerate(got) if i % 3]
    assert {7, ROWS} == {i for pair in pairs for i in pair}
    assert len(set(pairs)) == 4 and abs(np.mean([a == ROWS for a, _ in pairs]) - 0.3) < 0.08
    assert not rows.replaced.any()


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_dropped_ids_need_a_row():
    for policy in ("error", "hash", "clip"):
        with pytest.raises(DistmtlError, match="feature 'f': id_dropout replaces ids by the oov row; set out_of_range: oov"):
            config_of(out_of_range=policy, id_dropout=0.1)


@pytest.mark.parametrize(
    ("mine", "theirs", "sentence"),
    [
        ({"out_of_range": "oov"}, {"missing": "row"}, "'g' wants missing rows on top, 'f' oov; give both"),
        (BOTH, {}, "'g' wants no rows on top, 'f' oov and missing; give both"),
        ({}, {"out_of_range": "oov"}, "'g' wants oov rows on top, 'f' none; give both"),
    ],
    ids=["another", "fewer", "more"],
)
def test_features_of_a_table_agree_on_its_rows(mine, theirs, sentence):
    other = {"kind": "id", "name": "g", "rows": ROWS, "dim": 8, "table": "f"}
    with pytest.raises(DistmtlError, match=sentence):
        config_of(more=[other | theirs], **mine)
    config_of(more=[other | BOTH | {"id_dropout": 0.5}], **BOTH)


def test_ids_out_of_range_are_told_of_oov():
    with pytest.raises(DistmtlError, match="raise rows, or set out_of_range to hash, clip or oov"):
        read([20])
