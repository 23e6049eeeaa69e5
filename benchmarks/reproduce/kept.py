"""Results of single runs, kept one a line, so that an interrupted reproduction goes on where it was; and the report that they make."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from distmtl.versions import git_commit, versions

Case = tuple[Any, ...]
Measure = Callable[[Case], dict[str, Any]]


def arguments(doc: str | None, name: str, seeds: int) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=seeds)
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--kept", type=Path, default=Path(f"build/reproduce/{name}.jsonl"), help="where single results are kept")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return p


def measured(file: Path, measure: Measure, cases: Iterable[Case], processes: int) -> tuple[dict[Case, dict[str, Any]], list[str]]:
    """case → figures, from the file as far as they are there, else measured and added to it; and the commits that measured them. A line
    cut short counts as not there."""
    cases, found, commits = list(cases), dict[Case, dict[str, Any]](), dict[Case, str]()
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        case = tuple(record["case"])
        found[case], commits[case] = record["figures"], record["git"]
    missing = [case for case in cases if case not in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(processes, _quiet) as pool, file.open("a") as f:
        jobs = ((measure, case) for case in missing)
        for done, (case, figures) in enumerate(pool.imap_unordered(_measure, jobs), 1):
            found[case], commits[case] = figures, str(git_commit())
            line = {"case": case, "figures": figures, "git": commits[case]}
            f.write("\n" * bool(f.tell()) + json.dumps(line, allow_nan=False))
            f.flush()
            print(f"{done} of {len(missing)}: {', '.join(map(str, case))}", flush=True)
    return {case: found[case] for case in cases}, sorted({commits[case] for case in cases})


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _measure(job: tuple[Measure, Case]) -> tuple[Case, dict[str, Any]]:
    measure, case = job
    return case, measure(case)


def write(out: Path, name: str, report: dict[str, Any], lines: list[str], commits: list[str]) -> None:
    """NAME.json and NAME.md, with what they were made by."""
    report["conditions"] = {"git": " and ".join(commits), **versions()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in report["conditions"].items()), ""])
    (out / f"{name}.md").write_text(text)
    print(text)
