"""Ids that read several rows, on real ranks: sharded = unsharded, W workers = 1, at another world size, and how often they were seen."""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_matching import start
from test_training import difference, state_after_loading
from worlds import pipeline_of_cuda, records, run_world, saved_state, train_world

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.hashing import hash_strings, into_rows
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate
from distmtl.verification.gate import verify
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import short_run

HASHED = {"out_of_range": "hash", "hashes": 2}


def config_of(data, run, *, sharding="row_wise", tables="sgd", hashes=2, **train) -> Config:
    """Numbers, strings and bags are hashed; a sequence reads the table of its target."""
    raw = tiny.raw(data, run, optimizer={"tables": {"kind": tables, "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}})
    user, item, tags, city, *_ = raw["features"]
    for feature, rows in ((user, 31), (item, 20), (tags, 7), (city, 10)):
        feature |= HASHED | {"rows": rows, "hashes": hashes}
    item["table"] = "things"
    history = {"name": "history", "column": "tags", "table": "things", "rows": 20, "dim": 8, "max_length": 3, "hashes": hashes}
    raw["features"].append({"kind": "sequence", **history, "out_of_range": "hash", "pooling": "target", "target": "item"})
    raw["tables"] = {t: {"sharding": [sharding]} for t in ("user", "tags", "city", "things")}
    raw["train"] |= {"log_every": 1, **train}
    return parse_config(raw)


@pytest.mark.parametrize(
    ("sharding", "tables", "workers"),
    [("row_wise", "sgd", 2), ("table_wise", "sgd", 2), ("column_wise", "sgd", 2), ("row_wise", "rowwise_adagrad", 3)],
)
def test_sharded_equals_unsharded(tiny_data, tmp_path, sharding, tables, workers):
    config = config_of(tiny_data, tmp_path / "run", sharding=sharding, tables=tables)
    ranks = run_world(short_run, workers, config)
    assert {ranks[0].sharding[t] for t in ("user", "tags", "city", "things")} == {sharding}
    losses, _, after = unsharded_run(config, ranks)
    assert (losses - ranks[0].losses).abs().max() <= 1e-5
    if tables == "sgd":
        assert difference(after, ranks[0].after) <= 1e-5
    assert all(not torch.equal(ranks[0].before[k], after[k]) for k in after if ".weight" in k and ("user" in k or "things" in k))


def test_two_workers_equal_one_and_go_on_at_another_number(tiny_data, tmp_path):
    one, two = (config_of(tiny_data, tmp_path / str(w), steps=27, epochs=2, eval_every=27) for w in (1, 2))
    results = [train_world(one, 1), train_world(two, 2)]
    losses = [[list(r["losses"].values()) for r in records(c, "train")] for c in (one, two)]
    assert len(losses[0]) == 27 and (torch.tensor(losses[0]) - torch.tensor(losses[1])).abs().max() <= 1e-5
    assert difference(saved_state(one, 27), saved_state(two, 27)) <= 1e-5
    a, b = (r["metrics"]["validation"]["click"]["logloss"] for r in results)
    assert a == pytest.approx(b, abs=1e-5)
    loaded = [run_world(state_after_loading, w, two)[0] for w in (2, 1)]
    assert difference(*loaded) == 0.0


def test_the_gate_of_parity_passes(tiny_data, tmp_path):
    checks = verify(config_of(tiny_data, tmp_path / "run"), 2, say=lambda text: None)
    assert len(checks) > 6 and all(c.passed for c in checks)


def test_the_pipeline_of_cuda_trains_the_same(tiny_data, tmp_path, monkeypatch):
    """It traces the sums of a sequence's rows."""
    import distmtl.loop as loop

    plain, ahead = (config_of(tiny_data, tmp_path / n, steps=6) for n in ("plain", "ahead"))
    train_world(plain, 2)
    monkeypatch.setattr(loop, "make_pipeline", pipeline_of_cuda)
    train_world(ahead, 2)
    assert [r["losses"] for r in records(plain, "train")] == [r["losses"] for r in records(ahead, "train")]


def test_other_hashes_are_other_rows(tiny_data, tmp_path):
    train_world(config_of(tiny_data, tmp_path / "run", steps=2, save_every=2), 1)
    changed = config_of(tiny_data, tmp_path / "run", hashes=3, steps=4, save_every=2)
    with pytest.raises(DistmtlError, match="features.user.hashes: 2 there, 3 now"):
        train_world(changed, 1)
    run_world(start, 1, changed, "matching")
    notes = [r["text"] for r in records(changed, "note")]
    assert "table user starts anew: it is read by 'user', whose ids read 3 rows each now" in notes


def test_an_id_was_seen_as_often_as_its_rarest_row(tiny_data, tmp_path):
    config = config_of(tiny_data, tmp_path / "run", steps=4)
    train_world(config, 2)
    got = run_world(evaluate, 2, config.run_dir, None, None, ("user:20,60", "city:5"))[0]["validation"]["click"]["slices"]
    train, rows = pq.read_table(tiny_data / "train"), pq.read_table(tiny_data / "validation")
    for feature, size, edges in (("user", 31, (20, 60)), ("city", 10, (5,))):
        strings = feature == "city"
        ids = [hash_strings(t[feature].combine_chunks()) if strings else t[feature].to_numpy() for t in (train, rows)]
        reads = [into_rows(i, size, 2).tolist() for i in ids]
        seen = Counter(row for pair in reads[0] for row in pair)
        slices = Counter(sum(min(seen[row] for row in pair) >= edge for edge in edges) for pair in reads[1])
        names = ("0-19", "20-59", "60+") if feature == "user" else ("0-4", "5+")
        assert {name: of["rows"] for name, of in got[feature].items()} == {names[i]: n for i, n in slices.items()}
    with pytest.raises(DistmtlError, match="slices city=: its ids read 2 rows each, and no row is one value's; write city for how often"):
        evaluate(config.run_dir, slices=["city="])
