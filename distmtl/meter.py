"""Meter: what a stretch of training came to, in losses, rows and seconds."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch

from distmtl.batch import Batch
from distmtl.model.loss import StepNumbers


class Meter:
    """Losses, rows and seconds since the last log line, and the steady speed of the attempt."""

    def __init__(self, terms: int, device: torch.device):
        self.sums = torch.zeros(2, terms, dtype=torch.float64, device=device)
        self.all, self.steady, self.intervals = [0, 0.0], [0, 0.0], 0  # rows, seconds
        self.replaced_ids = self.contradictions = 0
        self.last = time.monotonic()
        self.rows, self.seconds, self.waited = 0, 0.0, 0.0

    def end_interval(self) -> None:
        """A log line was written: what follows belongs to the next one."""
        self.intervals += 1
        for total in (self.all, self.steady)[: self.intervals]:  # the first interval holds what only happens once
            total[0] += self.rows
            total[1] += self.seconds
        self.sums.zero_()
        self.rows, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, numbers: StepNumbers) -> None:
        sums = torch.stack([numbers.losses * numbers.weights, numbers.weights])
        self.sums += torch.where(numbers.trained, sums, 0.0)

    def tick(self) -> float:
        """Seconds since the last tick, pauses left out."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        self.seconds += passed
        return passed

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.last += time.monotonic() - began

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """The same batches, with the time spent waiting for them."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self.replaced_ids += batch.replaced_ids
            self.contradictions += batch.contradictions
            yield batch

    def mean_losses(self) -> list[float]:
        return (self.sums[0] / self.sums[1].clamp(min=1e-30)).tolist()

    def samples_per_second(self) -> float:
        return self.rows / max(self.seconds, 1e-9)

    def data_wait(self) -> float:
        return round(self.waited / max(self.seconds, 1e-9), 4)

    def steady_samples_per_second(self) -> float | None:
        rows, seconds = self.steady if self.steady[1] else self.all
        return round(rows / seconds, 1) if seconds else None
