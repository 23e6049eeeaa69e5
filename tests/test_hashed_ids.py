"""Ids of any size that read several rows of a small table: which, in which config, and what a row of the data makes of them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from torchrec import JaggedTensor

from distmtl.config_file import parse_config
from distmtl.data.collate import ROW, Collator
from distmtl.data.hashing import hash_strings, into_rows, into_table, remainder_and_quotient
from distmtl.data.rows import batch_of
from distmtl.distributed.planner import constraints
from distmtl.errors import DistmtlError
from distmtl.model.layout import Layout
from distmtl.model.multitask import initialise_dense
from distmtl.model.sequences import SequencePooling

HASHED = {"out_of_range": "hash", "hashes": 3}
ROWS = 20
ANY = [3, -1, 2**62, -(2**63), ROWS]


def config_of(more=(), sections=None, **options):
    raw = tiny.raw(Path(), Path(), **(sections or {}))
    raw["features"] = [{"kind": "id", "name": "f", "column": "item", "rows": ROWS, "dim": 8, **HASHED, **options}, *more]
    return parse_config(raw)


def read(values, order=None, **options) -> list[list[int]]:
    """Table rows of every row of the data."""
    n = len(values)
    table = tiny.table(n).set_column(2, "item", [pa.array(values)]).append_column(ROW, pa.array(np.arange(n)))
    config = config_of(**options)
    rows = Collator(config)(table, order)
    batch = batch_of([(rows, 0, n)], ["f"], n + 1)  # and a row of padding
    ids = [part.tolist() for part in batch.sparse["f"].values().split(batch.sparse["f"].lengths().tolist())]
    assert ids.pop() == [] and not rows.replaced.any()
    return ids


def splitmix(x: int) -> int:
    """The finaliser as published, in whole numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def by_hand(i: int, rows: int = ROWS, hashes: int = 3) -> list[int]:
    out = []
    for _ in range(hashes):
        i = splitmix(i)
        out.append(i % rows)
    return out


def test_any_id_reads_as_many_rows_as_hashes():
    assert read(ANY) == [by_hand(i) for i in ANY]
    assert read(ANY, order=np.array([4, 2, 0, 1, 3])) == [by_hand(ANY[i]) for i in (4, 2, 0, 1, 3)]
    assert into_rows(np.array(ANY), ROWS, 1)[:, 0].tolist() == into_table(np.array(ANY), ROWS).tolist(), "the first is that of hashes: 1"


def test_strings_lists_and_missing_ids():
    words = ["a", "Zürich", ""]
    assert read(words) == [by_hand(i) for i in hash_strings(pa.array(words)).tolist()]
    lists = [[5, 77], [], None, [5]]
    of = {i: by_hand(i) for i in (5, 77)}
    assert read(lists) == [of[5] + of[77], [], [], of[5]]
    assert read(lists, missing="row") == [of[5] + of[77], [ROWS], [ROWS], of[5]]
    assert read([5, None], missing="row") == [of[5], [ROWS]]
    assert read([None, None]) == [[], []]


def test_few_ids_share_all_their_rows():
    """100,000 ids in 1,000 rows: one hash leaves none alone; of two, about as many pairs meet as in the sets of two rows by chance."""
    n, rows = 100_000, 1000
    hashed = into_rows(np.arange(n), rows, 2)
    for column in hashed.T:
        counts = np.bincount(column, minlength=rows)
        assert abs(((counts - n / rows) ** 2).sum() / (n / rows) - rows) < 5 * np.sqrt(2 * rows), "χ² of uniform rows"
    _, shared = np.unique(np.sort(hashed, axis=1), axis=0, return_counts=True)
    pairs = (shared * (shared - 1) / 2).sum()
    expected = n * (n - 1) / 2 * 2 / rows**2
    assert abs(pairs - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("rows", [2, 10, 11])
def test_remainder_and_quotient(rows):
    """Every id below m·⌊rows/2⌋ has a pair of its own, and any id is in its half of the table."""
    m = rows - rows // 2
    n = m * (rows // 2)
    pairs = remainder_and_quotient(np.array([*range(n), 2**63 - 1, -1]), rows)
    assert pairs.tolist() == [[i % m, m + i // m % (rows // 2)] for i in [*range(n), 2**63 - 1, 2**64 - 1]]
    assert len({tuple(p) for p in pairs[:n].tolist()}) == n


def test_ids_read_their_remainder_and_their_quotient():
    quotient = {"out_of_range": "quotient", "hashes": 2}
    pair = lambda i: remainder_and_quotient(np.array([i]), ROWS)[0].tolist()  # noqa: E731
    assert read([5, None, 7**20], missing="row", **quotient) == [pair(5), [ROWS], pair(7**20)]
    assert read([[5, 77], [], None], **quotient) == [pair(5) + pair(77), [], []]


def test_the_head_sees_one_feature_and_the_planner_all_lookups():
    sequence = {"kind": "sequence", "name": "s", "column": "tags", "table": "f", "rows": ROWS, "dim": 8, "max_length": 4, **HASHED}
    config = config_of([sequence])
    assert Layout.of(config).places == {"f": (0, 8), "s": (8, 16)}
    assert config.tables_read == {"f": (ROWS, 8)}
    assert constraints(config, 1, 1, "cpu")["f"].pooling_factors == [3.0, 12.0]


@pytest.mark.parametrize("pooling", ["attention", "target"])
def test_sequences_compare_sums_of_rows(pooling):
    """As of ids that read one row each, the sum."""
    target = {"target": "f"} if pooling == "target" else {}
    sequence = {
        "kind": "sequence",
        "name": "s",
        "column": "tags",
        "table": "f",
        "rows": ROWS,
        "dim": 8,
        "max_length": 4,
        "pooling": pooling,
    }
    hashed = SequencePooling(config_of([sequence | target | HASHED]))
    plain = SequencePooling(config_of([sequence | target], out_of_range="error", hashes=1))
    initialise_dense(hashed, 0)
    plain.load_state_dict(hashed.state_dict())
    lengths, ids, targets = torch.tensor([2, 0, 1]), torch.randn(3, 3, 8), torch.randn(3, 3, 8)
    one = torch.ones(3, dtype=torch.int64)
    many = hashed([{"s": JaggedTensor(ids.flatten(0, 1), lengths=3 * lengths), "f": JaggedTensor(targets.flatten(0, 1), lengths=3 * one)}])
    few = plain([{"s": JaggedTensor(ids.sum(1), lengths=lengths), "f": JaggedTensor(targets.sum(1), lengths=one)}])
    torch.testing.assert_close(many["s"], few["s"])
    nothing = hashed([{"s": JaggedTensor(ids[:0, 0], lengths=0 * lengths), "f": JaggedTensor(targets.flatten(0, 1), lengths=3 * one)}])
    assert not nothing["s"].any()


def test_a_target_has_one_id_in_every_row():
    sequence = {"kind": "sequence", "name": "s", "column": "tags", "table": "f", "rows": ROWS, "dim": 8, "max_length": 4, **HASHED}
    more = [sequence | {"pooling": "target", "target": "f"}]
    table = tiny.table(3).append_column(ROW, pa.array(np.arange(3)))
    rows = Collator(config_of(more))(table.set_column(2, "item", [pa.array([7, 8, 9])]))
    assert rows.bags[0].lengths.tolist() == [3, 3, 3]
    rows = Collator(config_of([more[0] | {"table": "own"}], missing="row"))(table.set_column(2, "item", [pa.array([7, None, 9])]))
    assert rows.bags[0].lengths.tolist() == [3, 1, 3]
    for values, count in (([7, None, 9], 0), ([[7], [8, 9], [9]], 2)):
        with pytest.raises(DistmtlError, match=f"feature 'f': {count} values at row 1; the target of 's': every row has exactly one"):
            Collator(config_of(more))(table.set_column(2, "item", [pa.array(values)]))


OTHER = {"kind": "id", "name": "g", "table": "f", "rows": ROWS, "dim": 8, "out_of_range": "hash"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *[({"out_of_range": p}, "feature 'f': with hashes 3 every id is hashed; set out_of_range: hash") for p in ("error", "clip", "oov")],
        ({"id_dropout": 0.1}, "id_dropout replaces ids by the oov row"),
        (
            {"more": [OTHER]},
            "table 'f': an id of feature 'g' reads 1 rows, of 'f' 3 rows; give both the same hashes and out_of_range, or different tables",
        ),
        ({"out_of_range": "quotient"}, "feature 'f': with out_of_range: quotient an id reads two rows of at least two; set hashes: 2"),
        (
            {"sections": {"model": {"kind": "star", "domain": "f"}}, "more": [{"kind": "numeric", "name": "x"}]},
            "model.domain 'f': a domain is one row of its table, not 3; leave its hashes out",
        ),
        (
            {"sections": {"tasks": [{"kind": "binary", "name": "click", "calibration": {"kind": "platt", "slices": "f"}}]}},
            "calibration.slices 'f' has hashes, so that no row of its table is one value's",
        ),
    ],
)
def test_what_hashes_do_not_go_with(arguments, sentence):
    with pytest.raises(DistmtlError, match=sentence):
        config_of(**arguments)


def test_managed_collision_is_refused():
    """For a reason that is looked at: once FBGEMM has that kernel, it may be built."""
    with pytest.raises(
        DistmtlError, match=r"features.f.out_of_range: managed collision .* is not built: a row's .* use hash with hashes: 2, or oov"
    ):
        config_of(out_of_range="managed", hashes=1)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::reset_weight_momentum", "CPU")


def test_no_hash_is_of_the_others():
    """Neither the second, third nor fourth row can be told from those before: as many equal as by chance."""
    n = 20_000
    hashed = into_rows(np.arange(n), 10, 4)
    for a, b in combinations(hashed.T, 2):
        assert abs((a == b).mean() - 0.1) < 5 * np.sqrt(0.09 / n)
