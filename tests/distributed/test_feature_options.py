"""Rows for unknown and missing ids, id dropout, projected vectors and crosses, all at once: the invariants of whole runs hold."""

from __future__ import annotations

import pytest
import torch
from options import CROSS, with_options
from worlds import pipeline_of_cuda, records, run_world, saved_state, train_world

from distmtl.verification import gate
from distmtl.verification.gate import shrink
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import short_run


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def test_two_workers_equal_one(tiny_data, tmp_path):
    one, two = (with_options(tiny_data, tmp_path / str(w), steps=27, epochs=2, eval_every=27) for w in (1, 2))
    results = [train_world(one, 1), train_world(two, 2)]
    losses = [[list(r["losses"].values()) for r in records(c, "train")] for c in (one, two)]
    assert len(losses[0]) == 27 and (torch.tensor(losses[0]) - torch.tensor(losses[1])).abs().max() <= 1e-5
    states = [saved_state(c, 27) for c in (one, two)]
    assert difference(*states) <= 1e-5
    assert states[0]["tables/model.embeddings.embedding_bags.user.weight"].shape == (152, 8)
    assert "dense/model.features.dense.linear.of_image.weight" in states[0]
    a, b = (r["metrics"]["validation"]["click"] for r in results)
    assert a["logloss"] == pytest.approx(b["logloss"], abs=1e-5)


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_data, tmp_path):
    """Adaptive optimizers, across an epoch's end: the same ids are dropped. Evaluations between them change nothing."""
    kw = {"optimizer": {}, "epochs": 2, "save_every": 10}
    whole = with_options(tiny_data, tmp_path / "whole", steps=30, eval_every=30, **kw)
    first, second = (with_options(tiny_data, tmp_path / "parts", steps=s, eval_every=10, **kw) for s in (20, 30))
    expected = train_world(whole, 2)
    train_world(first, 2)
    resumed = train_world(second, 2)
    assert difference(saved_state(whole, 30), saved_state(second, 30)) == 0.0
    assert resumed["metrics"] == expected["metrics"]
    assert [r["losses"] for r in records(whole, "train")] == [r["losses"] for r in records(second, "train")]


@pytest.mark.parametrize("interaction", [CROSS, {"kind": "dot"}], ids=["cross", "dot"])
def test_sharded_equals_unsharded(tiny_data, tmp_path, interaction):
    config = with_options(tiny_data, tmp_path / "run", interaction)
    ranks = run_world(short_run, 2, config)
    losses, _, after = unsharded_run(config, ranks)
    assert (losses - ranks[0].losses).abs().max() <= 1e-5
    assert difference(after, ranks[0].after) <= 1e-5
    before = ranks[0].before
    assert all(not torch.equal(before[k], after[k]) for k in after if ".features." in k or ".interaction." in k)


def test_a_table_that_verify_shrinks_is_hashed_into_and_drops_nothing(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "MAX_TABLE_ROWS", 100)
    small, changes = shrink(with_options(tiny_data, tmp_path / "run"), str(tmp_path / "small"))
    assert changes == ["table 'user' has 100 rows instead of 150, and ids are hashed into it, none dropped"]
    assert small.tables_read["user"] == (101, 8), "the row of missing ids is kept"


def test_the_pipeline_of_cuda_trains_the_same(tiny_data, tmp_path, monkeypatch):
    """It traces the model, projections and crosses included."""
    import distmtl.loop as loop

    plain, ahead = (with_options(tiny_data, tmp_path / n, {"kind": "dot"}, precision="bf16", steps=6) for n in ("plain", "ahead"))
    train_world(plain, 2)
    monkeypatch.setattr(loop, "make_pipeline", pipeline_of_cuda)
    train_world(ahead, 2)
    assert [r["losses"] for r in records(plain, "train")] == [r["losses"] for r in records(ahead, "train")]
