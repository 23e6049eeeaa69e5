"""Ranks on this machine: forked processes joined by gloo, for checks and tests. Real runs are launched by Ray or torchrun."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, local_world_size: int | None = None, timeout_s: float = 120
) -> list[Any]:
    """function(*args) on every rank of a new process group; the results in rank order. A rank's exception is raised here.

    The caller must not have used torch with several threads before: a fork does not take a thread pool along.
    """
    import torchrec  # noqa: F401  # imported once, before the forks

    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _rank(function, args, rank, world_size, local_world_size or world_size, Path(folder))
            pids.append(pid)
        _wait(pids, timeout_s)
        results: list[Any] = [
            pickle.loads((Path(folder) / str(rank)).read_bytes()) if (Path(folder) / str(rank)).exists() else None
            for rank in range(world_size)
        ]
    for rank, result in enumerate(results):
        if result is None:
            raise RuntimeError(f"rank {rank} of {world_size} died or hung")
    for rank, result in sorted(enumerate(results), key=lambda r: "Connection closed by peer" in str(r[1][0])):  # causes before consequences
        if isinstance(result[0], BaseException):
            raise result[0] from RuntimeError(f"on rank {rank}:\n{result[1]}")
    return [result[1] for result in results]


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, local: int, folder: Path) -> None:
    gc.freeze()  # what the parent left behind is not to be destroyed here, where the threads that its process groups wait for do not exist
    result: tuple[Any, Any] = (RuntimeError("no result"), "")
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % local), LOCAL_WORLD_SIZE=str(local))
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        result = (None, function(*args))
        dist.barrier()  # nobody leaves while another still listens
    except BaseException as e:
        result = (e, traceback.format_exc())
    try:
        blob = pickle.dumps(result)
    except Exception:
        blob = pickle.dumps((RuntimeError(str(result[0])), result[1]))
    (folder / f"{rank}.partial").write_bytes(blob)
    (folder / f"{rank}.partial").rename(folder / str(rank))
    os._exit(0)


def _wait(pids: list[int], timeout_s: float) -> None:
    end, left = time.monotonic() + timeout_s, set(pids)
    while left and time.monotonic() < end:
        for pid in list(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.discard(pid)
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
