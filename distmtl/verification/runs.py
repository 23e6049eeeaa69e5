"""Training as it is, seen by a rank: a few steps, or the state that a run would go on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmtl import checkpoint
from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.distributed.sharding import local_shards
from distmtl.loop import Training
from distmtl.progress import Progress
from distmtl.storage import place

STEPS = 6
State = dict[str, Tensor]


@dataclass(frozen=True)
class ShortRun:
    """What a rank saw in STEPS steps."""

    losses: Tensor  # (STEPS, K)
    weighting: Tensor  # (STEPS, T) λ
    batches: list[Batch]
    before: State  # all parameters, whole, before the first step
    after: State
    gradients: Tensor  # flat dense gradient of the last step
    sharding: dict[str, str]  # table → sharding type


def short_run(config: Config, steps: int = STEPS) -> ShortRun:
    """The first steps on this rank, nothing written."""
    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        before = gathered(training.model.state_dict())
        batches = list(training.reader.batches(0, steps))
        training.model.train()
        source = iter(batches)
        numbers = [training.pipeline.progress(source) for _ in range(len(batches))]
        losses, weights = (torch.stack([getattr(n, name) for n in numbers]) for name in ("losses", "weighting"))
        after, sharding = gathered(training.model.state_dict()), {t.table: t.kind for t in training.planned}
        return ShortRun(losses, weights, batches, before, after, training.optimizers.gradients.clone(), sharding)


def loaded_state(config: Config) -> State:
    """What a run that continues from the newest checkpoint begins with: weights and optimizer state, whole."""
    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        found, _ = checkpoint.newest(place(config.run_dir) / "checkpoints")
        assert found is not None
        checkpoint.load(found, training.model, training.optimizers)
        fused = training.optimizers.fused.state_dict()["state"]
        state = gathered(training.model.state_dict()) | gathered({f"{n}/{k}": v for n, values in fused.items() for k, v in values.items()})
        return state | {f"{n}/{k}": v for n, values in training.optimizers.dense_state().items() for k, v in values.items()}


def gathered(state: dict[str, Any]) -> State:
    """A state dict with its sharded tensors put together from all ranks."""
    mine = [(name, tuple(value.size()), None, None) for name, value in state.items() if hasattr(value, "local_shards")]
    shards = [(name, None, tensor.clone(), offsets) for name, tensor, offsets in local_shards(state)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [*mine, *shards])
    whole = {n: v.detach().clone() for n, v in state.items() if not hasattr(v, "local_shards")}
    for rank in everyone:
        whole |= {name: torch.zeros(size) for name, size, tensor, _ in rank if tensor is None and name not in whole}
    for name, _, tensor, offsets in (s for rank in everyone for s in rank if s[2] is not None):
        whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=False))] = tensor
    return whole
