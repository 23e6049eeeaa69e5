"""What an export is: a folder that says all about itself, and which nothing but data is read from.

    manifest.json    written last and in one move: what this is, and the size and SHA-256 of every file
    model.pt2        torch.export: pooled embeddings, lists, numbers → outputs of the tasks
    tables/NAME/000000000.safetensors …    blocks of rows, by the number of their first
    card.md          for people: data, metrics, seeds, versions
    config.yaml      the resolved config

A delta has only the rows that changed since its `base`, in tables/NAME/changed.safetensors, and the whole model.pt2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from distmtl.config import Config, Strict
from distmtl.config_file import parse_config
from distmtl.data.hashing import HASH_VERSION
from distmtl.data.schema import Kind
from distmtl.errors import DistmtlError
from distmtl.storage import write_whole

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.pt2"
SERVED = ("features", "interaction", "model", "tasks")  # sections of the config that serving goes by; `tables` is of training alone
RowFormat = Literal["fp32", "fp16", "int8"]


class Manifest(Strict):
    """Everything that serving must know, beside tables and program.

    Args:
        digest: of the files and all else in here; names this export.
        base: of a delta, the digest of what it changes; "" in a full export.
        sequence: of the publishes of a folder, 0, 1, …
        checkpoint, checkpoint_digest: its name, and what tells it from another of that name.
        columns: column that is read → what it holds.
        calibrations: task → Calibration.to_dict
        domains: that were trained on, of a head with statistics of each.
        files: name → bytes, SHA-256.
    """

    format: int = FORMAT
    digest: str = ""
    base: str = ""
    sequence: int = 0
    name: str
    checkpoint: str
    checkpoint_digest: str = ""
    step: int
    rows_trained: int
    row_format: RowFormat
    config: dict[str, Any]
    columns: dict[str, Kind]
    calibrations: dict[str, dict[str, Any]]
    domains: list[int] | None
    hash_version: int = HASH_VERSION
    versions: dict[str, str]
    git: str | None
    files: dict[str, tuple[int, str]] = {}  # noqa: RUF012  # pydantic copies it

    @property
    def is_delta(self) -> bool:
        return bool(self.base)

    def serves_like(self, config: Mapping[str, Any], columns: Mapping[str, Kind]) -> bool:
        """Whether a model of another config, and other columns, reads the same and predicts the same tasks: a delta may lead to it."""
        return all(self.config.get(section) == config.get(section) for section in SERVED) and self.columns == columns

    def parsed_config(self) -> Config:
        return parse_config(self.config, f"export {self.name}")


def complete(folder: Path, manifest: Manifest) -> Manifest:
    """Make the folder an export: list its files, name it by their sums, write the manifest."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    listed = manifest.model_copy(update={"files": {name: (p.stat().st_size, _sum(p)) for name, p in files.items()}})
    text = json.dumps(listed.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
    whole = listed.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()[:16]})
    write_whole(folder / MANIFEST, json.dumps(whole.model_dump(mode="json"), indent=1) + "\n")
    return whole


def read(folder: Path) -> Manifest:
    """The manifest of an export whose files are there and have their sizes (`verify` reads them too).

    Raises:
        DistmtlError: none, another format, damaged, or made with another hash of strings.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = raw["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise DistmtlError(f"{folder} is no export: it has no {MANIFEST}; make one with distmtl export CHECKPOINT --out DIR") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DistmtlError(f"export {folder}: {MANIFEST} cannot be read: {type(e).__name__}: {e}; export again") from None
    if version != FORMAT:
        raise DistmtlError(f"export {folder}: format {version}, but this version reads format {FORMAT}; export again")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as e:
        raise DistmtlError(
            f"export {folder}: {MANIFEST} is damaged: {e.errors()[0]['msg']} at {e.errors()[0]['loc']}; export again"
        ) from None
    if manifest.hash_version != HASH_VERSION:
        raise DistmtlError(
            f"export {folder} hashes strings by scheme {manifest.hash_version}, this version by {HASH_VERSION}; export again"
        )
    _each(folder, manifest, lambda path, size, _: None if path.is_file() and path.stat().st_size == size else "is missing or cut short")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file.

    Raises:
        DistmtlError: one is not what was written.
    """
    _each(folder, manifest, lambda path, _, wanted: None if _sum(path) == wanted else "has other bytes than were written")


def _each(folder: Path, manifest: Manifest, wrong: Callable[[Path, int, str], str | None]) -> None:
    for name, (size, wanted) in manifest.files.items():
        if why := wrong(folder / name, size, wanted):
            raise DistmtlError(f"export {folder} is damaged: {name} {why}; copy or export it again")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
