"""What is under way while the loop goes on: TorchRec's pipeline, and a step that the device may still be at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchrec.distributed import DistributedModelParallel, TrainPipelineBase, TrainPipelineSparseDist

from distmtl.model.loss import StepNumbers
from distmtl.optim import Optimizers


def make_pipeline(model: DistributedModelParallel, optimizers: Optimizers, device: torch.device) -> Any:
    """TorchRec's pipeline: overlapping input distribution with compute on CUDA, plain on CPU, where nothing is left to hide."""
    kind = TrainPipelineSparseDist if device.type == "cuda" else TrainPipelineBase
    return kind(model, optimizers, device)


@contextmanager
def alone(pipeline: Any) -> Iterator[None]:
    """The model without its pipeline: else scores would come from batches in flight."""
    ahead = pipeline if isinstance(pipeline, TrainPipelineSparseDist) else None
    if ahead:
        ahead.detach()
    yield
    if ahead:
        ahead.attach(sparse_dist=False)  # left to itself it would send the ids in flight again, and forget how many sequences hold


class Queued:
    """A step that the device may still be at, and whether it was trained, on its way to the host."""

    def __init__(self, numbers: StepNumbers):
        self.numbers, self.flag = numbers, numbers.trained.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if numbers.trained.is_cuda else None
        if self.copied:
            self.copied.record()

    def trained(self) -> bool:
        if self.copied:
            self.copied.synchronize()
        return bool(self.flag)
