"""A tracker: a service that is sent the figures of a run, from a thread of its own that reads the run's log.

The log is the queue. Training never waits for the network, however long it lasts; nothing is lost while the service does not answer,
and what a process that was killed had not sent, the next attempt sends. RUN/<tracker>.json says which run of the service it is and how
far the log was sent.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from distmtl.storage import write_whole
from distmtl.tracking.log import LogReader
from distmtl.tracking.records import MEASURED, Record, series

PACE_S = 1.0  # between two requests
RETRY_S = 20.0  # until a service that did not answer is asked again
CLOSE_S = 30.0  # that the end of a run waits for the last records to be sent
CHUNK = 1 << 20  # bytes of the log that are sent at once

Status = Literal["running", "finished", "stopped", "failed"]


class Service(Protocol):
    """Any exception of these means that it did not answer."""

    name: str  # of the tracker
    where: str  # which server and project; another one gets a run of its own

    def load(self) -> None:
        """Import its package, which takes a second or two."""

    def open(self, run: str | None) -> str:
        """Make a run, or go on with one; returns its id."""

    def send(self, records: list[Record], status: Status) -> None:
        """Their figures, and what the run has come to."""

    def close(self, status: Status) -> None:
        """Nothing more comes from this process."""


@dataclass
class Sent:
    """What the service has."""

    where: str
    run: str | None = None
    position: int = 0  # in the log
    status: Status = "running"
    newest: dict[str, int] = field(default_factory=dict)  # series → its last step
    before: dict[str, int] = field(default_factory=dict)  # the same, at the end of the last attempt

    def add(self, records: list[Record]) -> list[Record]:
        """Those that it does not have yet. Of a step that a failure undid, the first value stays: nothing can be taken back there."""
        out = []
        for r in records:
            self.status = status_after(r, self.status)
            if r["kind"] == "start":
                self.before = dict(self.newest)
            if r["kind"] in MEASURED:
                if r["step"] <= self.before.get(series(r), -1):
                    continue
                self.newest[series(r)] = max(r["step"], self.newest.get(series(r), 0))
            out.append(r)
        return out


def status_after(record: Record, status: Status) -> Status:
    match kind := record["kind"]:
        case "train":
            return "running"
        case "end":
            return "stopped" if record["result"]["stopped"] else "finished"
        case "failed" | "stopped":
            return kind
    return status


class Tracker:
    """A sink that only wakes its thread.

    Args:
        log: the run's metrics.jsonl; the state is kept beside it.
        say: called, from any thread, with a sentence for whoever follows the run.
    """

    def __init__(self, log: Path, service: Service, say: Callable[[str], None]):
        self.log, self.service, self.say = log, service, say
        self.file = log.with_name(f"{service.name}.json")
        self.sent = self._read_sent()
        self.opened = self.told = False
        self.news, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"distmtl-{service.name}")  # one that hangs holds up no exit
        self.thread.start()

    def take(self, record: Record) -> None:
        self.news.set()

    def close(self) -> None:
        """Once the last records are sent, or after CLOSE_S seconds without them: how many they are is said."""
        self.closing.set()
        self.news.set()
        self.thread.join(CLOSE_S)
        if left := len(LogReader(self.log, self.sent.position).read()):
            self.say(
                f"{self.service.name} at {self.service.where} has not taken the last {left} record(s), which metrics.jsonl has; the same "
                "command sends them"
            )
        elif self.thread.is_alive():
            self.say(f"{self.service.name} at {self.service.where} has not answered to the end of the run")

    def _run(self) -> None:
        self._try(self.service.load)
        ending = False
        while not ending:
            self.news.wait()
            self.news.clear()
            ending = self.closing.is_set()  # asked before the log is read: nothing comes after it
            answered = self._try(self._send)
            self.closing.wait(PACE_S if answered else RETRY_S)
        if self.opened and answered:
            self._try(lambda: self.service.close("failed" if self.sent.status == "running" else self.sent.status))

    def _send(self) -> None:
        reader = LogReader(self.log, self.sent.position)
        while records := reader.read(CHUNK):
            if not self.opened:
                self._keep(replace(self.sent, run=self.service.open(self.sent.run)))  # who is killed now has made it
                self.opened = True
            sent = replace(self.sent, newest=dict(self.sent.newest), position=reader.position)
            self.service.send(sent.add(records), sent.status)
            self._keep(sent)

    def _keep(self, sent: Sent) -> None:
        self.sent = sent
        write_whole(self.file, json.dumps(asdict(sent)) + "\n")

    def _read_sent(self) -> Sent:
        """That of earlier attempts, if they had the same service."""
        if self.file.exists():
            sent = Sent(**json.loads(self.file.read_text(encoding="utf-8")))
            if sent.where == self.service.where:
                return sent
        return Sent(self.service.where)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as e:  # services raise what they like
            if not self.told:
                cause = " ".join(str(e).split()) or type(e).__name__
                self.say(
                    f"{self.service.name} at {self.service.where} does not take the run's figures: {cause:.200}; training goes on, and "
                    "what it lacks is sent when it answers"
                )
            self.told = True
            self.news.set()  # it is asked again
            return False
        return True
