"""Stopping a run before its end without losing a step: a file STOP in its directory, which SIGTERM and Ctrl-C make.

`touch RUN/STOP` does it by hand. The loop saves a checkpoint, takes the file away and returns a result with "stopped": true;
the same command continues the run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOP = "STOP"
LOOK_EVERY_S = 1.0  # how often the loop looks for the file; every look costs a small broadcast


@dataclass
class StopRequest:
    signal: int | None = None  # the signal that asked


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C ask the run in `folder` to save a checkpoint and end; a second one ends this process at once."""
    request = StopRequest()
    file = folder / STOP

    def ask(number: int, frame: FrameType | None) -> None:
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
    former = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _clear(folder)


def asked_to_stop(folder: Path) -> bool:
    return (folder / STOP).exists()


def steps_between_looks(steps: int, seconds: float) -> int:
    """LOOK_EVERY_S in steps, given how long the steps so far took."""
    return max(1, int(LOOK_EVERY_S * steps / max(seconds, 1e-9)))


def forget_request(folder: Path) -> None:
    (folder / STOP).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    if (folder / "config.yaml").exists():  # a run's directory, not somebody else's
        forget_request(folder)
