"""Load on `distmtl serve` while exports are published and a replica is killed: which requests fail, and whether memory grows.

    .venv/bin/python -m benchmarks.serve_load RUN [--minutes 10] [--every 20] [--clients 4] [--replicas 2] [--out benchmarks/results]

RUN has at least two checkpoints (train.keep, train.save_every); they are published in turn every so many seconds, three deltas after a
full export. In the middle one replica gets SIGKILL. Requests have 64 candidates. A request that was under way on the killed replica may
fail: at most one for each client. All answers must be 200, and have the scores of one published model, whole. Memory: RSS of every
replica, a line fitted over the time after its first quarter. Writes serve_load.json and serve_load.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from benchmarks.limit import keep_memory
from benchmarks.record import Record
from benchmarks.servers import REPLICA, Client, Server, bodies, server
from distmtl import Predictor
from distmtl.data.dataset import open_dataset
from distmtl.exporting.publishing import publish, published
from distmtl.run_directory import checkpoint_config, find_checkpoint
from distmtl.serving.comparison import first_rows

N = 64
AFTER_KILL_S = 20.0  # a failure later than that has another cause
FULL_EVERY = 4


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, port: int, sent: list[bytes], clients: int):
        self.port, self.sent, self.stop = port, sent, threading.Event()
        self.latencies: list[float] = []
        self.failures: list[tuple[float, str]] = []
        self.scores: dict[str, dict[int, list[float]]] = {}  # digest → body → the first task's scores
        self.torn = 0
        self.threads = [threading.Thread(target=self._ask, args=(c,)) for c in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        client, i = Client(self.port), number
        while not self.stop.is_set():
            i = (i + 1) % len(self.sent)
            began = time.monotonic()
            try:
                status, answer = client.ask("POST", "/v1/score", self.sent[i])
            except (OSError, http.client.HTTPException) as e:
                self.failures.append((time.monotonic(), type(e).__name__))
                continue
            if status != 200:
                self.failures.append((time.monotonic(), f"{status} {answer[:200].decode(errors='replace')}"))
                continue
            self.latencies.append(time.monotonic() - began)
            got = json.loads(answer)
            scores = next(iter(got["scores"].values()))
            first = self.scores.setdefault(got["digest"], {}).setdefault(i, scores)
            self.torn += not np.allclose(first, scores, atol=1e-5)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def run(path: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    checkpoints = [str(p) for p in sorted(found.path.parent.glob("step*"))][-2:]
    if len(checkpoints) < 2:
        sys.exit(f"{path} has not two checkpoints; train with train.save_every and train.keep")
    publish(checkpoints[0], folder, full_every=FULL_EVERY, say=lambda text: None)
    schema = Predictor(published(folder).full).schema  # type: ignore[union-attr]
    dataset = open_dataset(config.data.test or config.data.train)
    table = first_rows(dataset, schema.names, 40 * N).cast(schema)
    sent = bodies(table, schema.names[: len(schema.names) // 2], N, 32)
    with server(str(folder), "--replicas", str(a.replicas), "--poll-s", "1") as s:
        load, memory, turn, killed, published_now = Load(s.port, sent, a.clients), Memory(s), 0, 0.0, 1
        publisher: subprocess.Popen[bytes] | None = None
        began, next_publish = time.monotonic(), time.monotonic() + a.every
        while (now := time.monotonic()) < began + 60 * a.minutes:
            memory.look(now - began)
            if not killed and now > began + 30 * a.minutes:
                os.kill(s.found(REPLICA)[0].pid, signal.SIGKILL)
                killed = time.monotonic()
            if now >= next_publish:
                turn += 1
                if publisher:
                    publisher.wait()
                publisher = child(checkpoints[turn % 2], str(folder))
                published_now, next_publish = published_now + 1, next_publish + a.every
            time.sleep(1)
        seconds = time.monotonic() - began
        if publisher and publisher.wait():
            sys.exit("a publish failed")
        time.sleep(5)
        load.end()
        metrics = s.get("/metrics")[1].decode()
    near = [f for f in load.failures if killed and killed - 1 <= f[0] <= killed + AFTER_KILL_S]
    reloads = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("distmtl_reloads_total"))
    return {
        "minutes": seconds / 60,
        "requests": len(load.latencies) + len(load.failures),
        "candidates/s": N * len(load.latencies) / seconds,
        "p50 ms": float(np.percentile(load.latencies, 50)) * 1e3,
        "p99 ms": float(np.percentile(load.latencies, 99)) * 1e3,
        "published": published_now,
        "reloads of all replicas": reloads,
        "models seen": len(load.scores),
        "failed around the kill": len(near),
        "failed otherwise": len(load.failures) - len(near),
        "torn": load.torn,
        "failures": [f"{at - began:.1f} s: {what}" for at, what in load.failures[:20]],
        "killed at s": killed - began,
        "memory": memory.report(),
    }


def child(checkpoint: str, folder: str) -> subprocess.Popen[bytes]:
    """A process that publishes, as training would: torch.export holds the interpreter for seconds."""
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "benchmarks.serve_load", "--publish", checkpoint, folder])


class Memory:
    """Of every replica over time."""

    def __init__(self, of: Server):
        self.server = of
        self.seen: dict[int, list[tuple[float, float]]] = {}

    def look(self, second: float) -> None:
        for p in self.server.found(REPLICA):
            try:
                self.seen.setdefault(p.pid, []).append((second, p.memory_info().rss / 2**20))
            except psutil.Error:
                continue

    def report(self) -> list[dict[str, float]]:
        out = []
        for pid, points in self.seen.items():
            late = np.array(points[len(points) // 4 :])
            slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 60 if len(late) > 2 else float("nan")
            out.append({"pid": pid, "first MB": points[0][1], "last MB": points[-1][1], "most MB": max(mb for _, mb in points)})
            out[-1] |= {"MB/minute": slope, "minutes": (points[-1][0] - points[0][0]) / 60}
        return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--every", type=float, default=20, help="seconds between two publishes")
    p.add_argument("--clients", type=int, default=4)
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a, record = p.parse_args(), Record()
    keep_memory()
    with TemporaryDirectory() as name:
        result = run(a.run, a, Path(name) / "published")
    numbers = {k: v for k, v in result.items() if not isinstance(v, list)}
    lines = ["# Serving under load, with reloads and a killed replica", "", "| | |", "|---|---:|"]
    lines += [f"| {k} | {v:,.4g} |" if isinstance(v, float) else f"| {k} | {v:,} |" for k, v in numbers.items()]
    lines += ["", "| replica | first MB | last MB | most MB | MB/minute | minutes |", "|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {i} | {' | '.join(f'{v:,.1f}' for k, v in m.items() if k != 'pid')} |" for i, m in enumerate(result["memory"])]
    lines += ["", *[f"- {failure}" for failure in result["failures"]]]
    record.write(a.out, "serve_load", {"serve_load": result}, lambda report: "\n".join(lines), clients=a.clients, replicas=a.replicas)
    sys.exit(bool(result["failed otherwise"] or result["torn"] or result["failed around the kill"] > a.clients))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--publish"]:
        publish(sys.argv[2], Path(sys.argv[3]), full_every=FULL_EVERY, say=lambda text: None)
    else:
        main()
