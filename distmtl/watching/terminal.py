"""distmtl watch: a run as it goes on, on a terminal, or as lines where there is none."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from distmtl.progress import print_record
from distmtl.reporting.gathering import RunLog
from distmtl.watching.outcome import outcome
from distmtl.watching.page import page

EVERY_S = 1.0  # that the log is looked at; a look reads what is new


def watch(path: str, once: bool = False) -> str | None:
    """Show it until it ends; returns how.

    Raises:
        DistmtlError: no run there.
    """
    log = RunLog(path)
    if once or not sys.stdout.isatty():
        print(page(log, time.time()), flush=True)
        end = outcome(log)
        return end if once or end else _print_lines(log)
    with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            end = outcome(log)
            live.update(Text(page(log, time.time()), no_wrap=True, overflow="ellipsis"), refresh=True)
            if end:
                return end
            time.sleep(EVERY_S)
            log.refresh()


def _print_lines(log: RunLog) -> str:
    """What is new, as `distmtl train` prints it."""
    while (end := outcome(log)) is None:
        time.sleep(EVERY_S)
        for record in log.refresh():
            print_record(record)
    print(f"{log.path}: {end}", flush=True)
    return end
