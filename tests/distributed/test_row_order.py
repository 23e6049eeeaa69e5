"""The rows that the loop really trains, over changing numbers of workers: none twice, none left out, in the order of one worker."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import tiny
from worlds import train_world

from distmtl.model.multitask import TrainModel

EPOCH = 24  # steps; the last one is not full
STEPS = 2 * EPOCH + 5


def config(data, run, steps):
    return tiny.config(data, run, train={"global_batch_size": 128, "steps": steps, "epochs": 3, "save_every": 4, "eval_every": 10})


def trained(log: Path) -> dict[int, list[int]]:
    """Step → rows, over all ranks and attempts."""
    steps = defaultdict(list)
    for line in log.read_text().splitlines():
        step, rows = json.loads(line)
        steps[step] += rows
    return steps


def test_rows_over_2_then_3_then_1_workers(tiny_data, tmp_path, monkeypatch):
    """Stopped inside an epoch each time; 3 workers do not divide the 8 streams; two epochs and a bit, shuffled."""
    forward, log = TrainModel.forward, tmp_path / "log"

    def recording(self, batch):
        with log.open("a") as file:  # every line in one write: ranks append to the same file
            file.write(json.dumps([batch.step, batch.rows[batch.rows >= 0].tolist()]) + "\n")
        return forward(self, batch)

    monkeypatch.setattr(TrainModel, "forward", recording)
    train_world(config(tiny_data, tmp_path / "one", STEPS), 1)
    one = trained(log)
    log.unlink()
    for workers, steps in ((2, 17), (3, EPOCH + 9), (1, STEPS)):
        result = train_world(config(tiny_data, tmp_path / "many", steps), workers)
        assert (result["steps"], result["world_size"]) == (steps, workers)
    many = trained(log)

    assert sorted(one) == sorted(many) == list(range(STEPS))
    assert [s for s in one if sorted(one[s]) != sorted(many[s])] == []
    for epoch in range(2):
        rows = [r for s in range(epoch * EPOCH, (epoch + 1) * EPOCH) for r in many[s]]
        assert sorted(rows) == list(range(tiny.ROWS["train"])), f"epoch {epoch}"
    assert sorted(many[0]) != sorted(many[EPOCH]), "the second epoch has the first one's order: nothing was shuffled"
