"""A head that writes down which rows it is trained on, and does harm on demand. Loaded by workers as `kind: plugin`."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from distmtl.model.layout import Features
from distmtl.model.mmoe import MMoE

ROW = {"kind": "numeric", "name": "row", "mean": -1.0}  # becomes row + 1, and 0 in padding; must be the last feature
HOG, RAISE = "hog", "raise"  # files in the log's folder that ask for 300 MB, or for an exception


class Recorder(torch.nn.Module):
    """MMoE over everything but the last column, which is the row's number; one line per trained step and process in `log`/PID."""

    def __init__(self, width: int, num_tasks: int, log: str):
        super().__init__()
        self.mmoe = MMoE(width - 1, num_tasks, 3, (16, 8), 0.0)
        self.output_width = self.mmoe.output_width
        self.log = Path(log)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.training:
            rows = x[:, -1].long() - 1
            with (self.log / str(os.getpid())).open("a") as file:
                file.write(json.dumps(rows[rows >= 0].tolist()) + "\n")
            if self._asked_for(HOG):
                self.hog = bytearray(os.urandom(1 << 20) * 300)
            if self._asked_for(RAISE):
                raise RuntimeError("raised on demand")
        return self.mmoe(Features((x[:, :-1],)))

    def _asked_for(self, what: str) -> bool:
        file = self.log / f"{what}-{os.getpid()}"
        if not file.exists():
            return False
        file.unlink()
        return True


def recorded(raw: dict[str, Any], log: Path) -> dict[str, Any]:
    """tiny's config with this head, its records in `log`."""
    log.mkdir(exist_ok=True)
    model = {"kind": "plugin", "target": "recording:Recorder", "args": {"log": str(log)}}
    return {**raw, "features": [*raw["features"], ROW], "model": model}


def course(run: Path, log: Path) -> dict[int, list[int]]:
    """Step → the rows it trained, in the course that the run ended with: what a failure undid was not trained."""
    steps: dict[int, list[int]] = {}
    for start in (r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "start"):
        steps = {step: rows for step, rows in steps.items() if step < start["step"]}
        made = defaultdict(list)
        for pid in (w.rsplit(" ", 1)[1] for w in start["workers"]):
            lines = (log / pid).read_text().splitlines() if (log / pid).exists() else []
            for k, line in enumerate(lines):
                made[start["step"] + k] += json.loads(line)
        steps |= made
    return steps


def assert_every_row_once(steps: dict[int, list[int]], rows: int, steps_per_epoch: int, total_steps: int) -> None:
    """No gap and no duplicate in any epoch; a last, unfinished one has no duplicate."""
    assert sorted(steps) == list(range(total_steps))
    for first in range(0, total_steps, steps_per_epoch):
        seen = sorted(row for step in range(first, min(first + steps_per_epoch, total_steps)) for row in steps[step])
        if first + steps_per_epoch <= total_steps:
            assert seen == list(range(rows)), f"epoch {first // steps_per_epoch}"
        assert len(seen) == len(set(seen)), f"epoch {first // steps_per_epoch}"
