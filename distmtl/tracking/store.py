"""A run's directory in an object store, where nothing can be appended to: its growing files live in a local folder and are copied."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from distmtl.tracking.log import LOG
from distmtl.tracking.records import Record

COPY_EVERY_S = 10.0


class StoreCopy:
    """Copied whole, at most every COPY_EVERY_S seconds and with every record that is not a mere step's.

    Args:
        store: the run's directory.
        kept: files of it that earlier attempts left and this one goes on with.
    """

    def __init__(self, store: Path, kept: Sequence[str]):
        self.store, self.copied = store, 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="distmtl-"))
        for name in kept:
            if (store / name).exists():
                (self.folder / name).write_bytes((store / name).read_bytes())

    def take(self, record: Record) -> None:
        if record["kind"] != "train" or time.monotonic() - self.copied > COPY_EVERY_S:
            self._copy()

    def close(self) -> None:
        self._copy()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _copy(self) -> None:
        self.copied = time.monotonic()
        files = [f for f in self.folder.rglob("*") if f.is_file() and f.suffix != ".partial"]
        for file in sorted(files, key=lambda f: f.name != LOG):  # the log first: trackers' files say how far it was sent
            to = self.store / file.relative_to(self.folder).as_posix()
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
