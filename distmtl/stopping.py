"""What a running loop may be asked to do, by a file in its directory: `touch RUN/STOP`, `touch RUN/SAVE`.

STOP (SIGTERM and Ctrl-C make it): the loop saves a checkpoint and returns a result with "stopped": true; the same command continues
the run. SAVE: it saves a checkpoint and goes on. MOVE is the launcher's own: as STOP, and the launcher continues it at once on
other workers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType

from distmtl.errors import DistmtlError

LOOK_EVERY_S = 1.0  # how often the loop looks for a file; every look costs a small broadcast


class Request(StrEnum):
    """The name of the file that asks. Of several, the first of these is answered."""

    STOP = "STOP"
    MOVE = "MOVE"
    SAVE = "SAVE"


class GivenUp(DistmtlError):
    """Raised by who is told of the progress: the run is not worth going on with. The checkpoint on its way is completed."""


@dataclass
class StopRequest:
    signal: int | None = None  # the signal that asked


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C ask the run in `folder` to save a checkpoint and end; a second one ends this process at once."""
    request = StopRequest()
    file = folder / Request.STOP

    def heed(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        try:
            file.touch()  # nothing else: a call to Ray, or a print, may abort inside a signal handler
        except OSError:  # the run has no directory yet: nothing to lose
            raise KeyboardInterrupt from None
        request.signal = number
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping: a checkpoint is saved first; once more to end at once\n")

    _clear(folder)
    former = {s: signal.signal(s, heed) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _clear(folder)


def ask(folder: Path, request: Request) -> None:
    (folder / request).touch()


def asked(folder: Path) -> Request | None:
    """What is asked of the run in a folder, if anything is."""
    return next((r for r in Request if (folder / r).exists()), None)


def forget(folder: Path, *requests: Request) -> None:
    """Take requests away: they were answered, or are of another time."""
    for request in requests:
        (folder / request).unlink(missing_ok=True)


def steps_between_looks(steps: int, seconds: float) -> int:
    """LOOK_EVERY_S in steps, given how long the steps so far took."""
    return max(1, int(LOOK_EVERY_S * steps / max(seconds, 1e-9)))


@contextmanager
def passing_requests(run: Path, part: Path) -> Iterator[None]:
    """What is asked of a run that is a chain of runs (STOP, SAVE) reaches the part of it that is under way."""
    done = threading.Event()

    def pass_on() -> None:
        while not done.wait(LOOK_EVERY_S / 2):
            for request in (Request.STOP, Request.SAVE):
                if (run / request).exists() and part.exists():
                    ask(part, request)
                    if request == Request.SAVE:
                        forget(run, request)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if part.exists():
            forget(part, *Request)


def _clear(folder: Path) -> None:
    if (folder / "config.yaml").exists():  # a run's directory, not somebody else's
        forget(folder, *Request)
