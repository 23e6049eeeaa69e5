"""Checkpoints written in the background: training waits while tables are copied into memory of their own, not while they are written.

Copying 1 GB into memory that was used before takes about a tenth of a second; the first touch of fresh memory ten times that, so
the buffers are made ready in the background too, as soon as training starts.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from distmtl import checkpoint
from distmtl.distributed.process import Process, on_first_rank
from distmtl.optim import Optimizers

WRITE_LIMIT = timedelta(hours=6)  # for the slowest rank; a dead one is noticed at once


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed."""

    step: int
    path: str
    stall: float  # seconds that training waited
    seconds: float  # from the request to the manifest
    mb: float


class Saver:
    """Saves a run's state; all ranks make one and call it at the same steps. One checkpoint at a time is on its way.

    Args:
        background: False writes from the tables themselves, with no second copy in host memory, while training waits.
        keep: newest checkpoints kept.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: Optimizers, process: Process, *, attempt: int, background: bool, keep: int
    ):
        self.folder, self.model, self.optimizers, self.process = folder, model, optimizers, process
        self.attempt, self.background, self.keep = attempt, background, keep
        self.group = dist.new_group(backend="gloo", timeout=WRITE_LIMIT)  # the loop's own collectives go on meanwhile
        self.copies: dict[str, ShardedTensor] = {}
        self.job: Future[Any] = _start(self._make_copies) if background else _done()

    def save(self, manifest: dict[str, Any], best_step: int | None) -> None:
        """Begin a checkpoint of step manifest["step"], when the one before is complete.

        Raises:
            DistmtlError: the one before could not be written; on all ranks.
        """
        began = time.monotonic()
        self.wait()
        state = checkpoint.table_state(self.model, self.optimizers)
        if self.background:
            state = {name: self._copy(name, value) for name, value in state.items()}
            if self.process.device.type == "cuda":
                torch.cuda.synchronize(self.process.device)
        state["dense"] = checkpoint.dense_state(self.optimizers)
        stall = time.monotonic() - began
        self.job = _start(self._write, state, {**manifest, "attempt": self.attempt}, best_step, began, stall)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is on its way.

        Raises:
            DistmtlError: it could not be written; on all ranks.
        """
        self.job.result()

    def completed(self) -> Saved | None:
        """The checkpoint completed since this was last asked, on rank 0."""
        if not self.job.done() or self.job.exception() or not isinstance(self.job.result(), Saved):
            return None
        saved, self.job = self.job.result(), _done()
        return saved

    def _make_copies(self) -> None:
        for name, value in checkpoint.table_state(self.model, self.optimizers).items():
            pinned = self.process.device.type == "cuda"
            empty = [Shard(torch.empty(s.tensor.shape, dtype=s.tensor.dtype, pin_memory=pinned), s.metadata) for s in value.local_shards()]
            for shard in empty:
                shard.tensor.zero_()  # touched now, not while training waits
            self.copies[name] = checkpoint.like(value, empty)

    def _copy(self, name: str, value: ShardedTensor) -> ShardedTensor:
        for to, shard in zip(self.copies[name].local_shards(), value.local_shards(), strict=True):
            to.tensor.copy_(shard.tensor, non_blocking=True)
        return self.copies[name]

    def _write(self, state: dict[str, Any], manifest: dict[str, Any], best_step: int | None, began: float, stall: float) -> Saved:
        path = self.folder / checkpoint.name_of(manifest["step"], self.attempt)
        on_first_rank(self.process, lambda: checkpoint.prepare(path), self.group)
        checkpoint.write(path, state, self.group)

        def finish() -> int:
            size = checkpoint.commit(path, manifest)
            checkpoint.retain(self.folder, self.keep, best_step, path)
            return size

        size = on_first_rank(self.process, finish, self.group)
        return Saved(manifest["step"], str(path), round(stall, 4), round(time.monotonic() - began, 3), round(size / 2**20, 3))


def _start(function: Any, *arguments: Any) -> Future[Any]:
    """In a thread that a dying process does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)

    Thread(target=run, daemon=True, name="distmtl-saver").start()
    return future


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future
