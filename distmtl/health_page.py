"""The health of a run as a page for a terminal, from what its metrics.jsonl holds so far (docs/health.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distmtl.errors import DistmtlError
from distmtl.storage import place
from distmtl.tracking.log import LOG, counted, read_log

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS, LABELS = 32, 14  # of a line over time, and before it
FIGURES = (
    ("λ", "lambda"),
    ("loss", "loss"),
    ("calibration", "calibration"),
    ("gradient norm", "gradient_norm"),
    ("gate entropy", "gate_entropy"),
)

Series = list[float | None]  # one value per log line


@dataclass(frozen=True)
class History:
    """A run's log lines up to now; what a failure undid is left out."""

    run_dir: str
    of: int  # steps that the run will have
    steps: list[int]
    tasks: dict[str, dict[str, Series]]  # task → figure → series: loss and those of health.Health that are of one task
    terms: dict[str, Series]  # losses that the head adds
    cosines: dict[str, dict[str, Series]]  # task → later task → series
    load: dict[str, Series]  # of every expert
    gates: dict[str, list[float | None]]  # task → the last mean gate of every expert
    alarms: list[dict[str, Any]]  # step, alarm (its subject), text, stands (still)


def read_history(run_dir: str) -> History:
    """
    Raises:
        DistmtlError: no run there, or it has not logged any health yet.
    """
    log = place(run_dir) / LOG
    if not log.exists():
        raise DistmtlError(f"{run_dir} is no run: it has no metrics.jsonl")
    return history_of(run_dir, counted(read_log(log)))


def history_of(run_dir: str, records: Sequence[dict[str, Any]]) -> History:
    """
    Args:
        records: those that count.

    Raises:
        DistmtlError: there is no health in them.
    """
    trained = [r for r in records if r["kind"] == "train" and r.get("health")]
    alarms = [{k: r[k] for k in ("step", "alarm", "text")} for r in records if "alarm" in r]
    if not trained:
        raise DistmtlError(f"{run_dir} has logged no health yet; it does so every train.log_every steps")
    health, losses = [r["health"] for r in trained], [r["losses"] for r in trained]

    def series(*path: str) -> Series:
        return [_at(h, path) for h in health]

    last: dict[str, Any] = {}
    for h in health:
        last |= h  # the last line that has a figure tells which tasks and experts there are
    names = list(last.get("lambda", {}))
    return History(
        run_dir,
        trained[-1]["of"],
        [r["step"] for r in trained],
        {n: {"loss": [x.get(n) for x in losses], **{f: series(f, n) for _, f in FIGURES if n in last.get(f, {})}} for n in names},
        {n: [x.get(n) for x in losses] for n in losses[-1] if n not in names},
        {a: {b: series("cosine", a, b) for b in others} for a, others in last.get("cosine", {}).items()},
        {e: series("load", e) for e in last.get("load", {})},
        last.get("gate", {}),
        [{**a, "stands": a["alarm"] in last.get("alarms", [])} for a in alarms],
    )


def page(history: History) -> str:
    h = history
    out = [f"{h.run_dir}: step {h.steps[-1]:,} of {h.of:,}, {len(h.steps)} log line(s) since step {h.steps[0]:,}", ""]
    out += [f"  {'':{LABELS}} {'first':>9}   {'last':>9}   over time"]
    for name, figures in h.tasks.items():
        out += [name, *(_row(label, figures[f]) for label, f in FIGURES if f in figures)]
    if h.terms:
        out += ["further losses", *(_row(name, values) for name, values in h.terms.items())]
    if h.cosines:
        out += ["", *_cosines(h.cosines)]
    if h.gates:
        out += ["", *_gates(h)]
    out += ["", "alarms" if h.alarms else "alarms: none"]
    out += [f"  step {a['step']:,}{'' if a['stands'] else ' (no longer)'}: {a['text']}" for a in h.alarms]
    return "\n".join(out)


def _row(label: str, series: Series) -> str:
    known = _known(series)
    first, last = (_number(known[0]), _number(known[-1])) if known else ("-", "-")
    return f"  {label:{LABELS}} {first:>9} → {last:>9}   {sparkline(series)}".rstrip()


def _cosines(cosines: dict[str, dict[str, Series]]) -> list[str]:
    """Pairs in a triangle: last, mean, least."""
    names = [*cosines, *[b for b in list(cosines.values())[-1] if b not in cosines]]
    width, column = max(map(len, names)), max(23, *(len(n) + 2 for n in names))
    out = ["cosine of the tasks' gradients: last, mean (min)", f"  {'':{width}}" + "".join(f"{n:>{column}}" for n in names[1:])]
    for i, a in enumerate(names[:-1]):
        cells = []
        for b in names[1:]:
            known = _known(cosines[a].get(b, [])) if b in names[i + 1 :] else []
            cells.append(f"{_cosine(known[-1])}, {_cosine(sum(known) / len(known))} ({_cosine(min(known))})" if known else "")
        out.append((f"  {a:{width}}" + "".join(f"{c:>{column}}" for c in cells)).rstrip())
    return out


def _gates(h: History) -> list[str]:
    """Tasks × experts in percent, each with a block as high as it; · where a task does not see an expert."""

    def row(name: str, values: Sequence[float | None]) -> str:
        return f"  {name:{width}} " + "".join("     ·" if v is None else f" {_block(v, 0, 1)}{v:4.0%}" for v in values)

    width = max(LABELS, *map(len, h.gates))
    seen = [[float(g is not None) for g in gates] for gates in h.gates.values()]
    fair: list[float | None] = [
        sum(s / sum(of_task) for s, of_task in zip(column, seen, strict=True)) / len(seen) for column in zip(*seen, strict=True)
    ]
    first, last = (
        [next(iter(_known(s)), None) for s in of_experts] for of_experts in (h.load.values(), [s[::-1] for s in h.load.values()])
    )
    return [
        "gates, last: task × expert, mean over rows",
        f"  {'':{width}} " + "".join(f"{e:>6}" for e in h.load),
        *(row(name, values) for name, values in h.gates.items()),
        *(row(name, values) for name, values in (("load, first", first), ("load, last", last), ("fair share", fair))),
    ]


def sparkline(series: Series, columns: int = COLUMNS) -> str:
    """Means of equal stretches between the least and the greatest of them; a gap where nothing is known."""
    n = min(len(series), columns)
    stretches = [_known(series[i * len(series) // n : (i + 1) * len(series) // n]) for i in range(n)]
    means = [sum(s) / len(s) if s else None for s in stretches]
    low, high = min(_known(means), default=0.0), max(_known(means), default=0.0)
    return "".join(" " if m is None else _block(m, low, high) for m in means)


def _block(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 0.0
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]


def _known(series: Sequence[float | None]) -> list[float]:
    return [v for v in series if v is not None]


def _cosine(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no -0.00


def _number(value: float) -> str:
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def _at(record: dict[str, Any], path: Sequence[str]) -> float | None:
    for name in path:
        record = record.get(name) or {}
    return record if isinstance(record, float | int) else None
