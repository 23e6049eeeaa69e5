"""Checkpoints written in the background: training waits while tables are copied into memory of their own, not while they are written.

Copying 1 GB into memory that was used before takes about a tenth of a second; the first touch of fresh memory ten times that, so
the buffers are made ready in the background too, as soon as training starts.
"""

from __future__ import annotations

import time
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from distmtl import checkpoint
from distmtl.distributed.process import Process, on_any_rank, on_first_rank
from distmtl.errors import DistmtlError
from distmtl.optim import Optimizers

WRITE_LIMIT = timedelta(hours=6)  # for the slowest rank; a dead one is noticed at once, a hanging one by training or by `wait`
LOOK_EVERY_S = 1.0  # how often waiting ranks tell each other that they are there


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
        background: False keeps no copy of the tables, and training waits; DCP copies what it writes then, for as long as it writes.
        keep: newest checkpoints kept.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: Optimizers, process: Process, *, attempt: int, background: bool, keep: int
    ):
        self.folder, self.model, self.optimizers, self.process = folder, model, optimizers, process
        self.attempt, self.background, self.keep = attempt, background, keep
        self.group = dist.new_group(backend="gloo", timeout=WRITE_LIMIT)  # the loop's own collectives go on meanwhile
        self.copies: dict[str, ShardedTensor] = {}
        self.unsaid: list[Saved] = []  # completed, on rank 0, and not asked for yet
        self.job: Future[Any] = self._start(self._make_copies) if background else _done()

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
        state["dense"] = checkpoint.dense_state(self.model, self.optimizers)
        stall = time.monotonic() - began
        self.job = self._start(self._write, state, {**manifest, "attempt": self.attempt}, best_step, began, stall)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is on its way, on any rank. All ranks call it.

        Raises:
            DistmtlError: it could not be written; on all ranks.
            RuntimeError: a rank died, hangs, or failed alone.
        """
        while True:
            futures.wait([self.job], LOOK_EVERY_S)
            alone = self.job.done() and self.job.exception() is not None and not isinstance(self.job.exception(), DistmtlError)
            busy, broken = on_any_rank(self.process, not self.job.done(), alone)
            if broken and not alone:
                raise RuntimeError("another rank could not write its part of the checkpoint")
            if broken or not busy:
                break
        self.job.result()
        self._take()

    def close(self) -> None:
        """Give the group of its own back; nothing may be on its way. A process may train one run after another."""
        dist.destroy_process_group(self.group)

    def completed(self) -> Saved | None:
        """A checkpoint completed since this was last asked, on rank 0; the oldest of several."""
        self._take()
        return self.unsaid.pop(0) if self.unsaid else None

    @property
    def failed(self) -> bool:
        """Whether what was begun is known to have failed: `wait` will say how."""
        return self.job.done() and self.job.exception() is not None

    def _take(self) -> None:
        if self.job.done() and not self.failed and self.job.result() is not None:
            if self.process.first:
                self.unsaid.append(self.job.result())
            self.job = _done()

    def _make_copies(self) -> None:
        pinned = self.process.device.type == "cuda"
        for name, value in checkpoint.table_state(self.model, self.optimizers).items():
            empty = {}
            for shard in value.local_shards():
                copy = torch.empty(shard.tensor.shape, dtype=shard.tensor.dtype, pin_memory=pinned)
                empty[tuple(shard.metadata.shard_offsets)] = copy.zero_()  # touched now, not while training waits
            self.copies[name] = checkpoint.like(value, empty)

    def _copy(self, name: str, value: ShardedTensor) -> ShardedTensor:
        copies = {tuple(s.metadata.shard_offsets): s.tensor for s in self.copies[name].local_shards()}
        for shard in value.local_shards():
            copies[tuple(shard.metadata.shard_offsets)].copy_(shard.tensor, non_blocking=True)
        return self.copies[name]

    def _write(self, state: dict[str, Any], manifest: dict[str, Any], best_step: int | None, began: float, stall: float) -> Saved:
        path = self.folder / checkpoint.name_of(manifest["step"], self.attempt)

        def finish() -> int:
            size = checkpoint.commit(path, manifest, sums)
            with suppress(OSError):  # what cannot be deleted now will be after the next one
                checkpoint.retain(self.folder, self.keep, best_step, path)
            return size

        try:
            on_first_rank(self.process, lambda: checkpoint.prepare(path), self.group)
            sums = checkpoint.write(path, state, self.group)
            size = on_first_rank(self.process, finish, self.group)
        except DistmtlError:  # on all ranks: nobody is still writing
            if self.process.first:
                checkpoint.discard(path)
            raise
        return Saved(manifest["step"], str(path), round(stall, 4), round(time.monotonic() - began, 3), round(size / 2**20, 3))

    def _start(self, function: Any, *arguments: Any) -> Future[Any]:
        """In a thread that a dying process does not wait for."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                if self.process.device.type == "cuda":
                    torch.cuda.set_device(self.process.device)  # a thread begins on device 0: its memory, its streams
                future.set_result(function(*arguments))
            except BaseException as e:
                future.set_exception(e)

        Thread(target=run, daemon=True, name="distmtl-saver").start()
        return future


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future
