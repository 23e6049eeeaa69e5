"""Checkpoints: every rank writes its own shards (torch DCP), then rank 0 the manifest. No manifest, no checkpoint.

<run>/checkpoints/step-000001000-0/     the 0: the run's attempt that wrote it; a rank left over from another one cannot touch it
    __0_0.distcp …   shards        .metadata   DCP's own index
    manifest.json    written last and in one move: what, where, and the size and CRC-32 of every file
"""

from __future__ import annotations

import io
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from torch.distributed.checkpoint.metadata import Metadata

from distmtl.errors import DistmtlError
from distmtl.storage import is_remote, place, remove_tree, sizes, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
VISIBLE_WITHIN_S = 60.0  # a shared disk may show a machine what another one wrote only after a while
READ_BYTES = 1 << 22
NAME = re.compile(r"step-(\d+)-(\d+)")
WEIGHTING = "loss.weighting."  # begins the names of what balances the tasks: no weights of the model, but state of its training


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def __reduce__(self) -> Any:  # told to other ranks; fsspec's paths cannot all be pickled
        return _at, (str(self.path), self.manifest)


def _at(path: str, manifest: dict[str, Any]) -> Checkpoint:
    return Checkpoint(place(path), manifest)


# ------------------------------------------------------------------------------------------------------------- writing


def prepare(path: Path) -> None:
    """An empty folder. Rank 0 calls it before `write`."""
    try:
        remove_tree(path)
        path.mkdir(parents=True)
    except Exception as e:  # object stores raise what they like
        raise DistmtlError(f"checkpoint {path} could not be written: {_reason(e)}") from e


def write(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Every rank's own part of a state; all ranks of the group call it. Rank 0 gets the CRC-32 of every file.

    Raises:
        DistmtlError: a rank could not write, on all of them.
    """
    storage = (
        FsspecWriter(str(path), sync_files=False, use_listings_cache=False)
        if is_remote(path)
        else FileSystemWriter(path, single_file_per_rank=True)
    )
    storage.fs = files = SummingFiles(storage.fs)
    try:
        dcp.save(state, storage_writer=storage, process_group=group)
    except CheckpointException as e:  # every rank hears of it
        raise DistmtlError(f"checkpoint {path} could not be written: {_causes(e)}") from e
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, files.sums, group=group)
    return {name: number for sums in everyone for name, number in sums.items()}


def commit(path: Path, manifest: dict[str, Any], sums: dict[str, int] | None = None) -> int:
    """Make it a checkpoint; `manifest` may hold anything JSON can. Rank 0 calls it when all have written. Returns its bytes.

    Args:
        sums: what `write` returned.

    Raises:
        DistmtlError: it cannot be written, or does not hold what the ranks wrote.
    """
    try:
        files = _listed(path, sums or {})
        write_whole(path / MANIFEST, json.dumps({"format": FORMAT, **manifest, "files": files, "crc32": sums or {}}, indent=1))
    except DistmtlError:
        raise
    except Exception as e:
        raise DistmtlError(f"checkpoint {path} could not be written: {_reason(e)}") from e
    return sum(files.values())


def discard(path: Path) -> None:
    """Give its space back, if that can be done: what stays is no checkpoint. Rank 0 calls it."""
    with suppress(Exception):
        (path / MANIFEST).unlink(missing_ok=True)  # incomplete from here on, should we be stopped half-way
        remove_tree(path)


def retain(folder: Path, keep: int, best_step: int | None, current: Path) -> None:
    """After `current` was written, delete all but the newest `keep` complete checkpoints and the best one: what is incomplete, and
    what is newer, leftovers of a course that was given up. Rank 0 calls it."""
    kept: dict[int, Path] = {}  # of a step, the latest attempt's
    paths = _newest_first(folder)
    for path in (p for p in paths if _place_in_time(p) <= _place_in_time(current)):
        step = _place_in_time(path)[0]
        if step not in kept and (len(kept) < keep or step == best_step) and _is_complete(path):
            kept[step] = path
    for path in paths:
        if path not in kept.values():
            discard(path)


class SummingFiles:
    """DCP's access to files, with the CRC-32 of each that is written. What is summed is what was meant to be written, in memory."""

    def __init__(self, files: Any):
        self.files = files
        self.sums: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        summed = SummingStream()
        try:
            with self.files.create_stream(path, mode) as summed.stream:
                yield summed
        except Exception:
            if summed.error:
                raise summed.error from None  # not what torch makes of it: "unexpected pos 64 vs 0"
            raise
        self.sums[_name(path)] = summed.sum

    def rename(self, path: Any, new_path: Any) -> None:
        self.files.rename(path, new_path)
        self.sums[_name(new_path)] = self.sums.pop(_name(path))


class SummingStream:
    """A file being written, the CRC-32 so far, and why it could not be."""

    stream: Any = None
    sum = 0
    error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        try:
            return self.stream.write(data)
        except OSError as e:
            self.error = e
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _listed(path: Path, sums: dict[str, int]) -> dict[str, int]:
    """File → bytes, when all that the ranks wrote is there.

    Raises:
        DistmtlError: it is not: the ranks do not share a disk.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while missing := sorted(sums.keys() - sizes(path).keys()):
        if time.monotonic() > deadline:
            raise DistmtlError(
                f"checkpoint {path}: rank 0 does not see {missing[0]}, which another rank has written; "
                "run.dir must be on storage that all nodes share"
            )
        time.sleep(0.5)
    return dict(sorted(sizes(path).items()))


# ------------------------------------------------------------------------------------------------------------- finding


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        DistmtlError: it has no manifest, another format, or a file that is missing or of another size.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
        found = sizes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DistmtlError(f"checkpoint {path} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DistmtlError(f"checkpoint {path}: {MANIFEST} is not one of ours, or damaged: {type(e).__name__}: {e}") from None
    if version != FORMAT:
        raise DistmtlError(f"checkpoint {path}: format {version}, but this version reads format {FORMAT}")
    for name, size in files.items():
        if found.get(name) != size:
            raise DistmtlError(f"checkpoint {path} is damaged: {name} has {found.get(name, 'no')} bytes instead of {size}")
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
    """Step and attempt."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2])


def _newest_first(folder: Path) -> list[Path]:
    """All that are named as checkpoints; anything else is the user's own."""
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.exists() else []
    return sorted(found, key=_place_in_time, reverse=True)


def _is_complete(path: Path) -> bool:
    try:
        read(path)
    except DistmtlError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- loading


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Any) -> None:
    """Fill a built model and its optimizers; all ranks call it. Any world size and plan that can hold the same tables.

    Raises:
        DistmtlError: it cannot be read, or holds another model; on all ranks.
    """
    saved = _load(checkpoint, table_state(model, optimizers), dense_tensors(model))
    optimizers.load_dense_state(saved["optimizer"])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill a built model that will not be trained, or whose training begins: without what other training has left."""
    _load(checkpoint, table_state(model), _weights(model))


@dataclass(frozen=True)
class Changes:
    """What a changed config makes of a checkpoint's parts, besides their shapes.

    weighting: why the saved state of what balances the tasks means nothing now, "" if it does.
    former: name and shape of a dense parameter → its name in the checkpoint, and why it starts anew all the same ("" if it does not).
    """

    tables: dict[str, str]  # table → why its saved rows mean nothing now
    optimizers: dict[str, str]  # table → why its saved optimizer state does
    weighting: str = ""
    former: Callable[[str, torch.Size], tuple[str, str]] = lambda name, shape: (name, "")


def load_matching(checkpoint: Checkpoint, model: nn.Module, optimizers: Any | None, changes: Changes) -> list[str]:
    """Fill what the checkpoint has: tables of the same name and width, of no fewer rows now; dense parameters of the same role
    and shape. The rest keeps its initial values. Without `optimizers`, weights alone, no state of what balances the tasks.

    Returns what was not loaded, and what was left behind, each with the reason.
    """
    verify(checkpoint)
    saved = {name: value.size for name, value in index(checkpoint).state_dict_metadata.items() if hasattr(value, "size")}
    state = table_state(model, optimizers)
    matching, notes = _fitting_tables(state, saved, changes)
    left = {table_of(n) for n in saved} - {table_of(n) for n in state}
    notes += [f"table {t} of the checkpoint is left behind: the config has none of that name" for t in sorted(left)]
    blob = _read_state(checkpoint, matching)
    dense = dense_tensors(model) if optimizers and not changes.weighting else _weights(model)
    of_weighting = {n for n in blob["parameters"] if n.startswith(WEIGHTING)}
    if optimizers and changes.weighting and (of_weighting or dense.keys() < dense_tensors(model).keys()):
        notes.append(f"weighting: its state starts anew: it {changes.weighting}")
    former = {name: changes.former(name, p.shape) for name, p in dense.items()}
    loaded: dict[str, str] = {}  # name → its name in the checkpoint
    with torch.no_grad():
        for name, parameter in dense.items():
            then, why = former[name]
            old = blob["parameters"].get(then)
            if why := why or _unlike(getattr(old, "shape", None), parameter.shape):
                notes.append(f"{name} starts anew: it {why}")
            else:
                parameter.copy_(old)
                loaded[name] = then
    left = blob["parameters"].keys() - of_weighting - {then for then, _ in former.values()}
    notes += [f"{name} of the checkpoint is left behind" for name in sorted(left)]
    if optimizers:
        optimizers.load_dense_state({n: blob["optimizer"][then] for n, then in loaded.items() if then in blob["optimizer"]})
    return notes


def _fitting_tables(state: dict[str, Any], saved: dict[str, torch.Size], changes: Changes) -> tuple[dict[str, Any], list[str]]:
    """What of `table_state` can be filled, by its name in the checkpoint, of a table that has grown its first rows; and notes on all
    the rest."""
    fitting: dict[str, Any] = {}
    anew: dict[str, str] = {}  # table → why
    states_anew = dict(changes.optimizers)
    former = {_wherever(name): name for name in saved}
    notes = []
    for name, value in state.items():  # every weight comes before any optimizer state
        was = former.get(_wherever(name), name)
        table, then, now = table_of(name), saved.get(was), value.size()
        is_weight = name.startswith("tables/")
        why = changes.tables.get(table) if is_weight else anew.get(table) or states_anew.get(table)
        if why := why or _unlike(then, now, may_grow=True):
            (anew if is_weight else states_anew)[table] = why
        elif then:
            fitting[was] = _first_rows(value, then)
            if is_weight and then[0] < now[0]:
                notes.append(f"table {table}: rows {then[0]:,} to {now[0] - 1:,} are new")
    notes += [f"table {table} starts anew: it {why}" for table, why in anew.items()]
    notes += [f"table {table}: its optimizer's state starts anew: it {why}" for table, why in states_anew.items() if table not in anew]
    return fitting, notes


def _unlike(then: torch.Size | None, now: torch.Size, may_grow: bool = False) -> str:
    """Why a tensor of the checkpoint does not fit a shape; "" if it does."""
    if then is None:
        return "is not in the checkpoint"
    fits = len(then) == len(now) and then[1:] == now[1:] and then[0] <= now[0] if may_grow else then == now
    return "" if fits else f"was {_by(then)}, is {_by(now)}"


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
            wrong.append(f"{name} cannot be read: {_reason(e)}")
    everyone = [wrong]
    if ranks > 1:
        everyone = [[] for _ in range(ranks)]
        dist.all_gather_object(everyone, wrong)
    if all_wrong := [text for texts in everyone for text in texts]:
        raise DistmtlError(f"checkpoint {checkpoint.path} is damaged: {'; '.join(all_wrong[:4])}")


def _crc32(path: Path) -> int:
    number, buffer = 0, memoryview(bytearray(READ_BYTES))
    with path.open("rb") as file:
        while n := file.readinto(buffer):
            number = zlib.crc32(buffer[:n], number)
    return number


def _load(checkpoint: Checkpoint, sharded: dict[str, Any], dense: dict[str, torch.Tensor]) -> dict[str, Any]:
    verify(checkpoint)
    saved = _read_state(checkpoint, sharded)
    then = {n for n in saved["parameters"] if n in dense or not n.startswith(WEIGHTING)}
    if differing := sorted(then ^ dense.keys()):
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


def index(checkpoint: Checkpoint) -> Metadata:
    """DCP's own: what every entry is, and where its shards lie in which file."""
    return _reader(checkpoint).read_metadata()


def dense(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Name → what `dense_tensors` held, without a model to fill."""
    parameters: dict[str, torch.Tensor] = _read_state(checkpoint, {})["parameters"]
    return parameters


def _reader(checkpoint: Checkpoint) -> FileSystemReader:
    return FsspecReader(str(checkpoint.path), use_listings_cache=False) if is_remote(checkpoint.path) else FileSystemReader(checkpoint.path)


# --------------------------------------------------------------------------------------------------------------- state


def table_state(model: nn.Module, optimizers: Any | None = None) -> dict[str, Any]:
    """Name → sharded tensor: the tables' weights, and their optimizer's state; views, not copies."""
    state = {f"tables/{name}": value for name, value in model.state_dict().items() if hasattr(value, "local_shards")}
    fused = optimizers.fused.state_dict()["state"] if optimizers else {}
    return state | {f"tables_optimizer/{name}/{key}": value for name, values in fused.items() for key, value in values.items()}


def dense_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds beside the tables: dense parameters, buffers such as running means, and the state of what
    balances the tasks; equal on all ranks."""
    return {name: value for name, value in model.state_dict().items() if not hasattr(value, "local_shards")}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of `dense_tensors`, what the model computes with."""
    return {name: value for name, value in dense_tensors(model).items() if not name.startswith(WEIGHTING)}


def table_of(name: str) -> str:
    """The table that an entry of `table_state` belongs to: …embedding_bags.TABLE.weight… or …embeddings.TABLE.weight…"""
    return name.split(".weight", 1)[0].rsplit(".", 1)[-1]


def _wherever(name: str) -> str:
    """An entry of `table_state` without the module that its table is in: a table of bags may become one of sequences."""
    return re.sub(r"/[^/]*\.([^./]+\.weight)", r"/\1", name)


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


def _first_rows(value: ShardedTensor, size: torch.Size) -> ShardedTensor:
    if value.size() == size:
        return value
    shards = {tuple(s.metadata.shard_offsets): s.tensor for s in value.local_shards()}
    return like(value, {at: tensor[: size[0] - at[0]] for at, tensor in shards.items() if at[0] < size[0]}, size[0])


def _by(size: Any) -> str:
    return " x ".join(f"{n:,}" for n in size)


def _causes(e: CheckpointException) -> str:
    return "; ".join(sorted({str(failure[0]).strip() or type(failure[0]).__name__ for failure in e.failures.values()}))


def _reason(e: Exception) -> str:
    return (isinstance(e, OSError) and e.strerror) or str(e).strip() or type(e).__name__


def _name(path: Any) -> str:
    return str(path).rsplit("/", 1)[-1]
