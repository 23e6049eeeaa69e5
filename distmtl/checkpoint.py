"""Checkpoints: every rank writes its own shards (torch DCP), then rank 0 the manifest. No manifest, no checkpoint.

<run>/checkpoints/step-000001000-0/     the 0: the run's attempt that wrote it; a rank left over from another one cannot touch it
    __0_0.distcp …   shards        .metadata   DCP's own index
    manifest.json    written last and in one move: what, where, and the size of every file
"""

from __future__ import annotations

import io
import json
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException

from distmtl.errors import DistmtlError
from distmtl.storage import is_remote, remove_tree, write_whole

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


# ------------------------------------------------------------------------------------------------------------- writing


def prepare(path: Path) -> None:
    """An empty folder. Rank 0 calls it before `write`."""
    try:
        remove_tree(path)
        path.mkdir(parents=True)
    except OSError as e:
        raise DistmtlError(f"checkpoint {path} could not be written: {e.strerror or e}") from None


def write(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Every rank's own part of a state; all ranks of the group call it.

    Raises:
        DistmtlError: a rank could not write, on all of them.
    """
    storage = FsspecWriter(str(path), sync_files=False) if is_remote(path) else FileSystemWriter(path, single_file_per_rank=True)
    try:
        dcp.save(state, storage_writer=storage, process_group=group)
    except CheckpointException as e:  # every rank hears of it
        raise DistmtlError(f"checkpoint {path} could not be written: {_causes(e)}") from e


def commit(path: Path, manifest: dict[str, Any]) -> int:
    """Make it a checkpoint; `manifest` may hold anything JSON can. Rank 0 calls it when all have written. Returns its bytes."""
    try:
        files = {f.name: f.stat().st_size for f in sorted(path.iterdir())}
        write_whole(path / MANIFEST, json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1))
    except OSError as e:
        raise DistmtlError(f"checkpoint {path} could not be written: {e.strerror or e}") from None
    return sum(files.values())


def retain(folder: Path, keep: int, best_step: int | None, current: Path) -> None:
    """After `current` was written, delete all but the newest `keep` checkpoints and the best one, and whatever is newer:
    leftovers, damaged perhaps, of a course that was given up. Rank 0 calls it."""
    paths = _newest_first(folder)
    course = [p for p in paths if _place_in_time(p) <= _place_in_time(current)]
    by_step = {_place_in_time(p)[0]: p for p in reversed(course)}  # of a step, the latest attempt's
    kept = {*sorted(by_step.values(), key=_place_in_time)[-keep:], by_step.get(best_step if best_step is not None else -1)}
    for path in paths:
        if path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)  # incomplete from here on, should we be stopped half-way
            remove_tree(path)


# ------------------------------------------------------------------------------------------------------------- finding


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        DistmtlError: it has no manifest, another format, or a file that is missing or of another size.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
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


def newest(folder: Path, before: Checkpoint | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run (older than `before`), and why newer ones were passed over."""
    passed: list[str] = []
    for path in _newest_first(folder):
        if before and _place_in_time(path) >= _place_in_time(before.path):
            continue
        try:
            return read(path), passed
        except DistmtlError as e:
            passed.append(str(e))
    return None, passed


def of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, by the latest attempt that completed one."""
    errors: list[DistmtlError] = []
    for path in (p for p in _newest_first(folder) if _place_in_time(p)[0] == step):
        try:
            return read(path)
        except DistmtlError as e:
            errors.append(e)
    raise errors[0] if errors else DistmtlError(f"{folder} has no checkpoint of step {step}")


def name_of(step: int, attempt: int) -> str:
    return f"step-{step:09d}-{attempt}"


def _place_in_time(path: Path) -> tuple[int, int]:
    """Step and attempt; names of other kinds come before all."""
    match = re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=_place_in_time, reverse=True) if folder.exists() else []


# ------------------------------------------------------------------------------------------------------------- loading


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Any) -> None:
    """Fill a built model and its optimizers; all ranks call it. Any world size and plan that can hold the same tables.

    Raises:
        DistmtlError: it cannot be read, or holds another model; on all ranks.
    """
    saved = _load(checkpoint, table_state(model, optimizers), optimizers.parameters)
    optimizers.load_dense_state(saved["optimizer"])


def load_weights(checkpoint: Checkpoint, model: nn.Module, dense: dict[str, nn.Parameter]) -> None:
    """Fill a built model that will not be trained."""
    _load(checkpoint, table_state(model), dense)


def load_matching(
    checkpoint: Checkpoint, model: nn.Module, dense: dict[str, nn.Parameter], optimizers: Any | None, anew: dict[str, str]
) -> list[str]:
    """Fill what the checkpoint has: tables of the same name and width, of no fewer rows now; dense parameters of the same name
    and shape. The rest keeps its initial values. Without `optimizers`, weights alone.

    Args:
        anew: table → why its saved rows mean nothing now.

    Returns what was not loaded, and what was left behind, each with the reason.
    """
    saved, notes = _reader(checkpoint).read_metadata().state_dict_metadata, []
    state, matching = table_state(model, optimizers), {}
    for name, value in state.items():
        old = getattr(saved.get(name), "size", None)
        table = table_of(name)
        if table in anew:
            why = anew[table]
        elif old is None:
            why = "is not in the checkpoint"
        elif len(old) != len(value.size()) or old[1:] != value.size()[1:] or old[0] > value.size()[0]:
            why = f"has {_by(old)} in the checkpoint, {_by(value.size())} now"
        else:
            matching[name] = _first_rows(value, old)
            if old[0] < value.size()[0] and name.startswith("tables/"):
                notes.append(f"table {table}: rows {old[0]:,} to {value.size()[0] - 1:,} are new")
            continue
        if name.startswith("tables/"):
            notes.append(f"table {table} starts anew: it {why}")
    left = {table_of(n) for n in saved if n.startswith("tables/")} - {table_of(n) for n in state}
    notes += [f"table {t} of the checkpoint is left behind: the config has none of that name" for t in sorted(left)]
    blob = _read_state(checkpoint, matching)
    with torch.no_grad():
        for name, parameter in dense.items():
            old = blob["parameters"].get(name)
            if old is not None and old.shape == parameter.shape:
                parameter.copy_(old)
            else:
                now = _by(parameter.shape)
                notes.append(f"{name} starts anew: it {'is not in the checkpoint' if old is None else f'was {_by(old.shape)}, is {now}'}")
    gone = blob["parameters"].keys() - dense.keys()
    notes += [f"{name} of the checkpoint is left behind" for name in sorted(gone)]
    if optimizers:
        same = {n for n, p in dense.items() if n in blob["parameters"] and blob["parameters"][n].shape == p.shape}
        optimizers.load_dense_state({n: s for n, s in blob["optimizer"].items() if n in same})
    return notes


def _load(checkpoint: Checkpoint, sharded: dict[str, Any], dense: dict[str, nn.Parameter]) -> dict[str, Any]:
    saved = _read_state(checkpoint, sharded)
    if differing := sorted(saved["parameters"].keys() ^ dense.keys()):
        raise DistmtlError(f"checkpoint {checkpoint.path}: its dense parameters are not this model's, such as {differing[0]}")
    with torch.no_grad():
        for name, parameter in dense.items():
            parameter.copy_(saved["parameters"][name])
    return saved


def _read_state(checkpoint: Checkpoint, sharded: dict[str, Any]) -> dict[str, Any]:
    """Fill shards in place; returns what every rank has alike: dense parameters and their optimizer's state."""
    state = {**sharded, "dense": io.BytesIO()}
    try:
        dcp.load(state, storage_reader=_reader(checkpoint))
    except CheckpointException as e:
        raise DistmtlError(f"checkpoint {checkpoint.path} cannot be loaded: {_causes(e)}") from e
    state["dense"].seek(0)
    return torch.load(state["dense"], map_location="cpu", weights_only=True)


def _reader(checkpoint: Checkpoint) -> FileSystemReader:
    return FsspecReader(str(checkpoint.path)) if is_remote(checkpoint.path) else FileSystemReader(checkpoint.path)


# --------------------------------------------------------------------------------------------------------------- state


def table_state(model: nn.Module, optimizers: Any | None = None) -> dict[str, Any]:
    """Name → sharded tensor: the tables' weights, and their optimizer's state; views, not copies."""
    state = {f"tables/{name}": value for name, value in model.state_dict().items() if hasattr(value, "local_shards")}
    fused = optimizers.fused.state_dict()["state"] if optimizers else {}
    return state | {f"tables_optimizer/{name}/{key}": value for name, values in fused.items() for key, value in values.items()}


def table_of(name: str) -> str:
    """The table that an entry of `table_state` belongs to: …embedding_bags.TABLE.weight…"""
    return name.split(".weight", 1)[0].rsplit(".", 1)[-1]


def dense_state(optimizers: Any) -> io.BytesIO:
    """What is the same on every rank, as one blob."""
    blob = io.BytesIO()
    torch.save({"parameters": {n: p.detach() for n, p in optimizers.parameters.items()}, "optimizer": optimizers.dense_state()}, blob)
    return blob


def like(value: ShardedTensor, shards: list[Shard], rows: int | None = None) -> ShardedTensor:
    """A sharded tensor over other local tensors, of the first `rows` rows only if that is given. No communication."""
    whole = deepcopy(value.metadata())
    if rows is not None:
        whole.size = torch.Size([rows, *whole.size[1:]])
        whole.shards_metadata = [m for m in whole.shards_metadata if m.shard_offsets[0] < rows]
    device = next((s.tensor.device for s in shards), None)
    for metadata in whole.shards_metadata:
        if rows is not None:
            metadata.shard_sizes[0] = min(metadata.shard_sizes[0], rows - metadata.shard_offsets[0])
        if device is not None and metadata.placement is not None:
            metadata.placement._device = device
    own = {tuple(m.shard_offsets): m for m in whole.shards_metadata}
    shards = [Shard(s.tensor, own[tuple(s.metadata.shard_offsets)]) for s in shards]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, whole, process_group=value._process_group)


def _first_rows(value: ShardedTensor, size: torch.Size) -> ShardedTensor:
    if value.size() == size:
        return value
    rows, shards = size[0], []
    for shard in value.local_shards():
        first = shard.metadata.shard_offsets[0]
        if first < rows:
            shards.append(Shard(shard.tensor[: rows - first], shard.metadata))
    return like(value, shards, rows)


def _by(size: Any) -> str:
    return " x ".join(f"{n:,}" for n in size)


def _causes(e: CheckpointException) -> str:
    return "; ".join(sorted({str(failure[0]).strip() or type(failure[0]).__name__ for failure in e.failures.values()}))
