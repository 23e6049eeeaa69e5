"""`distmtl watch`."""

from __future__ import annotations

import argparse

from distmtl.errors import DistmtlError

HELP = "Show a run while it runs: progress, losses, metrics, speed, restarts; on the terminal or as a page in the browser."
EXAMPLE = "distmtl watch runs/quickstart"
PORT = 8765


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("run_dir", metavar="RUN", help="a run's folder, also of a followed run, also in an object store")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="print how it stands, and end")
    how.add_argument("--browser", action="store_true", help="serve its report on the loopback interface, drawn anew as the run goes on")
    p.add_argument("--port", type=int, metavar="N", help=f"of --browser (default: {PORT}; 0: any)")


def run(a: argparse.Namespace) -> int:
    from distmtl.distributed.process import quieten

    if a.port is not None and not a.browser:
        raise DistmtlError("--port is where --browser serves; add that, or leave --port out")
    quieten()
    try:
        if a.browser:
            from distmtl.watching.browser import browse

            end: str | None = browse(a.run_dir, PORT if a.port is None else a.port)
        else:
            from distmtl.watching.terminal import watch

            end = watch(a.run_dir, a.once)
    except KeyboardInterrupt:  # how one stops watching
        return 0
    return int((end or "").startswith("failed"))
