"""Heads with statistics of the batch on real ranks: W workers = 1 worker, resumed = uninterrupted, unseen domains."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from worlds import records, run_world, saved_state, train_world

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate
from distmtl.model.normalisation import PartitionedNorm

SGD = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}}
HEADS = {
    "star": {"kind": "star", "domain": "domain", "bottom": [16, 8], "auxiliary": [4]},
    "home": {"kind": "home", "groups": [["click", "rating"], ["conversion"]], "experts": 2, "expert": [8], "feature_rank": 4},
}


def config(data, run, model, optimizer=None, **train):
    raw = tiny.raw(data, run, model=HEADS[model], optimizer=optimizer or {}, train={"global_batch_size": 128, "log_every": 1, **train})
    raw["features"].append({"kind": "id", "name": "domain", "rows": 4, "dim": 4})
    return parse_config(raw)


def gradients(z, domain, real, weights):
    """Of a norm's parameters and inputs, with this rank's rows; the loss is a sum over all rows."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = slice(0, len(z)) if ranks == 1 else (slice(0, 7), slice(7, len(z)))[rank]
    norm = PartitionedNorm(z.shape[1], 3).double()
    x = z[mine].clone().requires_grad_()
    (norm(x, domain[mine], real[mine]) * weights[mine]).square().sum().backward()
    for p in norm.parameters():
        torch.distributed.all_reduce(p.grad)
    return x.grad, [p.grad for p in norm.parameters()], dict(norm.state_dict())


def test_the_gradient_of_a_rank_is_that_of_its_rows_in_the_global_batch():
    """Domain 0 has rows on both ranks, 1 on the first alone, 2 on the second alone; the second has padding too."""
    domain = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 2, 2, 0, 2, 0, 0])
    z, real = 1 + torch.randn(14, 5, dtype=torch.float64), torch.arange(14) < 12
    weights = torch.randn(14, 5, dtype=torch.float64)
    ((of_rows, of_parameters, state),) = run_world(gradients, 1, z, domain, real, weights)
    ranks = run_world(gradients, 2, z, domain, real, weights)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), of_rows)
    assert of_rows[:12].abs().min() > 0 and (of_rows[12:] == 0).all()
    for _, parameters, buffers in ranks:
        torch.testing.assert_close(parameters, of_parameters)
        torch.testing.assert_close(buffers, state)
        assert all(torch.equal(v, ranks[0][2][k]) for k, v in buffers.items())


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_w_workers_equal_one(tiny_data, tmp_path, model, world_size):
    """Losses, weights and running statistics; the last step of an epoch is padded."""
    one, many = (config(tiny_data, tmp_path / str(w), model, SGD, steps=27, epochs=2, eval_every=27) for w in (1, world_size))
    results = [train_world(one, 1), train_world(many, world_size)]
    losses = [torch.tensor([list(r["losses"].values()) for r in records(c, "train")]) for c in (one, many)]
    assert len(losses[0]) == 27 and (losses[0] - losses[1]).abs().max() <= 1e-5
    states = saved_state(one, 27), saved_state(many, 27)
    assert difference(*states) <= 2e-5
    seen = [v.tolist() for k, v in states[1].items() if k.endswith(".seen")]
    every = tiny.ROWS["train"] + 3 * 128
    assert all(sum(s) == every for s in seen) and len(seen) == (1 if model == "star" else 2)
    a, b = (r["metrics"]["validation"]["click"] for r in results)
    assert a["rows"] == b["rows"] and a["auc"] == pytest.approx(b["auc"], abs=1e-4)
    assert a["logloss"] == pytest.approx(b["logloss"], abs=1e-5)


@pytest.mark.parametrize("model", HEADS)
def test_resumed_equals_uninterrupted_bit_for_bit(tiny_data, tmp_path, model):
    whole = config(tiny_data, tmp_path / "whole", model, steps=12, eval_every=4, save_every=4)
    first, second = (config(tiny_data, tmp_path / "parts", model, steps=s, eval_every=4, save_every=4) for s in (8, 12))
    expected = train_world(whole, 2)
    train_world(first, 2)
    assert train_world(second, 2)["metrics"] == expected["metrics"]
    assert difference(saved_state(whole, 12), saved_state(second, 12)) == 0.0


def buffers_of_ranks(config):
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        training.model.train()
        batches = training.reader.batches(0, 3)
        for _ in range(3):
            training.pipeline.progress(batches)
        return [v.clone() for m in training.train_model.modules() if isinstance(m, PartitionedNorm) for v in m.buffers()]


@pytest.mark.parametrize("model", HEADS)
def test_running_statistics_are_equal_on_all_ranks(tiny_data, tmp_path, model):
    first, second = run_world(buffers_of_ranks, 2, config(tiny_data, tmp_path, model))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and first[0].sum() == 3 * 128


def raised(path, data):
    try:
        evaluate(path, data)
    except DistmtlError as e:
        return str(e)


def test_a_domain_never_trained_on_is_named_on_all_ranks(tiny_data, tmp_path):
    """Table and network have room for domain 3, but no row of it was trained on; only one rank meets it."""
    train_world(config(tiny_data, tmp_path / "run", "star", steps=4, eval_every=4), 2)
    table = tiny.table(300)
    domain = table["domain"].to_numpy().copy()
    domain[17] = 3
    pq.write_table(table.set_column(table.schema.get_field_index("domain"), "domain", pa.array(domain)), tmp_path / "new.parquet")
    for said in run_world(raised, 2, str(tmp_path / "run"), str(tmp_path / "new.parquet")):
        assert said.startswith("domain 3 of ") and "new.parquet, row 17 was never seen in training" in said
        assert "\n" not in said
