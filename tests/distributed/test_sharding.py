"""Invariant 1: sharded equals unsharded, for every sharding type and table optimizer that a plan may choose on CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from worlds import run_world

from distmtl.config import Config
from distmtl.errors import DistmtlError

STEPS = 5
CASES = [
    ("table_wise", "sgd", 2), ("row_wise", "sgd", 2), ("column_wise", "sgd", 2), ("row_wise", "adagrad", 2),
    ("column_wise", "adagrad", 2),
    ("table_wise", "rowwise_adagrad", 2), ("row_wise", "rowwise_adagrad", 3), ("table_row_wise", "rowwise_adagrad", 4), ("grid_shard", "sgd", 4),
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
    from distmtl.config import parse_config

    return parse_config(raw)


def sharded_run(config: Config) -> dict[str, Any]:
    """Losses of every step, the batches, and all weights before and after, whole."""
    import torch.distributed as dist

    from distmtl.distributed.process import process_group
    from distmtl.loop import Training, open_splits
    from distmtl.progress import Progress

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        before = whole_weights(training)
        source = training.reader.batches(0, STEPS)
        batches = list(source)
        pipeline = iter(batches)
        training.model.train()
        losses = [training.pipeline.progress(pipeline).losses.tolist() for _ in range(STEPS)]
        gradients = [None] * process.world_size
        dist.all_gather_object(gradients, training.optimizers.gradients.tolist())
        assert all(g == gradients[0] for g in gradients), "dense gradients differ between ranks"
        kinds = {t.table: t.kind for t in training.planned}
        return {"losses": losses, "batches": batches, "before": before, "after": whole_weights(training), "kinds": kinds}


def whole_weights(training: Any) -> dict[str, torch.Tensor]:
    """Every parameter, gathered from all ranks."""
    import torch.distributed as dist

    from distmtl.distributed.sharding import local_shards

    state = training.model.state_dict()
    whole = {n: v.detach().clone() for n, v in state.items() if not hasattr(v, "local_shards")}
    whole |= {n: torch.zeros(v.size()) for n, v in state.items() if hasattr(v, "local_shards")}
    mine = [(n, t.clone(), o) for n, t, o in local_shards(state)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, tensor, (row, column) in itertools.chain(*everyone):
        whole[name][row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
    return whole


def unsharded_run(config: Config, ranks: list[dict[str, Any]]) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same steps in one process with plain tensors: F.embedding_bag, optimizers written out, no TorchRec."""
    from distmtl.model.embeddings import FeatureVector
    from distmtl.model.multitask import Head

    weights = {n: v.clone() for n, v in ranks[0]["before"].items()}
    tables = {f.table_name: weights[f"model.embeddings.embedding_bags.{f.table_name}.weight"].requires_grad_() for f in config.embedded}
    head = Head(config, FeatureVector(config).width)
    head.load_state_dict({n.removeprefix("model.head."): v for n, v in weights.items() if n.startswith("model.head.")})
    dense_sgd = torch.optim.SGD(head.parameters(), lr=config.optimizer.dense.lr)
    kind, lr, eps = config.optimizer.tables.kind, config.optimizer.tables.lr, 1e-8
    momentum = {t: torch.zeros(w.shape[0], 1 if kind == "rowwise_adagrad" else w.shape[1]) for t, w in tables.items()}
    losses = []
    for step in range(STEPS):
        sums, totals = 0.0, 0.0
        for rank in ranks:
            batch = rank["batches"][step]
            parts = []
            for feature in config.embedded:
                jagged = batch.sparse[feature.name]
                bags = F.embedding_bag(jagged.values(), tables[feature.table_name], jagged.offsets()[:-1], mode=feature.pooling)
                parts.append(bags)
            logits = head(torch.cat([*parts, batch.dense], dim=1))
            errors = [
                F.binary_cross_entropy_with_logits(logits[:, t], batch.labels[:, t], reduction="none") if task.kind == "binary"
                else 0.5 * (logits[:, t] - batch.labels[:, t]).square()
                for t, task in enumerate(config.tasks)
            ]  # fmt: skip
            sums = sums + (torch.stack(errors, 1) * batch.weights).sum(0)
            totals = totals + batch.weights.sum(0)
        means = sums / totals
        losses.append(means.tolist())
        loss = sum(task.weight * mean for task, mean in zip(config.tasks, means, strict=True))
        dense_sgd.zero_grad()
        for table in tables.values():
            table.grad = None
        loss.backward()
        dense_sgd.step()
        with torch.no_grad():
            for name, table in tables.items():
                g = table.grad
                if kind == "sgd":
                    table -= lr * g
                    continue
                momentum[name] += g.square() if kind == "adagrad" else g.square().mean(1, keepdim=True)
                table -= lr * g / (momentum[name].sqrt() + eps)
    after = {n: w.detach() for n, w in weights.items()} | {f"model.head.{n}": v for n, v in head.state_dict().items()}
    return losses, after


@pytest.mark.parametrize(("sharding", "optimizer", "world_size"), CASES)
def test_sharded_equals_unsharded(tiny_data, tmp_path, sharding, optimizer, world_size):
    config = config_for(tiny_data, tmp_path / "run", sharding, optimizer)
    ranks = run_world(sharded_run, world_size, config, local_world_size=2 if sharding in ("table_row_wise", "grid_shard") else None)
    assert ranks[0]["kinds"] == (MIXED if sharding == "mixed" else dict.fromkeys(MIXED, sharding))
    losses, after = unsharded_run(config, ranks)
    difference = (torch.tensor(ranks[0]["losses"]) - torch.tensor(losses)).abs().max()
    assert difference <= 1e-5, f"losses differ by {difference:.1e}"
    if optimizer == "sgd":  # adaptive optimizers amplify rounding in the weights, not in the losses
        for name, weight in after.items():
            assert (ranks[0]["after"][name] - weight).abs().max() <= 1e-5, name
    moved = [n for n in after if not torch.equal(after[n], ranks[0]["before"][n])]
    assert set(moved) == set(after), "some parameter never moved"


def initial(config: Config) -> dict[str, torch.Tensor]:
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training, open_splits
    from distmtl.progress import Progress

    with process_group(config) as process:
        return whole_weights(Training(config, process, open_splits(config), Progress(None, False, print)))


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
