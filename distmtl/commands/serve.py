"""`distmtl serve`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from distmtl.commands.arguments import interval, positive, seconds
from distmtl.errors import DistmtlError

HELP = "Score candidates over HTTP, from one export or several side by side, on Ray Serve."
EXAMPLE = "distmtl serve exports/synthetic --port 8000"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("exports", nargs="+", metavar="[NAME=]EXPORT", help="an export, or a folder of published ones: its newest, as it grows")
    p.add_argument("--split", type=shares, metavar="P[,Q…]", help="share of the requests of each version (default: equal)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--replicas", type=positive, default=1, metavar="N", help="processes that score (default: %(default)s)")
    p.add_argument("--fusion", metavar="FILE", help="YAML with the formula of the fused score; read again when it changes")
    p.add_argument("--token-file", metavar="FILE", help="file with the bearer token that requests must have")
    p.add_argument("--max-candidates", type=positive, default=1024, metavar="N", help="of a request (default: %(default)s)")
    p.add_argument(
        "--max-list", type=positive, default=1024, metavar="N", help="elements of a list without max_length (default: %(default)s)"
    )
    p.add_argument("--max-body-kb", type=positive, default=1024, metavar="N", help="of a request (default: %(default)s)")
    p.add_argument(
        "--max-pending", type=positive, default=64, metavar="N", help="may wait in a replica, others get 503 (default: %(default)s)"
    )
    p.add_argument(
        "--batch-wait-ms", type=seconds, default=0.0, metavar="MS",
        help="wait so long for more requests to score together (default: 0, those that came meanwhile)",
    )  # fmt: skip
    p.add_argument("--poll-s", type=interval, default=2.0, metavar="S", help="between two looks for newer exports (default: %(default)s)")
    p.add_argument("--openapi", action="store_true", help="print the OpenAPI schema of the first export and end")


def run(a: argparse.Namespace) -> None:
    from distmtl.serving.app import Settings
    from distmtl.serving.following import described
    from distmtl.serving.request import Limits

    versions: dict[str, str] = {}
    for text in a.exports:
        name, sign, path = text.partition("=")
        name, path = (name, path) if sign and not Path(text).exists() else (os.path.basename(os.path.abspath(text)), text)
        if name in versions:
            raise DistmtlError(f"two exports are called {name!r}; name them: {name}1={versions[name]} {name}2={path}")
        versions[name] = path
    limits = Limits(candidates=a.max_candidates, list=a.max_list, body_kb=a.max_body_kb)
    if a.openapi:
        print(json.dumps(described(Path(next(iter(versions.values()))), limits), indent=1))
        return
    split = a.split or (1 / len(versions),) * len(versions)
    if len(split) != len(versions):
        raise DistmtlError(f"--split has {len(split)} shares for {len(versions)} version(s); give one each")
    settings = Settings(
        versions,
        tuple(share / sum(split) for share in split),
        fusion=a.fusion,
        token=a.token_file,
        limits=limits,
        pending=a.max_pending,
        wait_ms=a.batch_wait_ms,
        poll_s=a.poll_s,
    )
    from distmtl.cluster.serve import serve

    if a.host not in ("127.0.0.1", "localhost", "::1") and not a.token_file:
        print(f"whoever reaches {a.host}:{a.port} may ask: there is no --token-file", file=sys.stderr)
    serve(settings, a.host, a.port, a.replicas, say=lambda text: print(text, flush=True))


def shares(text: str) -> tuple[float, ...]:
    try:
        out = tuple(float(part) for part in text.split(","))
    except ValueError:
        out = ()
    if not out or not all(0 <= share < float("inf") for share in out) or not sum(out):
        raise argparse.ArgumentTypeError(f"{text!r} is not shares with commas between, such as 0.9,0.1")
    return out
