"""The judge of a run: measures its model while it trains, calibrates and measures the best of it at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distmtl import checkpoint
from distmtl.calibration import Calibration
from distmtl.config import Config
from distmtl.data.dataset import Dataset
from distmtl.distributed.process import Process, on_first_rank
from distmtl.evaluation import calibrate, evaluate_split
from distmtl.model.multitask import MultiTaskModel
from distmtl.pipeline import alone
from distmtl.run_directory import CALIBRATION, write_json

Metrics = dict[str, dict[str, Any]]  # task → metric → value


class Judge:
    """All ranks make one and ask it the same.

    Args:
        folder: the run directory.
        pipeline: what trains the model; it stands aside meanwhile.
    """

    def __init__(self, config: Config, folder: Path, splits: dict[str, Dataset], process: Process, model: MultiTaskModel, pipeline: Any):
        self.config, self.folder, self.splits, self.process = config, folder, splits, process
        self.model, self.pipeline = model, pipeline

    def measure(self, split: str, calibrations: Mapping[str, Calibration] | None = None) -> tuple[float, Metrics]:
        """Loss and metrics of a split.

        Raises:
            DistmtlError: a row or a score that cannot be measured; on all ranks.
        """
        with alone(self.pipeline):
            return evaluate_split(self.model, self.splits[split], self.config, self.process, calibrations)

    @property
    def calibrations(self) -> dict[str, Any]:
        """What the config asks for, as result.json has it."""
        return {task: c.model_dump(mode="json") for task, c in self.config.calibrations.items()}

    def calibrate(self, step: int) -> tuple[dict[str, Calibration], list[str]]:
        """Fit what the config asks for to the model as it is, that of the checkpoint of a step, and keep it beside the checkpoints;
        and what is to be said of it."""
        if not self.calibrations:
            if self.process.first:
                (self.folder / CALIBRATION).unlink(missing_ok=True)  # of a config that asked for one
            return {}, []
        with alone(self.pipeline):
            fitted, notes = calibrate(self.model, self.splits["validation"], self.config, self.process)

        def keep() -> None:
            name = checkpoint.of_step(self.folder / "checkpoints", step).path.name
            tasks = {task: calibration.to_dict() for task, calibration in fitted.items()}
            write_json(self.folder / CALIBRATION, {"checkpoint": name, "step": step, "tasks": tasks})

        on_first_rank(self.process, keep)
        return fitted, notes
