"""Memory and speed of `distmtl export` against the size of a table: it must not grow with it.

    .venv/bin/python -m benchmarks.export [--gb 0.25 1 4] [--out benchmarks/results]

For every size a run of one step with one table of that many bytes (dim 16, row-wise Adagrad) is saved, then exported in a fresh process:
peak of anonymous memory (RssAnon, every 10 ms) above what the imports take, and seconds beside those of copying the same bytes with cp.
Writes export.json and export.md; for 4 GB: 15 GB of disk, 10 GB of memory, about 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import Record

DIM = 16
FORMATS = ("fp32", "int8")


def anonymous_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def child_train(folder: str, rows: str) -> None:
    from distmtl import train
    from distmtl.config_file import parse_config

    raw: dict[str, Any] = {"name": "export", "data": {"train": f"{folder}/log.parquet"}, "run": {"dir": f"{folder}/run"}}
    raw["features"] = [{"kind": "id", "name": "user", "rows": int(rows), "dim": DIM}]
    raw |= {"tasks": [{"kind": "binary", "name": "click"}], "model": {"kind": "shared_bottom"}}
    raw["train"] = {"global_batch_size": 1024, "steps": 1, "save_in_background": False}
    train(parse_config(raw), "never", report=lambda record: None)


def child_export(folder: str, row_format: str) -> dict[str, float]:
    from distmtl import export
    from distmtl.exporting import program, table_rows  # noqa: F401  # all that is imported, is now

    peak, done, before = [0.0], threading.Event(), anonymous_mb()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    export(f"{folder}/run", f"{folder}/{row_format}", row_format, say=lambda text: None)  # type: ignore[arg-type]
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    return {"peak": peak[0] - before, "imports": before, "seconds": seconds}


def child(kind: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.export", "--child", kind, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(gb: float, folder: Path) -> list[dict[str, Any]]:
    rows = int(gb * 1e9) // (4 * DIM)
    rng = np.random.default_rng(0)
    table = {"user": rng.integers(0, rows, 4096), "click": rng.integers(0, 2, 4096)}
    pq.write_table(pa.table(table), folder / "log.parquet")
    child("train", folder, rows)
    saved = next((folder / "run/checkpoints").glob("step*/*.distcp"))
    out = []
    for row_format in FORMATS:
        m = child("export", folder, row_format)
        began = time.monotonic()
        subprocess.run(["cp", str(saved), str(folder / "copy")], check=True)
        copying = time.monotonic() - began
        (folder / "copy").unlink()
        size = sum(f.stat().st_size for f in (folder / row_format).glob("tables/*/*"))
        subprocess.run(["rm", "-r", str(folder / row_format)], check=True)
        out.append({"table GB": gb, "rows as": row_format, "export GB": size / 1e9, "peak above imports, MB": m["peak"]})
        out[-1] |= {"seconds": m["seconds"], "seconds to copy the checkpoint": copying}
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a, record, results = p.parse_args(), Record(), []
    for gb in a.gb:
        with TemporaryDirectory() as name:
            results += measure(gb, Path(name))
    lines = ["# distmtl export against the size of a table", "", f"| {' | '.join(results[0])} |", "|---:" * len(results[0]) + "|"]
    lines += [f"| {' | '.join(v if isinstance(v, str) else f'{v:,.2f}' for v in row.values())} |" for row in results]
    record.write(a.out, "export", {"export": results}, lambda report: "\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[f"child_{sys.argv[2]}"](*sys.argv[3:]) or {}))
    else:
        main()
