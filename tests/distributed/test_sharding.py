"""Invariant 1: sharded equals unsharded, for every sharding type and table optimizer that a plan may choose on CPU."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.distributed as dist
from worlds import run_world

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.errors import DistmtlError
from distmtl.loop import Training
from distmtl.progress import Progress
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import State, short_run

CASES = [
    ("table_wise", "sgd", 2), ("row_wise", "sgd", 2), ("column_wise", "sgd", 2), ("row_wise", "adagrad", 2),
    ("column_wise", "adagrad", 2),
    ("table_wise", "rowwise_adagrad", 2), ("row_wise", "rowwise_adagrad", 3), ("table_row_wise", "rowwise_adagrad", 4),
    ("grid_shard", "sgd", 4),
    ("mixed", "sgd", 3), ("mixed", "adagrad", 2),
]  # fmt: skip
MIXED = {"user": "row_wise", "item": "table_wise", "tags": "column_wise", "city": "row_wise", "x_bucket": "table_wise"}


def config_for(data, run, sharding: str, optimizer: str) -> Config:
    dim = 64 if sharding == "grid_shard" else 16
    raw = tiny.raw(data, run, optimizer={"tables": {"kind": optimizer, "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}})
    for feature in raw["features"]:
        if feature["kind"] in ("id", "bucket"):
            feature["dim"] = dim
    raw["features"].append(
        {"kind": "id", "name": "item_again", "column": "item", "table": "item", "rows": 50, "dim": dim, "pooling": "mean"}
    )
    raw["tables"] = {table: {"sharding": [MIXED[table] if sharding == "mixed" else sharding]} for table in MIXED}
    return parse_config(raw)


@pytest.mark.parametrize(("sharding", "optimizer", "world_size"), CASES)
def test_sharded_equals_unsharded(tiny_data, tmp_path, sharding, optimizer, world_size):
    config = config_for(tiny_data, tmp_path / "run", sharding, optimizer)
    ranks = run_world(short_run, world_size, config, local_world_size=2 if sharding in ("table_row_wise", "grid_shard") else None)
    run = ranks[0]
    assert run.sharding == (MIXED if sharding == "mixed" else dict.fromkeys(MIXED, sharding))
    assert all(torch.equal(run.gradients, r.gradients) for r in ranks), "dense gradients differ between ranks"
    losses, _, expected = unsharded_run(config, ranks)
    difference = (run.losses - losses).abs().max()
    assert difference <= 1e-5, f"losses differ by {difference:.1e}"
    if optimizer == "sgd":  # adaptive optimizers amplify rounding in the weights, not in the losses
        for name, weight in expected.items():
            assert (run.after[name] - weight).abs().max() <= 1e-5, name
    still = [n for n in run.after if torch.equal(run.after[n], run.before[n])]
    assert still == [], "some parameter never moved"


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_vectors_that_travel_in_bf16_differ_by_their_rounding(tiny_data, tmp_path, sharding):
    exact = config_for(tiny_data, tmp_path / "run", sharding, "sgd")
    rounded = exact.model_copy(update={"sharding": exact.sharding.model_copy(update={"exchange": "bf16"})})
    a, b = (run_world(short_run, 2, config)[0] for config in (exact, rounded))
    assert 0 < (a.losses - b.losses).abs().max() < 1e-3
    for name, weight in a.after.items():
        assert (weight - b.after[name]).abs().max() < 1e-2 * weight.abs().max(), name


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
def test_a_bf16_head_reads_the_same_vectors_however_they_travel(tiny_data, tmp_path, sharding):
    config = config_for(tiny_data, tmp_path / "run", sharding, "sgd")
    sums = [f.model_copy(update={"pooling": "sum"}) if hasattr(f, "pooling") else f for f in config.features]  # a mean is rounded once more
    config = config.model_copy(update={"features": tuple(sums), "train": config.train.model_copy(update={"precision": "bf16"})})
    exchanges = [config.sharding.model_copy(update={"exchange": exchange}) for exchange in ("fp32", None)]
    runs = [run_world(short_run, 2, config.model_copy(update={"sharding": sharding}))[0] for sharding in exchanges]
    assert torch.equal(runs[0].losses, runs[1].losses)
    for name, weight in runs[0].after.items():
        assert torch.equal(weight, runs[1].after[name]), name


def order_of_backward(config: Config) -> list[str]:
    """What a step sends, and when the weights that read the vectors get their gradient."""
    log: list[str] = []
    send = dist.all_to_all_single

    def noted(output, input, *args, **kwargs):  # as torch calls it
        if input.is_floating_point():
            log.append(f"sent in {input.dtype}")
        return send(output, input, *args, **kwargs)

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        training.train_model.model.head.sharing.experts.weights[0].register_post_accumulate_grad_hook(lambda _: log.append("weight"))
        batches = list(training.reader.batches(0, 1))
        dist.all_to_all_single = noted
        training.model.train()
        training.pipeline.progress(iter(batches))
    return log


@pytest.mark.parametrize(
    ("precision", "exchange", "sent"), [("fp32", None, "float32"), ("bf16", None, "bfloat16"), ("bf16", "fp32", "float32")]
)
def test_vectors_gradients_travel_while_weight_gradients_are_found(tiny_data, tmp_path, precision, exchange, sent):
    config = config_for(tiny_data, tmp_path, "table_wise", "sgd")
    train, sharding = (config.train.model_copy(update={"precision": precision}), config.sharding.model_copy(update={"exchange": exchange}))
    vectors = gradients = f"sent in torch.{sent}"
    config = config.model_copy(update={"train": train, "sharding": sharding})
    assert run_world(order_of_backward, 2, config)[0] == [vectors, gradients, "weight"]


def initial(config: Config) -> State:
    return short_run(config, steps=1).before


def test_initial_weights_do_not_depend_on_the_layout(tiny_data, tmp_path, monkeypatch):
    import distmtl.distributed.sharding as sharding

    monkeypatch.setattr(sharding, "INIT_ROWS", 64)  # several blocks in a table of 200 rows
    one = run_world(initial, 1, config_for(tiny_data, tmp_path, "table_wise", "sgd"))[0]
    for layout, ranks in (("row_wise", 3), ("column_wise", 2), ("mixed", 2)):
        other = run_world(initial, ranks, config_for(tiny_data, tmp_path, layout, "sgd"))[0]
        assert all(torch.equal(one[n], other[n]) for n in one), layout
    table = one["model.embeddings.embedding_bags.user.weight"]
    assert table.abs().max() <= 0.05 and abs(table.std() - 0.05 / 3**0.5) < 0.002
    assert len({tuple(r) for r in table.tolist()}) == 200


def test_adam_tables_are_refused_on_cpu(tiny_data, tmp_path):
    config = tiny.config(tiny_data, tmp_path, optimizer={"tables": {"kind": "adam"}})
    with pytest.raises(DistmtlError, match="adam has no kernel on cpu; use rowwise_adagrad"):
        run_world(initial, 1, config)
