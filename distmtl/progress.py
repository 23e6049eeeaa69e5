"""What a run says while it runs: one JSON line a program can read, and one line a person can.

Rank 0 appends records to <run>/metrics.jsonl and TensorBoard; launchers show them through `describe`. A record has a `kind`:
start, train, evaluation, checkpoint, note, end.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from distmtl.storage import is_remote

COPY_EVERY_S = 10.0

Record = dict[str, Any]
Report = Callable[[Record], None]


class Progress:
    """Appends records to a run directory and passes them on; silent on all ranks but the first.

    In an object store nothing can be appended to: there the files grow in a local folder and are copied whole, at most every
    COPY_EVERY_S seconds and with every record that is not a mere step's.

    What cannot be written (a full disk, a store that does not answer) is said once and ends no run: if it lasts, the next checkpoint will.
    """

    def __init__(self, folder: Path | None, first: bool, report: Report):
        self.first, self.report = first, report
        self.log: Path | None = None
        self.broken = False
        if first and folder:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, on rank 0 only

            self.store = folder if is_remote(folder) else None
            self.folder = Path(tempfile.mkdtemp(prefix="distmtl-")) if self.store else folder
            self.log, self.copied = self.folder / "metrics.jsonl", 0.0
            if self.store and (self.store / self.log.name).exists():
                self.log.write_bytes((self.store / self.log.name).read_bytes())
            _cut_unfinished_line(self.log)
            self.file = self.log.open("ab", buffering=0)
            self.board: Any = None
            self._try(lambda: setattr(self, "board", SummaryWriter(str(self.folder))))

    def say(self, kind: str, **values: Any) -> None:
        if self.log is None:
            return
        record = _finite({"kind": kind, "time": round(time.time(), 3), **values})
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._try(lambda: _append_whole(self.file, line))
        self._try(lambda: self._draw(kind, values))
        if self.store and (kind != "train" or time.monotonic() - self.copied > COPY_EVERY_S):
            self._try(self._copy)
        self.report(record)

    def close(self) -> None:
        if self.log is not None:
            self.file.close()
            self._try(lambda: self.board and self.board.close())
            if self.store and self._try(self._copy):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _draw(self, kind: str, values: Record) -> None:
        if self.board is None:
            return
        try:
            for name, value in _scalars(values):
                self.board.add_scalar(f"{kind}/{name}", value, values.get("step", 0))
        except Exception:  # its writer is a thread that ended with its first error
            self.board = None
            raise

    def _copy(self) -> None:
        assert self.store is not None
        self.copied = time.monotonic()
        for file in (f for f in self.folder.rglob("*") if f.is_file()):
            to = self.store / file.relative_to(self.folder).as_posix()
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())

    def _try(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except Exception as e:
            if not isinstance(e, OSError) and not self.store:  # object stores raise what they like
                raise
            if not self.broken:
                text = f"the progress of the run cannot be written to {self.store or self.folder}: {e}; it goes on"
                self.report({"kind": "note", "time": round(time.time(), 3), "text": text})
            self.broken = True
            return False
        return True


def _append_whole(file: Any, line: bytes) -> None:
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


def _finite(value: Any) -> Any:
    """With None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + name, value


def describe(record: Record) -> str | None:
    """A record as the lines a person follows; None for one that is not worth a line."""
    r = record
    match r["kind"]:
        case "start":
            return r["text"]
        case "train":
            losses = "  ".join(f"{task} {loss:.4f}" for task, loss in r["losses"].items())
            return (
                f"step {r['step']:>6}/{r['of']}  epoch {r['epoch']}  {_si(r['rows'])} rows  {r['samples_per_second']:>9,.0f} samples/s"
                f"  loss {r['loss']:.4f}  {losses}  ETA {duration(r['eta_s'])}"
            )
        case "evaluation":
            tasks = "  ".join(f"{task} {_headline(m)}" for task, m in r["metrics"].items())
            best = "  (best so far)" if r.get("best") else ""
            return f"step {r['step']:>6}/{r['of']}  {r['split']}  loss {r['loss']:.4f}  {tasks}{best}"
        case "note":
            return r["text"]
    return None


def print_record(record: Record) -> None:
    """The `report` of a process with a terminal of its own."""
    if line := describe(record):
        print(line, flush=True)


def _headline(metrics: Record) -> str:
    shown = [(k, metrics[k]) for k in ("auc", "logloss", "rmse") if metrics.get(k) is not None]
    return " ".join(f"{k.upper() if k != 'logloss' else k} {v:.4f}" for k, v in shown) or "(nothing known)"


def _si(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"
