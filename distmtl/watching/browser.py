"""distmtl watch --browser: the report of a run as a page that loads itself again while the run goes on.

It is drawn in the watcher's process, from files alone: the run does not notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from distmtl.errors import DistmtlError
from distmtl.reporting.gathering import RunLog, names_of, run_of
from distmtl.reporting.report import page_in_progress
from distmtl.watching.outcome import outcome
from distmtl.watching.page import standing
from distmtl.watching.terminal import EVERY_S

REDRAW_S = 15.0  # at most this often, and only when there is something new; a page asks this often


def browse(path: str, port: int, say: Callable[[str], None] = print, redraw_s: float = REDRAW_S) -> str:
    """Serve it on the loopback interface until the run has ended and its last page was fetched; returns how it ended.

    Args:
        port: 0 takes any.

    Raises:
        DistmtlError: no run there, or the port is taken.
    """
    log, name = RunLog(path), names_of([path])[0]
    end = outcome(log)

    def draw() -> str:
        return page_in_progress(run_of(log, name), standing(log), None if end else redraw_s)

    pages = Pages(draw())
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), pages.handler())
    except (OSError, OverflowError) as e:
        raise DistmtlError(f"port {port}: {getattr(e, 'strerror', e)}; choose another with --port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f"http://127.0.0.1:{server.server_port}/ shows {path}, drawn anew at most every {redraw_s:g} s; Ctrl-C ends it")
    try:
        drawn, new = time.monotonic(), False
        while end is None:
            time.sleep(min(EVERY_S, redraw_s))
            new = bool(log.refresh()) or new
            end = outcome(log)
            if end or (new and time.monotonic() - drawn >= redraw_s):
                pages.show(draw())
                drawn, new = time.monotonic(), False
        say(f"{path}: {end}; the last page stays until it is fetched, or for {2 * redraw_s:g} s")
        pages.fetched.wait(2 * redraw_s)
        return end
    finally:
        server.shutdown()
        server.server_close()


class Pages:
    """The page to answer with."""

    def __init__(self, html: str):
        self.fetched = threading.Event()  # whether anybody has the newest one
        self.html = html.encode()

    def show(self, html: str) -> None:
        self.html = html.encode()
        self.fetched.clear()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/":
                    self.send_error(404)
                    return
                body = pages.html
                with suppress(ConnectionError):  # the browser's window was closed
                    self.send_response(200)
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                    self.send_header("Content-Length", str(len(body)))
                    self.send_header("Cache-Control", "no-store")
                    self.end_headers()
                    self.wfile.write(body)
                    if body is pages.html:
                        pages.fetched.set()

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
