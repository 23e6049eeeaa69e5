"""The process group this process belongs to, its rank and its device."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distmtl.config import Config
from distmtl.distributed.matmul import fastest_fp32
from distmtl.errors import DistmtlError

R = TypeVar("R")


@dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


@contextmanager
def process_group(config: Config) -> Iterator[Process]:
    """Join the group that the launcher made (Ray), or that torchrun's environment describes, or one of a single process.

    Raises:
        DistmtlError: more processes than data.num_streams, or a device that is not there.
    """
    quieten()
    own = not dist.is_initialized()
    device = choose_device(config)
    if device.type == "cpu":
        fastest_fp32()
    else:
        torch.cuda.set_device(device)  # where NCCL's collectives of objects go
    if own:
        if under_torchrun():
            dist.init_process_group(backend_of(device), timeout=timedelta(seconds=config.cluster.collective_timeout_s))
        else:
            dist.init_process_group(backend_of(device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        world_size = dist.get_world_size()
        if world_size > config.data.num_streams:
            raise DistmtlError(
                f"{world_size} workers, but data.num_streams is {config.data.num_streams}: a worker owns at least one stream; "
                "raise num_streams"
            )
        yield Process(dist.get_rank(), world_size, device)
        if own:
            dist.barrier()  # nobody leaves while another still listens
    finally:
        if own:
            dist.destroy_process_group()


def quieten() -> None:
    """Silence what TorchRec and FBGEMM say at every start; bounds checks and kernel errors stay audible."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("torchrec", "torch.fx", "torch.fx._symbolic_trace", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # Arrow's, which the reader only reads
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch(rec)?(\.|$)|fbgemm_gpu|tensordict")


def choose_device(config: Config) -> torch.device:
    wanted = config.cluster.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise DistmtlError("cluster.device is cuda, but this process sees no CUDA device; set it to auto or cpu, or see `distmtl doctor`")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def on_first_rank(process: Process, function: Callable[[], R], group: dist.ProcessGroup | None = None) -> R:
    """Run on rank 0, give every rank (of the group) the result, or raise rank 0's DistmtlError everywhere."""
    box: list[Any] = [None, None]
    if process.first:
        try:
            box[0] = function()
        except DistmtlError as e:
            box[1] = str(e)
    if process.world_size > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise DistmtlError(box[1])
    return box[0]


def gather_texts(process: Process, text: str | None) -> list[str]:
    """The distinct texts of all ranks, in rank order."""
    boxes: list[Any] = [None] * process.world_size
    dist.all_gather_object(boxes, text)
    return list(dict.fromkeys(t for t in boxes if t))


def on_any_rank(process: Process, *flags: bool) -> list[bool]:
    """Which of the flags some rank has set; over the loop's own group, whose time limit is that of a step."""
    if process.world_size == 1:
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.float32, device=process.device)
    dist.all_reduce(numbers)
    return [n > 0 for n in numbers.tolist()]


def gather_arrays(process: Process, mine: R) -> list[R]:
    """What every rank has, in rank order, on rank 0; nothing on the others."""
    if process.world_size == 1:
        return [mine]
    boxes: list[Any] | None = [None] * process.world_size if process.first else None
    dist.gather_object(mine, boxes)
    return boxes or []
