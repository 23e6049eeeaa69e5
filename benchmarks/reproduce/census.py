"""Census-Income (KDD), the benchmark of the MMoE and PLE papers: income > 50K and never married, beside what was published.

    .venv/bin/python -m benchmarks.reproduce.census --source ~/census [--protocols P1 P2] [--seeds 5] [--processes 2] [--out …]

P1 leaves out education and marital status (Ma et al. 2018, Tang et al. 2020), P2 marital status alone (torch-rechub's readme);
the official test set is halved into validation and test. Heads, widths and optimizer are those of `distmtl prepare
census-income`, none tuned for this; alone is a run per task, with a shared bottom's network. Checkpoints are chosen on the
validation split. Test AUC, means over seeds of the weights.

Prepared data lie in data/census-P1 and data/census-P2, single results in build/reproduce/census.jsonl: start it again and it
goes on. Writes census.json and census.md. 65 runs, about half an hour on 2 quiet cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.intervals import Interval, difference, interval, table
from benchmarks.reproduce.heads import prepared, train_and_test
from benchmarks.reproduce.kept import Case, arguments, measured, write

DATA = "data/census-{}"
TASKS = ("income", "never_married")
BOTTOM = {"kind": "shared_bottom", "bottom": [256, 128], "dropout": 0.3}
HEADS: dict[str, dict[str, Any]] = {
    **{f"alone: {t}": {"model": BOTTOM, "tasks": [{"kind": "binary", "name": t}]} for t in TASKS},
    "shared bottom": {"model": BOTTOM},
    "OMoE": {"model": {"kind": "omoe", "num_experts": 8, "expert": [128, 64], "dropout": 0.3}},
    "MMoE": {},
    "PLE": {"model": {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 2, "expert": [128], "dropout": 0.3}},
}
AITM = {  # torch-rechub's use of it: neither comes before the other, the one attends to what the other passes on
    "model": {"kind": "aitm", "bottom": [256, 128], "dropout": 0.3, "calibrator": 0.0},
    "tasks": [
        {"kind": "binary", "name": "income", "parents": ["never_married"], "space": "labelled"},
        {"kind": "binary", "name": "never_married"},
    ],
}
OF = {"P1": HEADS, "P2": {**HEADS, "AITM": AITM}}

PUBLISHED: dict[str, dict[str, dict[str, tuple[float, float]]]] = {  # protocol → source → head → AUC of both tasks
    "P1": {
        "Ma et al. 2018, mean of 400 runs": {
            "alone": (0.9337, 0.9922), "shared bottom": (0.9295, 0.9921), "OMoE": (0.9319, 0.9923), "MMoE": (0.9359, 0.9927),
        },
        "Ma et al. 2018, best for income": {
            "alone": (0.9398, 0.9933), "shared bottom": (0.9361, 0.9915), "OMoE": (0.9387, 0.9928), "MMoE": (0.9410, 0.9926),
        },
        "Tang et al. 2020": {"alone": (0.9445, 0.9923), "MMoE": (0.9393, 0.9928), "PLE": (0.9522, 0.9945)},
        "PaddleRec's readme, best epoch": {"shared bottom": (0.9499, 0.9938), "MMoE": (0.9494, 0.9942)},
    },
    "P2": {
        "torch-rechub's readme": {
            "shared bottom": (0.9560, 0.9948), "MMoE": (0.9579, 0.9950), "PLE": (0.9583, 0.9951), "AITM": (0.9595, 0.9951),
        },
    },
}  # fmt: skip
CLAIMS = [  # head, what it beats, in which protocols
    ("MMoE", "alone", "P1"),
    ("MMoE", "shared bottom", "P1 P2"),
    ("MMoE", "OMoE", "P1"),
    ("PLE", "alone", "P1"),
    ("PLE", "MMoE", "P1 P2"),
    ("AITM", "PLE", "P2"),
]


def measure(case: Case) -> dict[str, float]:
    """Protocol, head, seed → task → test AUC."""
    protocol, head, seed = case
    metrics = train_and_test(f"{DATA.format(protocol)}/mmoe.yaml", seed, OF[protocol][head])
    return {task: of["auc"] for task, of in metrics.items() if task in TASKS}


def reached(ours: Interval, published: float) -> str:
    return {1: "above", 0: "reached", -1: "below"}[ours.side(published)]


def section(protocol: str, runs: dict[str, list[dict[str, float]]]) -> tuple[dict[str, Any], list[str]]:
    report, rows = table(runs, "alone")
    seeds = len(runs["alone"])
    lines = ["", f"## {protocol}, {seeds} seeds", "", *rows, "", "Published, and where the interval of ours lies:", ""]
    lines += [f"| | head | {' | '.join(TASKS)} |", "|---" * (2 + len(TASKS)) + "|"]
    for source, heads in PUBLISHED[protocol].items():
        for head, aucs in heads.items():
            cells = [f"{auc:.4f}: {reached(interval([r[t] for r in runs[head]]), auc)}" for t, auc in zip(TASKS, aucs)]
            lines.append(f"| {source} | {head} | {' | '.join(cells)} |")
    lines += ["", "| claim | task | difference | verdict |", "|---|---|---|---|"]
    for head, other, protocols in CLAIMS:
        for task in TASKS if protocol in protocols.split() else ():
            gain = difference(*([r[task] for r in runs[h]] for h in (head, other)))
            verdict = {1: "reproduced", 0: "not reproduced: no difference beyond the interval", -1: "not reproduced: the opposite"}[
                gain.side()
            ]
            lines.append(f"| {head} is better than {other} | {task} | {gain.text(4, '+')} | {verdict} |")
    return report, lines


def main() -> None:
    p = arguments(__doc__, "census", seeds=5)
    p.add_argument("--source", type=Path, help="folder with the raw files, to prepare the data from")
    p.add_argument("--protocols", nargs="+", choices=OF, default=list(OF))
    a = p.parse_args()
    for protocol in a.protocols:
        prepared("census-income", a.source, Path(DATA.format(protocol)), protocol=protocol)
    found, commits = measured(a.kept, measure, [(q, h, s) for q in a.protocols for s in range(a.seeds) for h in OF[q]], a.processes)
    report: dict[str, Any] = {"protocols": {}}
    lines = [
        "# Census-Income",
        "",
        "`python -m benchmarks.reproduce.census`; test AUC, mean over the seeds with its 95 % interval; differences are paired.",
    ]
    for q in a.protocols:
        runs = {h: [found[q, h, s] for s in range(a.seeds)] for h in OF[q]}
        alone = [runs.pop(f"alone: {t}") for t in TASKS]
        report["protocols"][q], text = section(q, {"alone": [first | second for first, second in zip(*alone)], **runs})
        lines += text
    write(a.out, "census", report, lines, commits)


if __name__ == "__main__":
    main()
