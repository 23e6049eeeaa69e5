"""Invariants of whole runs on real ranks: W workers = 1 worker, resumed = uninterrupted, evaluation changes nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from worlds import pipeline_of_cuda, records, run_world, saved_state, train_world

from distmtl.errors import DistmtlError

SGD = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}}
LAYOUT = {"user": {"sharding": ["row_wise"]}, "item": {"sharding": ["table_wise"]}}


def tiny_config(data, run, *, dropout=0.0, optimizer=None, tables=LAYOUT, **train):
    return tiny.config(
        data,
        run,
        tables=tables,
        optimizer=optimizer or {},
        model={"kind": "mmoe", "num_experts": 3, "expert": [16, 8], "dropout": dropout},
        train={"global_batch_size": 128, "log_every": 1, **train},
    )


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_w_workers_equal_one(tiny_data, tmp_path, world_size):
    """Same rows, losses and weights; 3 does not divide the 8 streams; the last step of the epoch is padded."""
    one, many = (
        tiny_config(tiny_data, tmp_path / str(w), optimizer=SGD, tables={}, steps=27, epochs=2, eval_every=27) for w in (1, world_size)
    )
    results = [train_world(one, 1), train_world(many, world_size)]
    losses = [[list(r["losses"].values()) for r in records(c, "train")] for c in (one, many)]
    assert len(losses[0]) == 27 and (torch.tensor(losses[0]) - torch.tensor(losses[1])).abs().max() <= 1e-5
    assert difference(saved_state(one, 27), saved_state(many, 27)) <= 1e-5
    a, b = (r["metrics"]["validation"]["click"] for r in results)
    assert a["rows"] == b["rows"] == tiny.ROWS["validation"]
    assert a["auc"] == pytest.approx(b["auc"], abs=1e-4) and a["logloss"] == pytest.approx(b["logloss"], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny_data, tmp_path, world_size):
    """Adaptive optimizers, dropout, across an epoch's end, position in the data included."""
    kw = {"dropout": 0.3, "eval_every": 10, "save_every": 10}
    whole = tiny_config(tiny_data, tmp_path / "whole", steps=30, epochs=2, **kw)
    first, second = (tiny_config(tiny_data, tmp_path / "parts", steps=s, epochs=2, **kw) for s in (20, 30))
    expected = train_world(whole, world_size)
    train_world(first, world_size)
    resumed = train_world(second, world_size)
    assert difference(saved_state(whole, 30), saved_state(second, 30)) == 0.0
    assert resumed["metrics"] == expected["metrics"]
    assert (resumed["restarts"], resumed["steps"], resumed["rows"]) == (1, 30, expected["rows"])
    assert [r["losses"] for r in records(whole, "train")] == [r["losses"] for r in records(second, "train")]


def test_evaluation_in_mid_run_changes_nothing(tiny_data, tmp_path):
    often = tiny_config(tiny_data, tmp_path / "often", dropout=0.3, steps=12, eval_every=2, save_every=12)
    once = tiny_config(tiny_data, tmp_path / "once", dropout=0.3, steps=12, eval_every=12, save_every=12)
    train_world(often, 2)
    train_world(once, 2)
    assert len(records(often, "evaluation")) == 6
    assert difference(saved_state(often, 12), saved_state(once, 12)) == 0.0


def test_the_pipeline_of_cuda_trains_the_same(tiny_data, tmp_path, monkeypatch):
    """TrainPipelineSparseDist reads ahead and is detached for evaluations; on CPU it must give what the plain one gives."""
    import distmtl.loop as loop

    kw = {"dropout": 0.3, "steps": 26, "epochs": 2, "eval_every": 6, "save_every": 6}
    plain, ahead = (tiny_config(tiny_data, tmp_path / n, **kw) for n in ("plain", "ahead"))
    train_world(plain, 2)
    monkeypatch.setattr(loop, "make_pipeline", pipeline_of_cuda)
    train_world(ahead, 2)
    assert [r["losses"] for r in records(plain, "train")] == [r["losses"] for r in records(ahead, "train")]
    assert [r["health"] for r in records(plain, "train")] == [r["health"] for r in records(ahead, "train")]
    assert difference(saved_state(plain, 24), saved_state(ahead, 24)) == 0.0


def test_the_schedule_reaches_tables_and_dense(tiny_data, tmp_path):
    """With a factor of 0 at the last step nothing moves in it; without, everything does."""
    raw = {
        "tables": {"kind": "sgd", "lr": 0.1},
        "dense": {"kind": "sgd", "lr": 0.1},
        "schedule": {"warmup_steps": 2, "decay": "linear", "final": 0.0},
    }
    config = tiny_config(tiny_data, tmp_path / "a", optimizer=raw, steps=6, eval_every=6, save_every=1, keep=9)
    train_world(config, 2)
    states = {s: saved_state(config, s) for s in (4, 5, 6)}
    assert all(torch.equal(states[5][k], states[6][k]) for k in states[5])
    assert not any(torch.equal(states[4][k], states[5][k]) for k in states[5] if k.startswith(("tables/", "dense/")))
    assert [round(r["lr"], 4) for r in records(config, "train")] == [0.05, 0.1, 0.1, 0.0667, 0.0333, 0.0]


def test_early_stopping_keeps_the_best_and_tests_with_it(tiny_data, tmp_path):
    raw = tiny.raw(
        tiny_data, tmp_path / "run", optimizer={"tables": {"kind": "adagrad", "lr": 0.5}, "dense": {"kind": "adam", "lr": 0.02}},
        train={"global_batch_size": 128, "epochs": 9, "eval_every": 8, "keep": 1, "monitor": "click.logloss",
               "early_stopping": {"patience": 3}},
    )  # fmt: skip
    raw["data"]["test"] = raw["data"]["validation"]
    from distmtl.config_file import parse_config

    config = parse_config(raw)
    result = train_world(config, 2)
    seen = {r["step"]: r["monitored"] for r in records(config, "evaluation") if "monitored" in r}
    best = min(seen, key=lambda s: seen[s])
    assert result["best_step"] == best == result["steps"] - 24 and result["steps"] < 9 * 24
    assert result["metrics"]["test"]["click"]["logloss"] == result["metrics"]["validation"]["click"]["logloss"] == seen[best]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{best:09d}-0", f"step-{result['steps']:09d}-0"]


def nothing_known(config):
    """Gradients and losses of a step whose second task is masked everywhere, and where half of the first one's labels are."""
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        batch = next(training.reader.batches(0, 1))
        batch.weights[:, 1] = 0
        batch.weights[::2, 0] = 0
        batch.labels[:, 1] = torch.nan  # must never reach the graph
        logits = training.train_model.model(batch)
        logits.retain_grad()
        loss, numbers = training.train_model.loss(logits, batch)
        loss.backward()
        return logits.grad, numbers.losses, batch.weights, loss.detach()


def test_masked_labels_and_padding_have_exactly_zero_gradient(tiny_data, tmp_path):
    for gradient, losses, weights, loss in run_world(nothing_known, 3, tiny.config(tiny_data, tmp_path)):
        assert torch.isfinite(loss) and losses[1] == 0
        assert (gradient[weights == 0] == 0).all() and (gradient[weights > 0] != 0).all()
        assert (weights == 0).all(1).any(), "no padding in this step: the test shows nothing"


def test_a_rank_with_few_labels_counts_as_much_as_its_labels(tiny_data, tmp_path):
    """Denominators are all-reduced: the gradient is that of the pooled rows, however unevenly known labels lie."""
    grads = run_world(nothing_known, 2, tiny.config(tiny_data, tmp_path, data={"num_streams": 2}))
    total = sum(w[:, 0].sum() for _, _, w, _ in grads)
    for gradient, _, weights, _ in grads:
        assert gradient[:, 0].abs().max() <= 2 * weights[:, 0].max() / total


def test_unfinished_and_foreign_checkpoints_are_passed_over(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "run", steps=6, eval_every=2, keep=9)
    train_world(config, 2)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000000006-0" / "manifest.json").unlink()
    shard = folder / "step-000000004-0" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    train_world(config, 2)
    start = records(config, "start")[-1]
    assert start["step"] == 2 and "step-000000002" in start["text"]
    said = " ".join(r["text"] for r in records(config, "note"))
    assert "step-000000006-0 is incomplete" in said and "step-000000004-0 is damaged: __0_0.distcp" in said
    assert (folder / "step-000000006-1" / "manifest.json").exists()


def test_more_workers_than_streams(tiny_data, tmp_path):
    config = tiny.config(tiny_data, tmp_path / "run", data={"num_streams": 2})
    with pytest.raises(DistmtlError, match="3 workers, but data.num_streams is 2"):
        train_world(config, 3)
    assert not (tmp_path / "run").exists()


def test_a_new_run_can_start_from_another_runs_weights(tiny_data, tmp_path):
    """Weights only: its own steps, optimizer state, learning rates, best. Another shape is refused by field."""
    train_world(tiny_config(tiny_data, tmp_path / "first", steps=4, eval_every=4), 2)
    nothing = {"tables": {"kind": "sgd", "lr": 1e-30}, "dense": {"kind": "sgd", "lr": 1e-30}}
    second = tiny_config(tiny_data, tmp_path / "second", optimizer=nothing, steps=2)
    train_world(second, 1, resume=str(tmp_path / "first"))
    assert records(second, "start")[0]["step"] == 0
    first, after = saved_state(tiny_config(tiny_data, tmp_path / "first"), 4), saved_state(second, 2)
    weights = [k for k in after if k.startswith(("tables/", "dense/"))]
    assert len(weights) > 10 and all(torch.equal(first[k], after[k]) for k in weights)
    with pytest.raises(DistmtlError, match="already holds a run"):
        train_world(second, 2, resume="never")
    wider = tiny.config(tiny_data, tmp_path / "third", model={"kind": "mmoe", "num_experts": 4, "expert": [16, 8]})
    with pytest.raises(DistmtlError, match="model.num_experts: 3 there, 4 now"):
        train_world(wider, 1, resume=str(tmp_path / "first"))


def test_a_checkpoint_loads_at_another_world_size_and_plan(tiny_data, tmp_path):
    """Weights and optimizer state bit-equal at the moment of loading; 2 workers row-wise to 3 table-wise and back to 1."""
    adagrad = {"tables": {"kind": "adagrad", "lr": 0.1}}
    kw = {"eval_every": 4, "save_every": 4, "optimizer": adagrad}
    layouts = [("row_wise", 2, 4), ("table_wise", 3, 8), ("column_wise", 1, 12), ("row_wise", 4, 16)]
    before = None
    for sharding, world_size, steps in layouts:
        tables = {t: {"sharding": [sharding]} for t in ("user", "item", "tags")}
        config = tiny_config(tiny_data, tmp_path / "run", tables=tables, steps=steps, keep=9, **kw)
        loaded = run_world(state_after_loading, world_size, config)[0]
        if before is not None:
            assert difference(before, loaded) == 0.0
        train_world(config, world_size)
        before = saved_state(config, steps)


def state_after_loading(config):
    """What a resumed run begins with: saved again at once, under another step's name."""
    from pathlib import Path

    from distmtl import checkpoint
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress
    from distmtl.saving import Saver

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        found, _ = checkpoint.newest(Path(config.run_dir) / "checkpoints")
        if found is None:
            return None
        checkpoint.load(found, training.model, training.optimizers)
        folder = Path(config.run_dir + "-again") / "checkpoints"
        saver = Saver(folder, training.model, training.optimizers, process, attempt=0, background=False, keep=9)
        saver.save({"step": found.step}, best_step=None)
        again = config.model_copy(update={"run": config.run.model_copy(update={"dir": config.run_dir + "-again"})})
        return saved_state(again, found.step) if process.first else None


def test_profile_writes_a_trace(tiny_data, tmp_path):
    train_world(tiny_config(tiny_data, tmp_path / "run", steps=6, profile={"first_step": 2, "steps": 2}), 2)
    traces = list((tmp_path / "run" / "profile").glob("*.json*"))
    assert len(traces) == 1 and "split_embedding" in traces[0].read_text()


def clipped(config):
    """The dense gradient that a step used, and what clipping the pooled gradient by torch gives."""
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress

    out = {}
    with process_group(config) as process:
        for norm in (None, 0.01):
            changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip_norm": norm})})
            training = Training(changed, process, open_splits(changed), Progress(None, False, print))
            training.pipeline.progress(training.reader.batches(0, 1))
            out[norm] = [p.grad.clone() for p in training.optimizers.parameters.values()]
    return out


def test_clipping_is_by_the_norm_of_the_pooled_dense_gradient(tiny_data, tmp_path):
    for out in run_world(clipped, 2, tiny_config(tiny_data, tmp_path)):
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in out[None]]
        for p, g in zip(parameters, out[None], strict=True):
            p.grad = g
        assert torch.nn.utils.clip_grad_norm_(parameters, 0.01) > 0.01
        for p, g in zip(parameters, out[0.01], strict=True):
            torch.testing.assert_close(p.grad, g)


def test_a_course_that_was_given_up_does_not_live_on(tiny_data, tmp_path):
    """Damaged checkpoints newer than the one continued from go when the run saves again, not the new ones."""
    config = tiny_config(tiny_data, tmp_path / "run", steps=16, save_every=4, eval_every=100, keep=3)
    train_world(config, 1)
    folder = tmp_path / "run" / "checkpoints"
    for step in (12, 16):
        shard = folder / f"step-{step:09d}-0" / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1])
    train_world(tiny_config(tiny_data, tmp_path / "run", steps=11, save_every=1, eval_every=100, keep=2), 1)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000010-1", "step-000000011-1"]


def test_early_stopping_and_monitor_may_change(tiny_data, tmp_path):
    """A run that stopped early goes on with more patience; with another monitor, the best so far counts for nothing."""
    still = {"tables": {"kind": "sgd", "lr": 1e-30}, "dense": {"kind": "sgd", "lr": 1e-30}}
    kw = {"optimizer": still, "steps": 20, "eval_every": 2, "save_every": 2}
    stopped = tiny_config(tiny_data, tmp_path / "run", early_stopping={"patience": 2}, **kw)
    assert train_world(stopped, 1)["steps"] == 6
    patient = tiny_config(tiny_data, tmp_path / "run", early_stopping={"patience": 4}, **kw)
    assert train_world(patient, 1)["steps"] == 10
    other = tiny_config(tiny_data, tmp_path / "run", early_stopping={"patience": 4}, monitor="click.auc", **kw)
    result = train_world(other, 1)
    assert (result["best_step"], result["steps"]) == (12, 20)
    assert train_world(other, 1) == result, "a complete run gives its result again"


def test_what_was_trained_is_saved_before_a_failing_evaluation_is_raised(tiny_data, tmp_path):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = tiny.table(500)
    (tmp_path / "one_class").mkdir()
    pq.write_table(table.filter(pc.equal(table["click"], 0)), tmp_path / "one_class" / "a.parquet")
    config = tiny.config(tiny_data, tmp_path / "run", data={"validation": str(tmp_path / "one_class")}, train={"monitor": "click.auc"})
    with pytest.raises(DistmtlError, match="auc"):
        train_world(config, 2)
    assert (tmp_path / "run" / "checkpoints" / "step-000000024-0" / "manifest.json").exists()
