"""Batch scoring by one worker, beside what its pieces do alone on the same rows: is it the model that takes the time?

    distmtl export runs/quickstart --out build/export
    .venv/bin/python -m benchmarks.predict build/export --data data/synthetic/train [--rounds 7] [--out benchmarks/results]

decode    pyarrow reads the columns that the model needs, in blocks, on one thread
model     Predictor on these blocks, decoded before: checks of the rows, lookups, the network
limit     1 / (1/decode + 1/model): one thread does both
predict   the parts as `distmtl predict` writes them: decoded, scored, written; without the start
Rows per CPU second, medians of rounds in turn. Writes predict.json and predict.md; less than a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch

from benchmarks.limit import keep_memory
from benchmarks.record import Record
from distmtl.distributed.process import quieten
from distmtl.serving.batch import BLOCK_ROWS, REJECTED, PartScorer, open_job


def measure(export: str, data: str, rounds: int) -> dict[str, Any]:
    with TemporaryDirectory() as out:
        job = open_job(export, data, out)
        score = PartScorer(job)
        columns = score.predictor.schema.names

        def decode() -> list[pa.Table]:
            blocks = []
            for part in range(len(job.dataset.parts)):
                with job.dataset.open_part(part) as file:
                    batches = file.iter_batches(BLOCK_ROWS, columns=columns, use_threads=False)
                    blocks += [pa.Table.from_batches([batch]) for batch in batches]
            return blocks

        blocks = decode()
        work: dict[str, Callable[[], object]] = {
            "decode": decode,
            "model": lambda: [score.predictor(block) for block in blocks],
            "predict": lambda: [score(part) for part in job.parts],
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        (Path(out) / REJECTED).mkdir()
        for turn in range(rounds + 1):  # the first one warms up
            for name, run in work.items():
                began = time.process_time()
                run()
                if turn:
                    seconds[name].append(time.process_time() - began)
    rows = job.dataset.rows
    speed = {name: rows / statistics.median(of) for name, of in seconds.items()}
    speed["limit"] = 1 / (1 / speed["decode"] + 1 / speed["model"])
    ratios = {"predict / limit": speed["predict"] / speed["limit"], "decode's share of predict": speed["predict"] / speed["decode"]}
    spread = {name: (max(of) - min(of)) / statistics.median(of) for name, of in seconds.items()}
    return {"rows": rows, "rows per CPU second": speed, "ratios": ratios, "spread of the rounds": spread}


def markdown(report: dict[str, Any]) -> str:
    speed = report["rows per CPU second"]
    lines = [f"Batch scoring on one thread, {report['rows']:,} rows.", "", "| work | rows per CPU second |", "|---|---:|"]
    lines += [f"| {name} | {speed[name]:,.0f} |" for name in ("decode", "model", "limit", "predict")]
    lines += ["", *(f"- {name}: {value:.2f}" for name, value in report["ratios"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    keep_memory()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("export", metavar="EXPORT")
    p.add_argument("--data", required=True, metavar="PATH")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = p.parse_args()
    quieten()
    torch.set_num_threads(1)
    record = Record()
    report = measure(a.export, a.data, a.rounds)
    record.write(a.out, "predict", report, markdown, rounds=a.rounds)


if __name__ == "__main__":
    main()
