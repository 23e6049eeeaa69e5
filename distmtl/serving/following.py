"""What is read anew while it is served: an export or a published folder, a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from distmtl.config import Config
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest
from distmtl.exporting.manifest import MANIFEST, Manifest
from distmtl.exporting.publishing import exports_in
from distmtl.serving.columns import Column, columns
from distmtl.serving.fusion import ProductFusion, default_fusion
from distmtl.serving.openapi import openapi
from distmtl.serving.predictor import Predictor
from distmtl.serving.request import Limits

CARD = "card.md"
T = TypeVar("T")


def chains(path: Path) -> list[list[Path]]:
    """Full exports and the deltas of each, oldest first; the newest full one first. An export itself is its only chain.

    Raises:
        DistmtlError: there is none.
    """
    if (path / MANIFEST).exists():
        return [[path]]
    out: list[list[Path]] = []
    for folder in exports_in(path):
        if folder.name.endswith("-full"):
            out.insert(0, [folder])
        elif out:
            out[0].append(folder)
    if not out:
        raise DistmtlError(f"{path} is neither an export nor a folder of published ones; make one with distmtl export RUN --out DIR")
    return out


@dataclass(frozen=True)
class Model:
    """An export in memory, and what follows from it. Deltas change the predictor, never the rest."""

    predictor: Predictor
    columns: dict[str, Column]
    limits: Limits
    fusion: ProductFusion

    @classmethod
    def load(cls, folder: Path, limits: Limits) -> Model:
        predictor = Predictor(folder)
        config = predictor.config
        return cls(predictor, columns(config, predictor.manifest.columns, limits.list), limits, default_fusion(config))

    def openapi(self) -> dict[str, Any]:
        return openapi(self.predictor.manifest, self.predictor.config, self.columns, self.limits)


def described(path: Path, limits: Limits) -> dict[str, Any]:
    """The OpenAPI schema of an export that is not loaded."""
    found = manifest.read(chains(path)[0][-1])
    config = found.parsed_config()
    return openapi(found, config, columns(config, found.columns, limits.list), limits)


class Version:
    """What is served under a name. Of broken exports and deltas none is served: at first what came before them, later what already is.

    Args:
        path: an export, or a folder of published ones, of which the newest is served.
        between: runs something while the predictor is not scoring.
        check: refuses the config of a newer export, say because the fusion names a task that it lacks.

    Raises:
        DistmtlError: no export can be loaded.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        limits: Limits,
        between: Callable[[Callable[[], Any]], Any],
        check: Callable[[Config], None],
    ):
        self.name, self.path, self.limits, self.between, self.check = name, path, limits, between, check
        self.failure = ""  # why what is newest is not served
        self.model, deltas = self._first()
        try:
            for delta in deltas:
                self.model.predictor.apply(delta)
                self.folder = delta
        except DistmtlError as e:
            self.failure = str(e)
        self.since = time.time()
        self._seen = _marks(chains(path)[0][-1]) if self.failure else None

    @property
    def manifest(self) -> Manifest:
        return self.model.predictor.manifest

    def card(self) -> str:
        """Its card, for people."""
        try:
            return (self.folder / CARD).read_text(encoding="utf-8")
        except OSError:  # the folder is gone; what is served is in memory
            return ""

    def _first(self) -> tuple[Model, list[Path]]:
        for folders in (found := chains(self.path)):
            try:
                self.folder = folders[0]
                return Model.load(self.folder, self.limits), folders[1:]
            except DistmtlError as e:
                self.failure = self.failure or str(e)
                if folders is found[-1]:
                    raise DistmtlError(self.failure) from None
        raise AssertionError("chains are never empty")

    def refresh(self, took: Callable[[str], None]) -> None:
        """Serve what is newest, as far as it is whole.

        Args:
            took: told of each that is served now, `full` or `delta`.

        Raises:
            DistmtlError: one is broken; told once, and again when a file of it has changed: a copy may be under way.
        """
        folders = chains(self.path)[0]
        if (mark := _marks(folders[-1])) == self._seen:
            return
        taken: list[str] = []
        try:
            self._take(folders, taken)
        except DistmtlError as e:
            self._seen, self.failure = mark, str(e)
            raise
        else:
            self._seen, self.failure = mark, ""
        finally:
            for kind in taken:
                self.since = time.time()
                took(kind)

    def _take(self, folders: list[Path], taken: list[str]) -> None:
        digests = [manifest.read(folder).digest for folder in folders]
        if self.manifest.digest in digests:
            model, rest, at = self.model, folders[digests.index(self.manifest.digest) + 1 :], self.folder
        else:
            model, rest, at = Model.load(folders[0], self.limits), folders[1:], folders[0]
            self.check(model.predictor.config)
            taken.append("full")
        try:
            for folder in rest:
                delta = model.predictor.prepare(folder)
                commit = partial(model.predictor.commit, delta)
                self.between(commit) if model is self.model else commit()
                taken.append("delta")
                at = folder
        finally:
            self.model, self.folder = model, at


class Followed(Generic[T]):
    """A file's content, and what it becomes when the file changes.

    Raises:
        DistmtlError: at first it cannot be read.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]):
        self.path, self.read = path, read
        self.mark, self.value = _mark(path), read(path)

    def refresh(self) -> bool:
        """Whether it has changed.

        Raises:
            DistmtlError: what it is now cannot be read: the value stays. Told once.
        """
        if (mark := _mark(self.path)) == self.mark:
            return False
        self.mark = mark
        self.value = self.read(self.path)
        return True


def _mark(path: Path) -> tuple[str, int, int]:
    """Another one when the file is."""
    try:
        found = path.stat()
    except OSError as e:
        raise DistmtlError(f"{path} cannot be read: {e.strerror}") from None
    return str(path), found.st_mtime_ns, found.st_ino


def _marks(folder: Path) -> list[tuple[str, int, int]]:
    """Of an export's files."""
    return [_mark(folder / MANIFEST), *(_mark(p) for p in sorted(folder.rglob("*")) if p.is_file())]
