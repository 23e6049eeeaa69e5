"""One task of every kind in one run: two workers do what one does, and every task has the metrics that are promised."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from every_task import TASKS, table
from worlds import records, saved_state, train_world

from distmtl.config_file import parse_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """World size → config and result."""
    folder, out = tmp_path_factory.mktemp("kinds"), {}
    for split, rows in (("train", 1501), ("validation", 700)):
        (folder / split).mkdir()
        pq.write_table(table(rows, len(split)), folder / split / "a.parquet", row_group_size=310)
    for world_size in (1, 2):
        config = parse_config(
            tiny.raw(
                folder,
                folder / f"run {world_size}",
                model={"kind": "esmm"},
                tasks=[{"tower": [8], **task} for task, _ in TASKS],
                optimizer={"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}},
                train={"global_batch_size": 128, "epochs": 5, "log_every": 1},
            )
        )
        out[world_size] = config, train_world(config, world_size)
    return out


def test_two_workers_equal_one(runs):
    (a, one), (b, two) = runs.values()
    losses = [torch.tensor([list(r["losses"].values()) for r in records(c, "train")]) for c in (a, b)]
    assert losses[0].shape == (60, len(TASKS)) and torch.isfinite(losses[0]).all() and (losses[0] - losses[1]).abs().max() <= 1e-4
    x, y = saved_state(a, 60), saved_state(b, 60)
    assert max((x[k].double() - y[k].double()).abs().max().item() for k in x) <= 1e-4
    for task, metrics in one["metrics"]["validation"].items():
        for name, value in metrics.items():
            assert two["metrics"]["validation"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)


def test_every_task_learns(runs):
    """The mean loss of the last epoch is below that of the first."""
    losses = torch.tensor([list(r["losses"].values()) for r in records(runs[1][0], "train")])
    better = losses[-12:].mean(0) < losses[:12].mean(0)
    assert better.all(), [task["name"] for (task, _), fine in zip(TASKS, better, strict=True) if not fine]


def test_every_task_has_its_metrics(runs):
    metrics = runs[1][1]["metrics"]["validation"]
    for task, names in TASKS:
        found = metrics[task["name"]]
        assert set(found) == names, task
        assert all(v is not None for v in found.values()), (task, found)
    conversion, clicks = metrics["conversion"], metrics["click"]["positives"]
    assert (
        metrics["stars"]["rows"]
        < conversion["rows"]
        == clicks
        < conversion["joint_rows"]
        == metrics["click"]["rows"]
        == tiny.ROWS["validation"]
    )
