"""metrics.jsonl: one record a line, appended whole; and who reads it, at once or along with the run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from distmtl.storage import is_remote
from distmtl.tracking.records import Record

LOG = "metrics.jsonl"


class LogWriter:
    """The sink that all others could be made again from."""

    def __init__(self, log: Path):
        _cut_unfinished_line(log)
        self.file = log.open("ab", buffering=0)

    def take(self, record: Record) -> None:
        append_whole(self.file, json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self.file.close()


class LogReader:
    """The records of a log as they come, also from an object store; nothing is read twice.

    Args:
        position: bytes that are known already.
    """

    def __init__(self, log: Path, position: int = 0):
        self.log, self.position = log, position
        self.another = False  # whether the last `read` met another run's log in its place

    def read(self, most: int = -1) -> list[Record]:
        """Those since the last call, of about `most` bytes. The last line may still be being written: it is left."""
        try:
            size = self.log.stat().st_size
        except FileNotFoundError:
            size = 0
        self.another = size < self.position
        if self.another:
            self.position = 0
        if size == self.position:
            return []
        with self.log.open("rb") as file:
            file.seek(self.position)
            lines = list(takewhile(lambda line: line.endswith(b"\n"), file.readlines(most)))  # it may have grown after a half line
        self.position += sum(map(len, lines))
        return [json.loads(line) for line in lines]


def read_log(log: Path) -> list[Record]:
    """The records of a log up to now."""
    return LogReader(log).read()


def counted(records: Iterable[Record], before: Iterable[Record] = ()) -> list[Record]:
    """Without what a failure undid: steps after the one that the next attempt started from.

    Args:
        before: those that count of the records before these.
    """
    out = list(before)
    for record in records:
        if record["kind"] == "start":
            out = [r for r in out if r.get("step", 0) <= record["step"]]
        out.append(record)
    return out


def add_to_log(log: Path, record: Record) -> None:
    """To the log of a run that no process writes any more, also in an object store; not where there is none."""
    if not log.exists():
        return
    if is_remote(log):
        whole = log.read_bytes()
        log.write_bytes(whole[: whole.rfind(b"\n") + 1] + json.dumps(record).encode() + b"\n")
        return
    writer = LogWriter(log)
    writer.take(record)
    writer.close()


def append_whole(file: Any, line: bytes) -> None:
    """Whole or not at all: who reads along takes lines for JSON."""
    end = os.fstat(file.fileno()).st_size
    if file.write(line) != len(line):
        os.ftruncate(file.fileno(), end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_unfinished_line(log: Path) -> None:
    """What a process that was killed left at the end."""
    with suppress(FileNotFoundError):
        whole = log.read_bytes()
        if (end := whole.rfind(b"\n") + 1) < len(whole):
            os.truncate(log, end)
