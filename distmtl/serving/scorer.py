"""One thread that scores. Requests that come while it is at work wait, and are then scored together: a batch is as large as the load."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from distmtl.errors import DistmtlError
from distmtl.serving.predictor import Predictor, Scored


@dataclass
class Waiting:
    """Rows for a predictor."""

    predictor: Predictor
    table: pa.Table
    done: Future[tuple[Scored, str]] = field(default_factory=Future)


@dataclass
class Action:
    """Something to be done while nothing is scored."""

    run: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Scorer:
    """
    Args:
        max_rows: candidates that are scored together, unless a single request has more.
        wait_s: how long a batch waits for more requests once it has one.
    """

    def __init__(self, max_rows: int = 2048, wait_s: float = 0.0):
        self.max_rows, self.wait_s = max_rows, wait_s
        self.queue: queue.SimpleQueue[Waiting | Action] = queue.SimpleQueue()
        self.waiting = 0  # requests that have no answer yet
        self.end = Action(lambda: None)
        self.thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        self.thread.start()

    async def score(self, predictor: Predictor, table: pa.Table) -> tuple[Scored, str]:
        """What it predicts, and the digest of the export that did.

        Raises:
            DistmtlError: a value that the model does not take.
        """
        job = Waiting(predictor, table)
        self.waiting += 1
        try:
            self.queue.put(job)
            return await asyncio.wrap_future(job.done)
        finally:
            self.waiting -= 1

    def between(self, run: Callable[[], Any]) -> Any:
        """Do it while nothing is scored, and wait for it. From any thread but the scorer's."""
        action = Action(run)
        self.queue.put(action)
        return action.done.result()

    def stop(self) -> None:
        """After all that waits."""
        self.queue.put(self.end)
        self.thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)
        then: Action | None = None
        while then is not self.end:
            jobs, then = self._next()
            of: dict[int, list[Waiting]] = {}
            for job in jobs:
                if job.done.set_running_or_notify_cancel():  # else nobody waits for it any more
                    of.setdefault(id(job.predictor), []).append(job)
            for alike in of.values():
                _score(alike)
            if then is not None:
                _answer(then.done, then.run)

    def _next(self) -> tuple[list[Waiting], Action | None]:
        """Jobs to be done together, at least one or an action, and the action that came after them."""
        jobs: list[Waiting] = []
        rows, until = 0, 0.0
        while rows < self.max_rows:
            try:
                wait = until - time.monotonic() if jobs else None
                item = self.queue.get_nowait() if wait is not None and wait <= 0 else self.queue.get(timeout=wait)
            except queue.Empty:
                break
            if isinstance(item, Action):
                return jobs, item
            until = until or time.monotonic() + self.wait_s
            jobs.append(item)
            rows += item.table.num_rows
        return jobs, None


def _score(jobs: list[Waiting]) -> None:
    """Of one predictor, together; where that is refused, one by one: only the guilty are told."""
    predictor = jobs[0].predictor
    if len(jobs) > 1:
        try:
            whole = predictor.score(pa.concat_tables([j.table for j in jobs]))
        except DistmtlError:
            pass  # nobody is told yet: each is scored alone below, and the guilty gets its own sentence
        except Exception as e:
            traceback.print_exc()
            for job in jobs:
                job.done.set_exception(e)
            return
        else:
            last = 0
            for job in jobs:
                first, last = last, last + job.table.num_rows
                job.done.set_result((_rows(whole, slice(first, last)), predictor.manifest.digest))
            return
    for job in jobs:
        _answer(job.done, lambda job=job: (predictor.score(job.table), predictor.manifest.digest))  # type: ignore[misc]


def _answer(done: Future[Any], run: Callable[[], Any]) -> None:
    try:
        done.set_result(run())
    except Exception as e:
        if not isinstance(e, DistmtlError):
            traceback.print_exc()
        done.set_exception(e)


def _rows(of: Scored, rows: slice) -> Scored:
    return Scored({task: p[rows] for task, p in of.predictions.items()}, of.ids[rows], of.replaced[rows])
