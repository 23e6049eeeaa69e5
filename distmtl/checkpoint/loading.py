"""Loading a checkpoint into the model that wrote it, on any number of workers and by any plan that can hold the same tables."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from distmtl.checkpoint.failures import causes, reason
from distmtl.checkpoint.finding import Checkpoint
from distmtl.checkpoint.state import WEIGHTING, dense_tensors, table_state, weights
from distmtl.errors import DistmtlError
from distmtl.storage import is_remote

READ_BYTES = 1 << 22


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Any) -> None:
    """Fill a built model and its optimizers; all ranks call it. Any world size and plan that can hold the same tables.

    Raises:
        DistmtlError: it cannot be read, or holds another model; on all ranks.
    """
    saved = _load(checkpoint, table_state(model, optimizers), dense_tensors(model))
    forget_cached_rows(model)
    optimizers.load_dense_state(saved["optimizer"])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill a built model that will not be trained, or whose training begins: without what other training has left."""
    _load(checkpoint, table_state(model), weights(model))
    forget_cached_rows(model)


def forget_cached_rows(model: nn.Module) -> None:
    """After tables were filled: of a table in host memory the device would go on with the rows that it holds, and write them back."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            lookup.purge()


def dense(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Name → what `dense_tensors` held, without a model to fill."""
    parameters: dict[str, torch.Tensor] = read_state(checkpoint, {})["parameters"]
    return parameters


def index(checkpoint: Checkpoint) -> Metadata:
    """DCP's own: what every entry is, and where its shards lie in which file."""
    return _reader(checkpoint).read_metadata()


def verify(checkpoint: Checkpoint) -> None:
    """Read all its files once, each rank a share of them: whether the bytes are those that were written. torch would not notice.

    Raises:
        DistmtlError: they are not; on all ranks.
    """
    sums, found = checkpoint.manifest.get("crc32", {}), checkpoint.manifest["files"]
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrong = []
    for name in sorted(sums, key=lambda n: found.get(n, 0))[rank::ranks]:
        try:
            if (now := _crc32(checkpoint.path / name)) != sums[name]:
                wrong.append(f"{name} has CRC-32 {now:08x} instead of {sums[name]:08x}")
        except Exception as e:
            wrong.append(f"{name} cannot be read: {reason(e)}")
    everyone = [wrong]
    if ranks > 1:
        everyone = [[] for _ in range(ranks)]
        dist.all_gather_object(everyone, wrong)
    if all_wrong := [text for texts in everyone for text in texts]:
        raise DistmtlError(f"checkpoint {checkpoint.path} is damaged: {'; '.join(all_wrong[:4])}")


def _load(checkpoint: Checkpoint, sharded: dict[str, Any], dense: dict[str, torch.Tensor]) -> dict[str, Any]:
    verify(checkpoint)
    saved = read_state(checkpoint, sharded)
    then = {n for n in saved["parameters"] if n in dense or not n.startswith(WEIGHTING)}
    if differing := sorted(then ^ dense.keys()):
        raise DistmtlError(f"checkpoint {checkpoint.path}: its dense parameters are not this model's, such as {differing[0]}")
    with torch.no_grad():
        for name, parameter in dense.items():
            parameter.copy_(saved["parameters"][name])
    return saved


def read_state(checkpoint: Checkpoint, sharded: dict[str, Any]) -> dict[str, Any]:
    """Fill shards in place; returns what every rank has alike: dense parameters and their optimizer's state."""
    state = {**sharded, "dense": io.BytesIO()}
    try:
        dcp.load(state, storage_reader=_reader(checkpoint))
    except CheckpointException as e:
        raise DistmtlError(f"checkpoint {checkpoint.path} cannot be loaded: {causes(e)}") from e
    state["dense"].seek(0)
    return torch.load(state["dense"], map_location="cpu", weights_only=True)


def _reader(checkpoint: Checkpoint) -> FileSystemReader:
    return FsspecReader(str(checkpoint.path), use_listings_cache=False) if is_remote(checkpoint.path) else FileSystemReader(checkpoint.path)


def _crc32(path: Path) -> int:
    number, buffer = 0, memoryview(bytearray(READ_BYTES))
    with path.open("rb") as file:
        while n := file.readinto(buffer):
            number = zlib.crc32(buffer[:n], number)
    return number
