"""What a run says while it runs: records (tracking/records.py), which rank 0 gives to its sinks; `describe` makes lines for a person.

<run>/metrics.jsonl and TensorBoard are always written. Trackers (docs/tracking.md) read the former from threads of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from distmtl.config import Config
from distmtl.storage import is_remote
from distmtl.tracking.board import Board
from distmtl.tracking.log import LOG, LogWriter
from distmtl.tracking.records import Record, Sink, finite
from distmtl.tracking.store import StoreCopy
from distmtl.tracking.trackers import FILES, open_trackers

Report = Callable[[Record], None]


class Progress:
    """Gives records to sinks and to `report`; silent on all ranks but the first.

    What cannot be written (a full disk, a store that does not answer) is said once and ends no run: if it lasts, the next checkpoint will.

    Args:
        config: of the run, whose trackers are told; without it none are.
    """

    def __init__(self, folder: Path | None, first: bool, report: Report, config: Config | None = None):
        self.report = report
        self.log: Path | None = None
        self.broken = False
        self.unsaid: SimpleQueue[str] = SimpleQueue()  # by trackers, whose threads may not write
        if first and folder:
            self.place = folder
            store = StoreCopy(folder, (LOG, *FILES)) if is_remote(folder) else None
            self.folder = store.folder if store else folder
            self.log = self.folder / LOG
            self.trackers: list[Sink] = [*open_trackers(config, self.log, self.unsaid.put)] if config else []
            self.files: list[Sink] = [LogWriter(self.log), Board(self.folder), *([store] if store else [])]

    def say(self, kind: str, **values: Any) -> None:
        if self.log is None:
            return
        self._give(finite({"kind": kind, "time": round(time.time(), 3), **values}))
        self._say_unsaid()

    @property
    def begun(self) -> bool:
        """Whether this attempt or one before it has said anything."""
        return self.log is not None and self.log.stat().st_size > 0

    def close(self) -> None:
        if self.log is not None:
            for tracker in self.trackers:
                tracker.close()
            self._say_unsaid()
            for sink in self.files:
                self._try(sink.close)

    def _say_unsaid(self) -> None:
        while not self.unsaid.empty():
            self._give({"kind": "note", "time": round(time.time(), 3), "text": self.unsaid.get()})

    def _give(self, record: Record) -> None:
        for sink in (*self.files, *self.trackers):
            self._try(lambda sink=sink: sink.take(record))  # type: ignore[misc]
        self.report(record)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as e:
            if not isinstance(e, OSError) and not is_remote(self.place):  # object stores raise what they like
                raise
            if not self.broken:
                text = f"the progress of the run cannot be written to {self.place}: {e}; it goes on"
                self.report({"kind": "note", "time": round(time.time(), 3), "text": text})
            self.broken = True


def describe(record: Record) -> str | None:
    """A record as the lines a person follows; None for one that is not worth a line."""
    r = record
    match r["kind"]:
        case "start":
            return r["text"]
        case "train":
            losses = "  ".join(f"{task} {loss:.4f}" for task, loss in r["losses"].items())
            return (
                f"step {r['step']:>6}/{r['of']}  epoch {r['epoch']}  {si(r['rows'])} rows  {r['samples_per_second']:>9,.0f} samples/s"
                f"  loss {r['loss']:.4f}  {losses}  ETA {duration(r['eta_s'])}"
            )
        case "evaluation":
            tasks = "  ".join(f"{task} {headline(m)}" for task, m in r["metrics"].items())
            best = "  (best so far)" if r.get("best") else ""
            return f"step {r['step']:>6}/{r['of']}  {r['split']}  loss {r['loss']:.4f}  {tasks}{best}"
        case "note":
            return r["text"]
    return None  # why it failed is said by who meets the error


def print_record(record: Record) -> None:
    """The `report` of a process with a terminal of its own."""
    if line := describe(record):
        print(line, flush=True)


def headline(metrics: Record) -> str:
    shown = [(k, metrics[k]) for k in ("auc", "logloss", "rmse") if metrics.get(k) is not None]
    return " ".join(f"{k.upper() if k != 'logloss' else k} {v:.4f}" for k, v in shown) or "(nothing known)"


def si(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"
