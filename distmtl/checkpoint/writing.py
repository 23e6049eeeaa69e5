"""Writing a checkpoint: every rank its own part, then rank 0 the manifest; and deleting old ones."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException

from distmtl.checkpoint.failures import causes, reason
from distmtl.checkpoint.finding import FORMAT, MANIFEST, is_complete, newest_first, place_in_time
from distmtl.errors import DistmtlError
from distmtl.storage import is_remote, remove_tree, sizes, write_whole

VISIBLE_WITHIN_S = 60.0  # a shared disk may show a machine what another one wrote only after a while


def prepare(path: Path) -> None:
    """An empty folder. Rank 0 calls it before `write`."""
    try:
        remove_tree(path)
        path.mkdir(parents=True)
    except Exception as e:  # object stores raise what they like
        raise DistmtlError(f"checkpoint {path} could not be written: {reason(e)}") from e


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
        raise DistmtlError(f"checkpoint {path} could not be written: {causes(e)}") from e
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
        raise DistmtlError(f"checkpoint {path} could not be written: {reason(e)}") from e
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
    paths = newest_first(folder)
    for path in (p for p in paths if place_in_time(p) <= place_in_time(current)):
        step = place_in_time(path)[0]
        if step not in kept and (len(kept) < keep or step == best_step) and is_complete(path):
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


def _name(path: Any) -> str:
    return str(path).rsplit("/", 1)[-1]
