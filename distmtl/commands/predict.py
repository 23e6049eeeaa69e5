"""`distmtl predict`."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Generator, Sequence

from distmtl.commands.arguments import names, positive

HELP = "Score Parquet with an export, in the same order; bad rows go aside with a reason. The same command continues."
EXAMPLE = "distmtl predict exports/synthetic --data data/synthetic/test --out predictions"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", metavar="EXPORT")
    p.add_argument("--data", required=True, metavar="PATH", help="a file, a folder or a glob, local or remote")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--workers", type=positive, default=1, metavar="N", help="Ray workers; 1: this process alone (default: %(default)s)")
    p.add_argument("--keep", type=names, default=[], metavar="COLUMN[,…]", help="columns of the data to keep")
    p.add_argument(
        "--max-rejected", type=share, default=0.01, metavar="SHARE", help="it stops where more rows cannot be scored (default: %(default)s)"
    )  # fmt: skip


def run(a: argparse.Namespace) -> None:
    from distmtl.distributed.process import quieten
    from distmtl.serving import batch

    def say(text: str) -> None:
        print(text, flush=True)

    def on_ray(job: batch.Job, parts: Sequence[batch.Part]) -> Generator[tuple[batch.Part, batch.Outcome], None, None]:
        from distmtl.cluster.predict import score_on_ray
        from distmtl.cluster.trainer import refuse_fleeting

        refuse_fleeting(a.out, "--out")
        return score_on_ray(job, parts, a.workers, say)

    quieten()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers too; whole parts stay
    job = batch.open_job(a.export, a.data, a.out, a.keep, a.max_rejected)
    print(json.dumps(batch.predict(job, on_ray if a.workers > 1 else batch.in_this_process, say)))


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return number
