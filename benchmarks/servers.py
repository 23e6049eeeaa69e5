"""A `distmtl serve` of its own, on a port of its own, for the benchmarks: its processes, and bodies to send."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pyarrow as pa

REPLICA, PROXY = "ray::ServeReplica", "ray::ProxyActor"


class Server:
    """A running one."""

    def __init__(self, process: subprocess.Popen[bytes], port: int):
        self.process, self.port = process, port

    def found(self, title: str) -> list[psutil.Process]:
        """Its processes of a kind."""
        out = []
        for p in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if p.cmdline()[:1] and p.cmdline()[0].startswith(title):
                    out.append(p)
            except psutil.Error:
                continue
        return out

    def get(self, path: str) -> tuple[int, bytes]:
        return Client(self.port).ask("GET", path)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            OSError, http.client.HTTPException: the connection broke; the next request opens another.
        """
        try:
            self.connection.request(method, path, body)
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise


@contextmanager
def server(*arguments: str, start_s: float = 180) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distmtl", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": "local"}, stdout=subprocess.PIPE)
    try:
        first = process.stdout.readline()  # type: ignore[union-attr]
        if not first.startswith(b"serving"):
            raise SystemExit(f"{' '.join(command)} does not start: {first.decode()}")
        running, until = Server(process, port), time.monotonic() + start_s
        while running.get("/v1/ready")[0] != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait(60)


def bodies(table: pa.Table, context: list[str], n: int, count: int, **more: Any) -> list[bytes]:
    """`count` requests of n candidates from the rows of a table, with the context columns of their first row."""
    out = []
    for i in range(count):
        rows = table.slice(i * n % (table.num_rows - n), n)
        body = {"context": {c: rows[c][0].as_py() for c in context}} | more
        body["candidates"] = {c: rows[c].to_pylist() for c in table.column_names if c not in context}
        out.append(json.dumps(body).encode())
    return out
