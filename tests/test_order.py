"""Which row is trained when (design: a function of data set, seed, epoch and step alone)."""

import numpy as np
import pytest
import tiny
import torch

from distmtl.data.collate import Collator
from distmtl.data.dataset import open_dataset
from distmtl.data.order import EpochOrder, streams_of
from distmtl.data.reader import Reader


def reader(data, rank=0, world=1, seed=3, batch=128, streams=8, window=64, threads=1):
    config = tiny.config(data, data / "unused")
    dataset = open_dataset(config.data.train)
    return Reader(dataset, Collator(config, locate=dataset.locate), batch, streams, window, seed, rank, world, 2, threads)


def rows_by_step(data, world, first, last, **kw):
    """Real rows of every step, in stream order, put together from all ranks."""
    out = {}
    for rank in range(world):
        for batch in reader(data, rank, world, **kw).batches(first, last):
            assert batch.error is None
            out.setdefault(batch.step, []).append(batch.rows.numpy())
    return {step: np.concatenate([r[r >= 0] for r in parts]) for step, parts in out.items()}


def test_every_row_exactly_once_per_epoch_and_another_order_in_the_next(tiny_data):
    steps = reader(tiny_data).steps_per_epoch
    rows = rows_by_step(tiny_data, 1, 0, 2 * steps)
    first, second = (np.concatenate([rows[e * steps + s] for s in range(steps)]) for e in range(2))
    assert sorted(first) == sorted(second) == list(range(tiny.ROWS["train"]))
    assert (first != second).mean() > 0.99
    assert sum(len(r) for r in rows.values()) == sum(reader(tiny_data).rows_of_step(s) for s in range(2 * steps)) == 2 * tiny.ROWS["train"]


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_the_order_does_not_depend_on_the_number_of_workers(tiny_data, world):
    one, many = rows_by_step(tiny_data, 1, 0, 30), rows_by_step(tiny_data, world, 0, 30)
    assert all(np.array_equal(one[s], many[s]) for s in range(30))


def test_any_position_can_be_the_first(tiny_data):
    steps = reader(tiny_data).steps_per_epoch
    whole = rows_by_step(tiny_data, 1, 0, steps + 5)
    for first in (1, 7, steps - 1, steps, steps + 3):
        tail = rows_by_step(tiny_data, 3, first, steps + 5)
        assert all(np.array_equal(whole[s], tail[s]) for s in range(first, steps + 5))


@pytest.mark.parametrize("threads", [3, 20])
def test_threads_read_the_same_batches(tiny_data, threads):
    one, many = (list(reader(tiny_data, 1, 2, threads=t).batches(5, 40)) for t in (1, threads))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.sparse.values(), b.sparse.values()) and torch.equal(a.sparse.lengths(), b.sparse.lengths())
        for name in ("dense", "labels", "weights", "rows", "groups"):
            assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
        assert (a.step, a.replaced_ids, a.error) == (b.step, b.replaced_ids, b.error)


def test_all_ranks_have_equal_batches_and_padding_weighs_nothing(tiny_data):
    readers = [list(reader(tiny_data, r, 3).batches(0, reader(tiny_data).steps_per_epoch)) for r in range(3)]
    for batches in zip(*readers, strict=True):
        assert len({b.rows.numel() for b in batches}) == 1
        for b in batches:
            padding = b.rows < 0
            assert b.weights[padding].abs().sum() == 0
            assert b.sparse.lengths().view(len(b.sparse.keys()), -1)[:, padding].sum() == 0
    assert any((b.rows < 0).any() for b in readers[0])


def test_values_belong_to_their_rows(tiny_data):
    table = tiny.table(tiny.ROWS["train"], seed=len("train"))
    user, city, tags = table["user"].to_numpy(), table["city"].to_pylist(), table["tags"].to_pylist()
    seen = {}
    for batch in reader(tiny_data, 1, 3).batches(3, 6):
        ids = batch.sparse.to_dict()
        real = batch.rows >= 0
        assert np.array_equal(ids["user"].values().numpy(), user[batch.rows[real].numpy()])
        assert ids["tags"].values().tolist() == [t for r in batch.rows[real].tolist() for t in tags[r]]
        for row, hashed in zip(batch.rows[real].tolist(), ids["city"].values().tolist(), strict=True):
            assert seen.setdefault(city[row], hashed) == hashed
        known = table["conversion"].is_valid().to_numpy()[batch.rows[real].numpy()]
        assert np.array_equal(batch.weights[real, 1].numpy() > 0, known)
        assert np.allclose(batch.weights[real, 0].numpy(), table["w"].to_numpy()[batch.rows[real].numpy()])
    assert len(set(seen.values())) > 20


def test_fewer_rows_than_streams(tiny_data, tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "train").mkdir()
    pq.write_table(tiny.table(5), tmp_path / "train" / "a.parquet")
    for world in (1, 3):
        rows = rows_by_step(tmp_path, world, 0, 1)
        assert sorted(rows[0]) == [0, 1, 2, 3, 4]


def test_shuffling_spreads_neighbours():
    """Rows that lie together in one file come out of an epoch nearly uniformly: the promise docs/data.md makes."""
    groups = np.full(64, 1024)
    order = EpochOrder(groups, (0, 0), num_streams=16, window=2048, rows_per_step=32)
    starts = np.concatenate([[0], np.cumsum(groups)])
    when = np.empty(starts[-1], dtype=np.int64)
    for s in range(16):
        for index in range(-(-order.stream_rows(s) // 2048)):
            first, last, permutation = order.window_of(s, index)
            rows = np.concatenate([np.arange(starts[g] + a, starts[g] + b) for g, a, b in order.pieces(s, first, last)])[permutation]
            when[rows] = np.arange(first, last) // 32
    spread = [len(np.unique(when[g * 1024 : (g + 1) * 1024])) / 128 for g in range(64)]
    assert np.mean(spread) > 0.4  # a row group is trained over at least two fifths of the epoch's steps; unshuffled: 1024 / 65536
    assert abs(np.corrcoef(np.arange(len(when)), when)[0, 1]) < 0.25


def test_streams_are_dealt_whole_and_contiguous():
    for world in range(1, 17):
        dealt = [s for r in range(world) for s in streams_of(r, world, 16)]
        assert dealt == list(range(16))
        sizes = [len(streams_of(r, world, 16)) for r in range(world)]
        assert max(sizes) - min(sizes) <= 1


def test_globs_and_folders_name_the_same_files(tmp_path):
    import pyarrow.parquet as pq

    for name in ("x/p", "x/y/p", "x/y/z/p", "x/_tmp", "_old/p", "x/.hidden"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(tiny.table(10), path)
    for pattern, rows in (
        ("", 30),
        ("/**/*.parquet", 30),
        ("/x/*.parquet", 10),
        ("/x/*/p.parquet", 10),
        ("/x/**/p.parquet", 30),
        ("/?/y/**/p*", 20),
    ):
        assert open_dataset(f"{tmp_path}{pattern}").rows == rows, pattern
