"""Peak memory: training = its tables + their optimizer's state + a constant; what a checkpoint adds; what stays flat as data grows.

    .venv/bin/python -m benchmarks.memory [--out benchmarks/results]

Every figure is VmHWM, the highest resident memory, pages of mapped files included, of a fresh process of one thread. MB are 2^20 bytes.
training  one worker without Ray, with its malloc variables: 4 equal tables of dim 16, row-wise Adagrad, MMoE 4 × [256, 128], 4,096 rows a
          step. constant = peak - rows × (16 + 1) × 4 bytes; then two checkpoints in the background of further steps
flat      the same work on a log and on one of four times the rows (the reader: four epochs of the smaller one, so equally many steps);
          `evaluate` within evaluation.exact_rows, where it keeps every row's scores, and beyond
prepare   the public data sets' raw files, where ../shared/data holds them
Writes memory.json and memory.md; about 3 minutes on 2 quiet cores, 3 GB of memory, 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import Record

TABLES, DIM, STEPS, TASKS = 4, 16, 100, ("click", "buy")
SIZES = (250_000, 1_000_000, 4_000_000, 16_000_000)  # rows of all tables
LOG, WIDE, EXACT = 600_000, 1_048_576, (5_000_000, 200_000)  # rows of a log, of a wide one; evaluation.exact_rows
RAW = Path(__file__).parents[2] / "shared/data"
Row = dict[str, Any]  # of a table of results; numbers are MB


def resident(what: str = "VmHWM") -> float:
    """MB of this program alone; a child's ru_maxrss would begin with its parent's memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def child_training(folder: str, rows: str) -> Row:
    from distmtl import checkpoint
    from distmtl.config_file import parse_config
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress
    from distmtl.saving import Saver

    out = {"imports": resident("VmRSS")}
    raw: Row = {"name": "memory", "data": {"train": f"{folder}/log.parquet"}, "train": {"global_batch_size": 4096, "epochs": 1000}}
    raw["features"] = [{"kind": "id", "name": f"f{i}", "rows": int(rows) // TABLES, "dim": DIM} for i in range(TABLES)]
    raw |= {"model": {"kind": "mmoe", "num_experts": 4, "expert": [256, 128]}, "tasks": [{"kind": "binary", "name": t} for t in TASKS]}
    config = parse_config(raw)
    with process_group(config) as process:
        run = Training(config, process, open_splits(config), Progress(None, False, print))
        run.model.train()
        batches = run.reader.batches(0, 10**6)
        for _ in range(STEPS):
            run.pipeline.progress(batches)
        out["training"] = resident()
        held = [s.tensor for v in checkpoint.table_state(run.model, run.optimizers).values() for s in v.local_shards()]
        assert sum(t.numel() * t.element_size() for t in held) == state_mb(int(rows)) * 2**20
        saver = Saver(Path(folder) / "saved", run.model, run.optimizers, process, attempt=0, background=True, keep=1)
        for step in (1, 2):
            saver.save({"step": step}, None)
            while not saver.job.done():
                run.pipeline.progress(batches)
            saver.wait()
    return out


def child_reader(path: str, epochs: str) -> None:
    from benchmarks.limit import reader_of
    from distmtl.config_file import load_config

    config = load_config(path)
    reader = reader_of(config, config.data.train)
    deque(reader.batches(0, reader.steps_per_epoch * int(epochs)), maxlen=0)


def child_train(config: str, *overrides: str) -> None:
    """Without Ray: something to evaluate."""
    from distmtl import load_config, train

    train(load_config(config, list(overrides)), "never")


def child_distmtl(*arguments: str) -> None:
    from distmtl.__main__ import main as distmtl

    sys.exit(1) if distmtl(arguments) else None


def child(kind: str, *arguments: object, worker: bool = False) -> Row:
    """What `child_{kind}` measured, and the peak, in a process of its own. worker: with the malloc variables of distmtl's workers."""
    from distmtl.cluster.trainer import KEEP_MEMORY

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", kind, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(KEEP_MEMORY if worker else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def state_mb(rows: int) -> float:
    """Of the tables and row-wise Adagrad's one float a row."""
    return rows * (DIM + 1) * 4 / 2**20


def training(folder: Path) -> list[Row]:
    out, rng = [], np.random.default_rng(0)
    for rows in SIZES:
        columns = {f"f{i}": rng.integers(0, rows // TABLES, 200_000) for i in range(TABLES)}
        pq.write_table(pa.table(columns | {t: rng.integers(0, 2, 200_000) for t in TASKS}), folder / "log.parquet", row_group_size=16_384)
        m, state = child("training", folder, rows, worker=True), state_mb(rows)
        shutil.rmtree(folder / "saved")
        out.append({"table rows": rows, "peak": m["training"], "tables + state": state, "constant": m["training"] - state})
        out[-1] |= {"of it imports": m["imports"], "background checkpoints add": m["peak"] - m["training"]}
    return out


def flat(folder: Path) -> list[Row]:
    """Work on the logs {folder}/…1, and …4 of four times the rows."""
    out: list[Row] = []

    def add(work: str, rows: int, *peaks: Row) -> None:
        a, b = (p["peak"] for p in peaks)
        out.append({"work": work, "rows": rows, "peak": a, "peak at 4x": b, "ratio": f"{b / a:.2f}"})
        out[-1]["bytes a row"] = f"{(b - a) * 2**20 / (3 * rows):.1f}"

    for name, rows in (("synth", LOG), ("synth --wide", WIDE)):
        add(f"distmtl {name}", rows, *(child("distmtl", *name.split(), "--rows", n * rows, "--out", folder / f"{name}{n}") for n in (1, 4)))
    wide = (child("reader", folder / f"synth --wide{n}/mmoe.yaml", 4 // n, worker=True) for n in (1, 4))
    add("reader, wide log", WIDE * 8 // 10, *wide)
    for exact in EXACT:
        run = folder / f"run{exact}"
        fields = ("train.steps=5", "data.validation=null", "data.test=null", f"run.dir={run}", f"evaluation.exact_rows={exact}")
        child("train", folder / "synth1/mmoe.yaml", *fields)
        peaks = (child("distmtl", "evaluate", run, "--data", folder / f"synth{n}/train") for n in (1, 4))
        add(f"distmtl evaluate, exact_rows {exact:,}", LOG * 8 // 10, *peaks)
    return out


def prepare(folder: Path) -> list[Row]:
    out = []
    for name in ("census-income", "movielens-1m"):
        if (raw := RAW / name.replace("-", "_")).is_dir():
            out.append({"work": f"distmtl prepare {name}", **child("distmtl", "prepare", name, "--source", raw, "--out", folder / name)})
        else:
            print(f"distmtl prepare {name} is left out: there is no {raw}")
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out, record = p.parse_args().out, Record()
    with TemporaryDirectory() as name:
        report: dict[str, Any] = {"training": training(Path(name)), "flat": flat(Path(name)), "prepare": prepare(Path(name))}
    constants = [row["constant"] for row in report["training"]]
    report["farthest of the constants from their median"] = max(abs(c - statistics.median(constants)) for c in constants)
    record.write(out, "memory", report, markdown)


def markdown(report: dict[str, Any]) -> str:
    lines = ["Peaks of memory, MB of 2^20 bytes.", ""]
    for rows in (r for r in report.values() if isinstance(r, list) and r):
        lines += [f"| {' | '.join(rows[0])} |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
        lines += [f"| {' | '.join(v if isinstance(v, str) else f'{v:,.0f}' for v in row.values())} |" for row in rows] + [""]
    lines += [f"{k}: {v:,.1f}" for k, v in report.items() if isinstance(v, float)]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measured = globals()[f"child_{sys.argv[2]}"](*sys.argv[3:])
        print(json.dumps((measured or {}) | {"peak": resident()}))
    else:
        main()
