"""score_on_ray(): a job's parts on Ray actors, of which each has the whole export in memory."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from distmtl.cluster.places import nodes, worker_resources
from distmtl.cluster.supervision import last_line
from distmtl.cluster.trainer import session
from distmtl.config import ClusterConfig, Workers
from distmtl.errors import DistmtlError
from distmtl.serving.batch import Job, Outcome, Part, PartScorer, Say

ATTEMPTS = 3  # of a part whose worker dies


def score_on_ray(job: Job, parts: Sequence[Part], workers: int, say: Say = print) -> Generator[tuple[Part, Outcome], None, None]:
    """Parts as they are written, by up to `workers` of the cluster that RAY_ADDRESS or `ray start` offers, else of a local one.

    Raises:
        DistmtlError: what a worker says, no place for one, or a part whose worker dies again and again.
    """
    if not parts:
        return
    cluster = ClusterConfig(workers=Workers(min=1, max=workers), device="cpu")
    with session(cluster):
        worker = worker_resources(cluster, use_gpu=False)
        room = sum(node.total for node in nodes(worker))
        if not room:
            raise DistmtlError(f"no node of the Ray cluster has {worker['CPU']} CPU for a worker; add a node")
        yield from _score(job, parts, min(workers, room, len(parts)), say)


def _score(job: Job, parts: Sequence[Part], slots: int, say: Say) -> Generator[tuple[Part, Outcome], None, None]:
    waiting = deque((part, 1) for part in parts)
    actor, shared = ray.remote(num_cpus=1)(Worker), ray.put(job)
    at_work: dict[Any, Any] = {}  # reference → actor, and its part and attempt: None while it starts
    left = len(parts)

    def hire() -> None:
        handle = actor.remote(shared)
        at_work[handle.ready.remote()] = handle, None

    for _ in range(slots):
        hire()
    while left:
        (reference,), _ = ray.wait(list(at_work))
        handle, task = at_work.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayActorError as e:  # killed, or its node is gone: its part goes to whoever is free first, another worker takes its place
            if task is None and not at_work:
                raise DistmtlError(f"a worker cannot be started: {last_line(e)}") from e
            if task:
                part, attempt = task
                if attempt == ATTEMPTS:
                    raise DistmtlError(
                        f"{part.name}: {ATTEMPTS} workers died while they scored it; is there memory enough for each?"
                    ) from e
                say(f"the worker of {part.name} died; another one scores it")
                waiting.appendleft((part, attempt + 1))
                hire()
            continue
        except RayError as e:
            raise DistmtlError(f"a worker failed: {last_line(e)}") from e
        if "error" in outcome:
            raise DistmtlError(outcome["error"])
        if task:
            left -= 1
        else:
            say(f"worker on {outcome['place']}")
        if waiting:
            part, attempt = waiting.popleft()
            at_work[handle.score.remote(part)] = handle, (part, attempt)
        if task:
            yield task[0], outcome["outcome"]


class Worker:
    """An actor. What a retry cannot mend is returned, not raised: then no other one tries."""

    def __init__(self, job: Job):
        self.job = job

    def ready(self) -> dict[str, Any]:
        import torch

        from distmtl.distributed.process import quieten

        quieten()
        torch.set_num_threads(1)
        try:
            self.scorer = PartScorer(self.job)
        except DistmtlError as e:
            return {"error": str(e)}
        return {"place": f"{platform.node()} {os.getpid()}"}

    def score(self, part: Part) -> dict[str, Any]:
        try:
            return {"outcome": self.scorer(part)}
        except DistmtlError as e:
            return {"error": str(e)}
