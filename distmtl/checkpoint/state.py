"""What a checkpoint holds of a model and its optimizers, by name."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

WEIGHTING = "loss.weighting."  # begins the names of what balances the tasks: no weights of the model, but state of its training


def table_state(model: nn.Module, optimizers: Any | None = None) -> dict[str, Any]:
    """Name → sharded tensor: the tables' weights, and their optimizer's state; views, not copies."""
    state = {f"tables/{name}": value for name, value in model.state_dict().items() if hasattr(value, "local_shards")}
    fused = optimizers.fused.state_dict()["state"] if optimizers else {}
    return state | {f"tables_optimizer/{name}/{key}": value for name, values in fused.items() for key, value in values.items()}


def dense_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds beside the tables: dense parameters, buffers such as running means, and the state of what
    balances the tasks; equal on all ranks."""
    return {name: value for name, value in model.state_dict().items() if not hasattr(value, "local_shards")}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of `dense_tensors`, what the model computes with."""
    return {name: value for name, value in dense_tensors(model).items() if not name.startswith(WEIGHTING)}


def table_of(name: str) -> str:
    """The table that an entry of `table_state` belongs to: …embedding_bags.TABLE.weight… or …embeddings.TABLE.weight…"""
    return name.split(".weight", 1)[0].rsplit(".", 1)[-1]


def dense_state(model: nn.Module, optimizers: Any) -> io.BytesIO:
    """What is the same on every rank, as one blob."""
    blob = io.BytesIO()
    torch.save({"parameters": {n: t.detach() for n, t in dense_tensors(model).items()}, "optimizer": optimizers.dense_state()}, blob)
    return blob


def like(value: ShardedTensor, tensors: dict[tuple[int, ...], torch.Tensor], rows: int | None = None) -> ShardedTensor:
    """A sharded tensor over other local tensors, by their offsets; of the first `rows` rows only if that is given. No communication."""
    whole = deepcopy(value.metadata())
    if rows is not None:
        whole.size = torch.Size([rows, *whole.size[1:]])
        whole.shards_metadata = [m for m in whole.shards_metadata if m.shard_offsets[0] < rows]
    whole.tensor_properties.pin_memory = any(t.is_pinned() for t in tensors.values())
    device = next((t.device for t in tensors.values()), None)
    for metadata in whole.shards_metadata:
        if rows is not None:
            metadata.shard_sizes[0] = min(metadata.shard_sizes[0], rows - metadata.shard_offsets[0])
        if device is not None and metadata.placement is not None:
            metadata.placement._device = device
    shards = [Shard(tensors[at], m) for m in whole.shards_metadata if (at := tuple(m.shard_offsets)) in tensors]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, whole, process_group=value._process_group)


def first_rows(value: ShardedTensor, size: torch.Size) -> ShardedTensor:
    if value.size() == size:
        return value
    shards = {tuple(s.metadata.shard_offsets): s.tensor for s in value.local_shards()}
    return like(value, {at: tensor[: size[0] - at[0]] for at, tensor in shards.items() if at[0] < size[0]}, size[0])
