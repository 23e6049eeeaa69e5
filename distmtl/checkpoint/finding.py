"""Which checkpoints there are: a folder whose manifest is whole, and whose files have the sizes that it says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmtl.errors import DistmtlError
from distmtl.storage import place, sizes

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d+)-(\d+)")


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
    for path in newest_first(folder):
        if before and place_in_time(path) >= place_in_time(before.path):
            continue
        try:
            return read(path), passed
        except DistmtlError as e:
            passed.append(str(e))
    return None, passed


def of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, by the latest attempt that completed one."""
    errors: list[DistmtlError] = []
    for path in (p for p in newest_first(folder) if place_in_time(p)[0] == step):
        try:
            return read(path)
        except DistmtlError as e:
            errors.append(e)
    raise errors[0] if errors else DistmtlError(f"{folder} has no checkpoint of step {step}")


def name_of(step: int, attempt: int) -> str:
    return f"step-{step:09d}-{attempt}"


def place_in_time(path: Path) -> tuple[int, int]:
    """Step and attempt."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2])


def newest_first(folder: Path) -> list[Path]:
    """All that are named as checkpoints; anything else is the user's own."""
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.exists() else []
    return sorted(found, key=place_in_time, reverse=True)


def is_complete(path: Path) -> bool:
    try:
        read(path)
    except DistmtlError:
        return False
    return True
