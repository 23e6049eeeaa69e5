"""Whole runs on real ranks, and what they left behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed import TrainPipelineSparseDist

from distmtl import checkpoint
from distmtl.config import Config
from distmtl.distributed.ranks import run_ranks as run_world


def train_world(config: Config, world_size: int, resume: str = "auto", timeout_s: float = 120) -> dict[str, Any]:
    """train() on every rank; rank 0's result."""
    return run_world(_train, world_size, config, resume, timeout_s=timeout_s)[0]


def _train(config: Config, resume: str) -> dict[str, Any]:
    from distmtl.loop import train

    return train(config, resume, report=lambda record: None)


def pipeline_of_cuda(model: Any, optimizers: Any, device: torch.device) -> TrainPipelineSparseDist:
    """In place of loop.make_pipeline, on CPU."""
    return TrainPipelineSparseDist(model, optimizers, device, execute_all_batches=True)


def records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def saved_state(config: Config, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole, by name."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint.of_step(Path(config.run_dir) / "checkpoints", step).path, file.name)
        state = torch.load(file.name, weights_only=False)
    state["dense"].seek(0)
    dense = torch.load(state.pop("dense"), weights_only=True)
    out = {**state, **{f"dense/{k}": v for k, v in dense["parameters"].items()}}
    out |= {f"optimizer/{name}/{k}": v for name, values in dense["optimizer"].items() for k, v in values.items()}
    return out
