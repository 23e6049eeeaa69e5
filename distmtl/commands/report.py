"""`distmtl report`."""

from __future__ import annotations

import argparse

from distmtl.commands.arguments import positive, slices
from distmtl.errors import DistmtlError

HELP = "Write one HTML file with plots of a run, or of several beside each other."
EXAMPLE = "distmtl report runs/quickstart --slices user_id,item_id"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, also of a followed run or one in progress")
    p.add_argument("--out", metavar="FILE", help="(default: RUN/report.html; of several runs, report.html in the working directory)")
    p.add_argument(
        "--rows", type=positive, default=50_000, metavar="N",
        help="of the test or validation split to examine the checkpoint on (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--slices", default="", metavar="FEATURE[,…]", help="metrics by how often training saw the ids of these features, as for evaluate"
    )
    p.add_argument("--no-model", action="store_true", help="without what asks the checkpoint: what the run's directory says, in seconds")


def run(a: argparse.Namespace) -> None:
    from distmtl.distributed.process import quieten
    from distmtl.reporting.report import report

    if a.no_model and a.slices:
        raise DistmtlError("--slices asks the checkpoint, which --no-model leaves alone; take one of them away")
    quieten()
    print(f"report: {report(a.runs, a.out, a.rows, slices(a.slices), model=not a.no_model)}")
