"""Checkpoints: every rank writes its own shards (torch DCP), then rank 0 the manifest. No manifest, no checkpoint.

<run>/checkpoints/step-000001000/
    __0_0.distcp …   shards        .metadata   DCP's own index
    manifest.json    written last and in one move: what, where, and the size of every file
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from distmtl.errors import DistmtlError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def save(folder: Path, model: nn.Module, optimizers: Any, manifest: dict[str, Any]) -> None:
    """Write a checkpoint of step manifest["step"]; all ranks call it. `manifest` may hold anything JSON can."""
    path = folder / f"step-{manifest['step']:09d}"
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(path, ignore_errors=True)  # a half-written one of an earlier attempt
        path.mkdir(parents=True)
    _barrier()
    state = {**_tables(model), **_tables_optimizer(optimizers), "dense": _dense(optimizers)}
    try:
        dcp.save(state, storage_writer=FileSystemWriter(path, single_file_per_rank=True, sync_files=False))
    except CheckpointException as e:  # every rank hears of it
        causes = {str(failure[0]) for failure in e.failures.values()}
        raise DistmtlError(f"checkpoint {path} could not be written: {'; '.join(sorted(causes))}") from e
    _barrier()
    if first:
        manifest = {"format": FORMAT, **manifest, "files": {f.name: f.stat().st_size for f in sorted(path.iterdir())}}
        partial = path / (MANIFEST + ".partial")
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(path / MANIFEST)
    _barrier()


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Any) -> None:
    """Fill a built model and its optimizers; all ranks call it. Any world size and plan that can hold the same tables."""
    saved = _load(checkpoint, {**_tables(model), **_tables_optimizer(optimizers)}, optimizers.parameters)
    optimizers.load_dense_state(saved["optimizer"])


def load_weights(checkpoint: Checkpoint, model: nn.Module, dense: dict[str, nn.Parameter]) -> None:
    """Fill a built model that will not be trained."""
    _load(checkpoint, _tables(model), dense)


def _load(checkpoint: Checkpoint, sharded: dict[str, Any], dense: dict[str, nn.Parameter]) -> dict[str, Any]:
    state = {**sharded, "dense": io.BytesIO()}
    dcp.load(state, storage_reader=FileSystemReader(checkpoint.path))  # shards are filled in place
    state["dense"].seek(0)
    saved = torch.load(state["dense"], map_location="cpu", weights_only=True)
    if differing := sorted(saved["parameters"].keys() ^ dense.keys()):
        raise DistmtlError(f"checkpoint {checkpoint.path}: its dense parameters are not this model's, such as {differing[0]}")
    with torch.no_grad():
        for name, parameter in dense.items():
            parameter.copy_(saved["parameters"][name])
    return saved


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        DistmtlError: it has no manifest, another format, or a file that is missing or of another size.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format"], dict(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise DistmtlError(f"checkpoint {path} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DistmtlError(f"checkpoint {path}: {MANIFEST} is not one of ours, or damaged: {type(e).__name__}: {e}") from None
    if version != FORMAT:
        raise DistmtlError(f"checkpoint {path}: format {version}, but this version reads format {FORMAT}")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            raise DistmtlError(f"checkpoint {path} is damaged: {name} has {'no' if found is None else found} bytes instead of {size}")
    return Checkpoint(path, manifest)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run, and why newer ones were passed over."""
    passed: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path), passed
        except DistmtlError as e:
            passed.append(str(e))
    return None, passed


def retain(folder: Path, keep: int, best_step: int | None, step: int) -> None:
    """After saving `step`, delete all but the newest `keep` checkpoints and the best one, and whatever is newer than `step`:
    leftovers, damaged perhaps, of a course that was given up. Rank 0 calls it."""
    paths = sorted(folder.glob("step-*"), reverse=True)
    current = folder / f"step-{step:09d}"
    kept = {*[p for p in paths if p <= current][:keep], folder / f"step-{best_step or 0:09d}"}
    for path in paths:
        if path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)  # incomplete from here on, should we be stopped half-way
            shutil.rmtree(path, ignore_errors=True)


def _tables(model: nn.Module) -> dict[str, Any]:
    return {f"tables/{name}": value for name, value in model.state_dict().items() if hasattr(value, "local_shards")}


def _tables_optimizer(optimizers: Any) -> dict[str, Any]:
    state = optimizers.fused.state_dict()["state"]
    return {f"tables_optimizer/{name}/{key}": value for name, values in state.items() for key, value in values.items()}


def _dense(optimizers: Any) -> io.BytesIO:
    """What is the same on every rank, as one blob."""
    blob = io.BytesIO()
    torch.save({"parameters": {n: p.detach() for n, p in optimizers.parameters.items()}, "optimizer": optimizers.dense_state()}, blob)
    return blob


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
