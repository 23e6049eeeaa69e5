"""Sequences on real ranks: sharded = unsharded, W workers = 1, resumed at another world size = saved, on CUDA's pipeline too."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_matching import start
from test_training import difference, state_after_loading
from worlds import pipeline_of_cuda, records, run_world, saved_state, train_world

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import short_run

TABLES = ("item", "shelf")
SEQUENCES = [
    {"name": "history", "table": "item", "rows": 50, "pooling": "target", "target": "item", "attention": [6], "max_length": 3},
    {"name": "shelf", "rows": 20, "pooling": "attention", "max_length": 2, "too_long": "newest"},
    {"name": "shelf_again", "table": "shelf", "rows": 20, "pooling": "mean", "max_length": 3},
    {"name": "words", "rows": 20, "pooling": "sum", "max_length": 3, "dim": 4},
]  # fmt: skip


def config_for(data, run, *, sharding=None, optimizer="sgd", **train) -> Config:
    """History and item share a table, shelf and shelf_again another, of two column shards each; tables of two widths; bags beside them."""
    raw = tiny.raw(data, run, optimizer={"tables": {"kind": optimizer, "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}})
    raw["features"][1]["dim"] = 64
    raw["features"] += [{"kind": "sequence", "column": "tags", "dim": 64, **s} for s in SEQUENCES]
    raw["tables"] = {t: {"sharding": [sharding]} for t in TABLES} if sharding else {}
    raw["train"] |= {"log_every": 1, **train}
    return parse_config(raw)


CASES = [
    ("table_wise", "sgd", 2), ("row_wise", "sgd", 2), ("column_wise", "sgd", 2),
    ("table_wise", "rowwise_adagrad", 1), ("row_wise", "rowwise_adagrad", 3), ("column_wise", "adagrad", 2),
]  # fmt: skip


@pytest.mark.parametrize(("sharding", "optimizer", "world_size"), CASES)
def test_sharded_equals_unsharded(tiny_data, tmp_path, sharding, optimizer, world_size):
    """Adagrad would tell two updates of a shared table in a step from one."""
    config = config_for(tiny_data, tmp_path / "run", sharding=sharding, optimizer=optimizer)
    ranks = run_world(short_run, world_size, config)
    run = ranks[0]
    assert {run.sharding[t] for t in TABLES} == {sharding}
    assert all(torch.equal(run.gradients, r.gradients) for r in ranks), "dense gradients differ between ranks"
    losses, _, expected = unsharded_run(config, ranks)
    assert (run.losses - losses).abs().max() <= 1e-5
    assert expected.keys() == run.after.keys()
    for name, weight in expected.items():
        assert not torch.equal(run.after[name], run.before[name]), f"{name} never moved"
        if optimizer == "sgd":
            assert (run.after[name] - weight).abs().max() <= 1e-5, name


def test_two_workers_equal_one(tiny_data, tmp_path):
    """Over an epoch's end, whose last step is padded."""
    configs = [config_for(tiny_data, tmp_path / str(w), steps=27, epochs=2, eval_every=27) for w in (1, 2)]
    results = [train_world(c, w) for w, c in enumerate(configs, start=1)]
    losses = [[list(r["losses"].values()) for r in records(c, "train")] for c in configs]
    assert len(losses[0]) == 27 and (torch.tensor(losses[0]) - torch.tensor(losses[1])).abs().max() <= 1e-5
    assert difference(*(saved_state(c, 27) for c in configs)) <= 1e-5
    a, b = (r["metrics"]["validation"]["click"]["logloss"] for r in results)
    assert a == pytest.approx(b, abs=1e-5)


def test_a_checkpoint_loads_at_another_world_size_and_layout(tiny_data, tmp_path):
    before = None
    for steps, (sharding, world_size) in enumerate([("row_wise", 2), ("table_wise", 1), ("column_wise", 2)], start=1):
        config = config_for(
            tiny_data, tmp_path / "run", sharding=sharding, optimizer="adagrad", steps=4 * steps, save_every=4, eval_every=4
        )
        loaded = run_world(state_after_loading, world_size, config)[0]
        assert before is None or difference(before, loaded) == 0.0
        train_world(config, world_size)
        before = saved_state(config, 4 * steps)
    assert {"tables/model.sequences.64.embeddings.item.weight", "dense/model.pooling.units.shelf_pooling.query.weight"} <= before.keys()


def test_the_pipeline_of_cuda_trains_the_same(tiny_data, tmp_path, monkeypatch):
    import distmtl.loop as loop

    plain, ahead = (config_for(tiny_data, tmp_path / n, steps=6, eval_every=3, save_every=3) for n in ("plain", "ahead"))
    train_world(plain, 2)
    monkeypatch.setattr(loop, "make_pipeline", pipeline_of_cuda)
    train_world(ahead, 2)
    assert difference(saved_state(plain, 6), saved_state(ahead, 6)) == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_feature_but_sequences(tiny_data, tmp_path, precision):
    config = config_for(tiny_data, tmp_path / "run", steps=3, eval_every=3, precision=precision)
    config = config.model_copy(update={"features": tuple(f for f in config.features if f.kind == "sequence" and f.name != "history")})
    assert train_world(config, 2)["steps"] == 3


def test_a_table_of_bags_that_becomes_one_of_sequences_keeps_its_rows(tiny_data, tmp_path):
    """With --resume-policy matching: weights and optimizer state of a table that a new sequence feature reads."""
    config = config_for(tiny_data, tmp_path / "run", optimizer="adagrad", steps=2, save_every=2, eval_every=2)
    bags = config.model_copy(update={"features": tuple(f for f in config.features if f.kind != "sequence")})
    train_world(bags, 1)
    old = saved_state(bags, 2)
    _, after, _ = run_world(start, 2, config, "matching")[0]
    for name in ("tables/model.{}.item.weight", "tables_optimizer/model.{}.item.weight/item.momentum1"):
        assert torch.equal(after[name.format("sequences.64.embeddings")], old[name.format("embeddings.embedding_bags")])
