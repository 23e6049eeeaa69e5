"""Attempts, one after another, until the run is done: as many workers as there are places, again after every failure.

Ray Train runs one attempt. It is not left to restart workers itself: it would do so at a fixed number only, or (elastic) wait for
places on nodes that are gone and resize by killing workers without a checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from distmtl import checkpoint
from distmtl.cluster.places import Node
from distmtl.cluster.timeouts import LAST_SAVE_S, LOOK_EVERY_S, RELEASE_S, SAY_EVERY_S, retry_wait_s
from distmtl.config import ClusterConfig
from distmtl.errors import DistmtlError
from distmtl.progress import Report
from distmtl.stopping import Request, ask, asked, forget

R = TypeVar("R")
Outcome = dict[str, Any]
BROKEN = ("connection closed by peer", "connection reset by peer", "application timeout caused pair closure")  # what others see of a death


class Supervisor:
    """Runs `attempt(number of workers)` until one of them is the last.

    Args:
        folder: the run's directory: its checkpoints tell whether a failed attempt got ahead, its request files move the run.
        attempt: blocks; returns {"result": …} or {"error": …}, or raises what Ray Train raises.
        places: the nodes that answer, now.
    """

    def __init__(
        self, cluster: ClusterConfig, folder: Path, attempt: Callable[[int], Outcome], places: Callable[[], list[Node]], report: Report
    ):
        self.cluster, self.folder, self.attempt, self.places, self.report = cluster, folder, attempt, places, report
        self.failures, self.step = 0, -1  # failures since the newest checkpoint was of another step
        self.warned: set[str] = set()  # nodes whose leaving was seen
        self.save_at: list[float] = []  # when to save once more, before a node leaves

    def run(self) -> Outcome:
        """The last attempt's outcome.

        Raises:
            DistmtlError: more than max_failures without a new checkpoint, or no places for workers for too long.
        """
        workers = self.wait_for_places(settle=False)
        while True:
            forget(self.folder, Request.MOVE, Request.SAVE)
            try:
                outcome = self.watch(start(self.attempt, workers), workers)
            except (TrainingFailedError, RayActorError) as e:
                self.count_failure(e)
            else:
                moved = outcome.get("result", {}).get("stopped") and self.moving and asked(self.folder) is None
                if not moved:
                    return outcome
            workers = self.wait_for_places(settle=True)

    # ------------------------------------------------------------------------------------------------ between attempts

    def count_failure(self, e: Exception) -> None:
        """Say it, wait a little if it is not the first in a row, or give up.

        Raises:
            DistmtlError: too many in a row.
        """
        newest, _ = checkpoint.newest(self.folder / "checkpoints")
        step = newest.step if newest else 0
        self.failures, self.step = (self.failures + 1 if step == self.step else 1), step
        if self.failures > self.cluster.max_failures:
            raise DistmtlError(
                f"training failed, and cluster.max_failures={self.cluster.max_failures} allows no further restart: {words(e)}\n"
                + (f"the newest checkpoint stays in {self.folder}; the same command continues from it. " if newest else "")
                + "Workers' logs: the newest session_*/logs/train under Ray's temporary folder; --debug shows the traceback"
            ) from e
        wait = retry_wait_s(self.failures - 1)
        self.say(
            f"{words(e)}; restarting from {f'step {step}' if newest else 'the beginning'} in {wait:g} s "
            f"(failure {self.failures} of at most {self.cluster.max_failures} without a new checkpoint)"
        )
        time.sleep(wait)

    def wait_for_places(self, settle: bool) -> int:
        """How many workers to start: as many as fit, once at least workers.min do.

        Args:
            settle: wait a moment for the places that the last attempt gives back.

        Raises:
            DistmtlError: a request to stop, or place_timeout_s has passed.
        """
        began, said = time.monotonic(), 0.0
        least, most = self.cluster.workers.min, self.cluster.workers.max
        while True:
            staying = [n for n in self.places() if not n.leaving]
            free, hoped = sum(n.free for n in staying), min(most, sum(n.total for n in staying))
            waited = time.monotonic() - began
            if free >= max(least, hoped) or free >= least and (waited > RELEASE_S or not settle):
                return min(free, most)
            if asked(self.folder) == Request.STOP:
                raise DistmtlError("asked to stop while waiting for places for workers; the same command continues the run")
            if waited > self.cluster.place_timeout_s:
                raise DistmtlError(
                    f"the cluster had places for {free} worker(s), not {least}, for cluster.place_timeout_s={self.cluster.place_timeout_s} "
                    "seconds; add nodes, or lower cluster.workers: the same command continues the run"
                )
            if waited - said > SAY_EVERY_S:
                said = waited
                self.say(f"waiting for places for {least} worker(s): the cluster has {free} free")
            time.sleep(0.2)

    # ---------------------------------------------------------------------------------------------- while workers run

    def watch(self, future: Future[Outcome], workers: int) -> Outcome:
        """The attempt's outcome. Meanwhile: move away from nodes that leave, and to those that come."""
        self.moving = False
        self.grow_at = time.monotonic() + self.cluster.resize_every_s
        while True:
            try:
                return future.result(timeout=LOOK_EVERY_S)
            except TimeoutError:
                if future.done():
                    raise
            if not self.moving:
                self.look(workers)

    def look(self, workers: int) -> None:
        """Ask the loop to save or to move, where nodes leave or come."""
        there = self.places()
        leaving = [n for n in there if n.leaving and n.free < n.total and n.name not in self.warned]
        elsewhere = sum(n.free for n in there if not n.leaving)
        if leaving:
            self.warned |= {n.name for n in leaving}
            who, lost = ", ".join(n.name for n in leaving), sum(n.total - n.free for n in leaving)
            if workers - lost + elsewhere >= self.cluster.workers.min:
                self.move(f"node {who} is leaving; the run moves to the others")
            else:
                deadlines = [n.leaves_at for n in leaving if n.leaves_at]
                self.save_at = [time.time(), *(d - LAST_SAVE_S for d in deadlines)]
                self.say(f"node {who} is leaving, and there is no room elsewhere: saving, and training on until it goes")
        elif workers < self.cluster.workers.max and time.monotonic() > self.grow_at:
            self.grow_at = time.monotonic() + self.cluster.resize_every_s
            if elsewhere:
                self.move(f"there is room for {min(workers + elsewhere, self.cluster.workers.max)} workers instead of {workers}")
        if any(at <= time.time() for at in self.save_at):
            self.save_at = [at for at in self.save_at if at > time.time()]
            ask(self.folder, Request.SAVE)

    def move(self, why: str) -> None:
        self.moving = True
        self.say(why)
        ask(self.folder, Request.MOVE)

    def say(self, text: str) -> None:
        self.report({"kind": "note", "text": text})


def start(function: Callable[..., R], *arguments: Any) -> Future[R]:
    """In a thread: on the main thread Ray Train answers Ctrl-C by aborting without a checkpoint, and a wait inside Ray holds back
    our own handlers."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def words(e: Exception) -> str:
    """What failed, without tracebacks; of several workers' errors the causes, not the broken connections that followed."""
    if isinstance(e, RayActorError):
        return "Ray's controller died"
    if isinstance(e, ControllerError):
        return f"Ray's controller failed: {last_line(e)}"
    failures = sorted(getattr(e, "worker_failures", {}).items())
    said = {rank: _death(error) or last_line(error) for rank, error in failures if str(error).strip()}
    causes = {rank: text for rank, text in said.items() if not any(word in text.lower() for word in BROKEN)} or said
    return "; ".join(f"rank {rank}: {text}" for rank, text in list(causes.items())[:4]) or last_line(e)


def _death(error: Exception) -> str | None:
    """Ray tells a death in a paragraph."""
    if not isinstance(error, RayActorError):
        return None
    return "its node died" if "node" in str(error).lower() and "worker process has died" not in str(error) else "its process was killed"


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
