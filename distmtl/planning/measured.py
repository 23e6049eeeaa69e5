"""measure(): a few real steps of one worker, beside what TorchRec predicts of its tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import Config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.errors import DistmtlError
from distmtl.loop import Training
from distmtl.model.multitask import MultiTaskModel
from distmtl.planning.hardware import Hardware
from distmtl.planning.numbers import gib
from distmtl.planning.world import plan_world
from distmtl.progress import Progress


@dataclass(frozen=True)
class Measured:
    """Medians of one worker in this process, beside what TorchRec predicts of its tables."""

    steps: int
    rows: int
    predicted_ms: float
    tables_ms: float
    step_ms: float

    @property
    def ratio(self) -> float | None:
        return self.tables_ms / self.predicted_ms if self.predicted_ms else None


def measure(config: Config, hardware: Hardware, steps: int = 20, warm_up: int = 3) -> Measured:
    """Train a few steps with one worker on this machine's CPU, then the same batches through the tables alone.

    Raises:
        DistmtlError: no CPU plan, no data, or tables beyond this machine's memory.
    """
    if hardware.device != "cpu":
        raise DistmtlError("--measure trains on this machine's CPU and compares with a CPU plan; add --device cpu")
    one = config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": None, "test": None}),
            "train": config.train.model_copy(update={"early_stopping": None, "profile": None}),
            "cluster": config.cluster.model_copy(update={"device": "cpu"}),
        }
    )
    predicted = plan_world(one, hardware, 1)
    if not predicted.fits:
        raise DistmtlError(f"--measure needs a plan for one worker: {predicted.misfit[0]}")
    need, free = sum(t.mb for t in predicted.planned) * 2**20, psutil.virtual_memory().available
    if need > 0.7 * free:
        raise DistmtlError(
            f"--measure: the tables need {gib(need)} in one process, this machine has {gib(free)} free; give the tables fewer rows"
        )
    with process_group(one) as process:
        training = Training(one, process, open_splits(one), Progress(None, False, lambda record: None))
        last = min(steps + warm_up, training.total_steps)
        source = training.reader.batches(0, last)
        batches = list(source)
        training.model.train()
        queue = iter(batches)
        whole = _timed(lambda: training.pipeline.progress(queue), last)
        ids = iter([b.sparse for b in batches])
        alone = _timed(lambda: _tables_alone(training.train_model.model, next(ids)), last) if one.embedded else [0.0] * last
    skip = warm_up if last > 2 * warm_up else 0
    return Measured(
        last - skip, one.train.global_batch_size, predicted.step_ms, statistics.median(alone[skip:]), statistics.median(whole[skip:])
    )


def _tables_alone(model: MultiTaskModel, ids: KeyedJaggedTensor) -> None:
    """What a step does in the tables: the lookup, and the update for some gradient."""
    vectors = [tables(ids) for tables in model.sequences.values()]
    sums = [model.embeddings(ids).values().sum()] + [jagged.values().sum() for v in vectors for jagged in v.values()]
    torch.stack(sums).sum().backward()


def _timed(call: Callable[[], Any], times: int) -> list[float]:
    out = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        out.append(1000 * (time.perf_counter() - began))
    return out
