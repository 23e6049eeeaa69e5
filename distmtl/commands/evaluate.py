"""`distmtl evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from distmtl.commands.arguments import first_rank, print_metrics, slices
from distmtl.errors import DistmtlError

HELP = "Per-task metrics of a checkpoint or of a run's best one."
EXAMPLE = "distmtl evaluate runs/synthetic --data data/synthetic/test --slices user_id,item_id:1,10"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    p.add_argument("--data", metavar="PATH", help="Parquet to evaluate on (default: the config's test split)")
    p.add_argument(
        "--slices", default="", metavar="FEATURE[,…]",
        help="metrics also by how often training saw a row's id of a feature (item_id: 0, 1-4, 5-49, 50+ times; item_id:1,10 with other "
        "edges), or by its value (domain=)",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the metrics as JSON")


def run(a: argparse.Namespace) -> None:
    from distmtl.evaluation import evaluate
    from distmtl.run_directory import find_checkpoint, saved_calibrations

    if a.out and not a.out.absolute().parent.is_dir():
        raise DistmtlError(f"--out {a.out}: its folder does not exist")
    found = find_checkpoint(a.path)
    metrics = evaluate(str(found.path), a.data, slices=slices(a.slices))
    if first_rank():
        print(f"checkpoint {found.path} (step {found.step})")
        for task, calibration in saved_calibrations(found).items():
            by = f" by {calibration['slices']}" if calibration["slices"] else ""
            print(f"task {task}: calibrated, {calibration['kind']}{by}")
        print_metrics(metrics)
        if a.out:
            a.out.write_text(json.dumps(metrics, indent=1) + "\n")
        print(json.dumps(metrics))
