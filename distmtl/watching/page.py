"""A run as it stands, in some lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmtl.health_page import sparkline
from distmtl.progress import duration, headline, si
from distmtl.reporting.gathering import RunLog, restarts_of
from distmtl.tracking.records import Record
from distmtl.watching.outcome import outcome

BAR, NOTES, SILENT_S = 40, 5, 60.0  # columns of the bar, newest notes shown, seconds without a line after which that is said


def page(log: RunLog, now: float) -> str:
    """
    Args:
        now: Unix time.
    """
    trained = [r for r in log.records if r["kind"] == "train"]
    end = outcome(log)
    out = [*_progress(log, trained[-1] if trained else None, end), ""]
    if trained:
        out += [*_tasks(log, trained), ""]
        out += _figures(log, trained[-1])
    out += _events(log)
    silent = now - max((r["time"] for r in log.events + log.records[-1:] if "time" in r), default=now)
    if silent > SILENT_S and not end:
        out += ["", f"nothing was logged for {duration(silent)}"]
    return "\n".join(out).rstrip()


def _progress(log: RunLog, last: Record | None, end: str | None) -> list[str]:
    state = end or ("training" if last else "starting")
    if last is None:
        return [f"{log.path}: {state}"]
    partition = f", partition {last['partition']}" if "partition" in last else ""
    done = last["step"] - (log.offset if "partition" in last else 0)
    share = min(done / last["of"], 1.0)
    eta = f"   ETA {duration(last['eta_s'])}" if end is None and last["eta_s"] else ""
    bar = "█" * round(share * BAR)
    where = f"step {done:,} of {last['of']:,}, epoch {last['epoch']}, {si(last['rows'])} rows"
    return [f"{log.path}: {state}{partition}", f"{bar:░<{BAR}} {share:4.0%}   {where}{eta}"]


def _tasks(log: RunLog, trained: Sequence[Record]) -> list[str]:
    """Task by task: its training loss, over time, and what the evaluations of every split last said."""
    seen: dict[str, Record] = {r["split"]: r for r in log.records if r["kind"] == "evaluation"}
    losses = trained[-1]["losses"]
    width = max(map(len, losses))
    out = [f"{'':{width}}   {'loss':>8}   over time"]
    for task, loss in losses.items():
        out += [f"{task:{width}}   {_number(loss):>8}   {sparkline([r['losses'].get(task) for r in trained])}"]
    for split, r in seen.items():
        best = " (best so far)" if r.get("best") else ""
        out += ["", f"{split} at step {r['step']:,}: loss {_number(r['loss'])}{best}"]
        out += [f"{task:{width}}   {headline(metrics)}" for task, metrics in r["metrics"].items()]
    return out


def _figures(log: RunLog, last: Record) -> list[str]:
    saved = next((r for r in reversed(log.records) if r["kind"] == "checkpoint"), None)
    text = f"{last['samples_per_second']:,.0f} samples/s   {last['data_wait']:.1%} waiting for data   {last['memory_mb']:,} MiB on rank 0"
    if saved:
        text += f"   checkpoint of step {saved['step']:,}, written in {saved['seconds']:.1f} s"
    return [text]


def _events(log: RunLog) -> list[str]:
    restarts = restarts_of(log.events)
    out = [f"{len(restarts)} restart(s), the last from step {restarts[-1]['step']:,}"] if restarts else ["no restart"]
    notes: list[dict[str, Any]] = [e for e in log.events if e["kind"] == "note"][-NOTES:]
    for note in notes:
        where = f"step {note['step']:,}: " if "step" in note else ""
        out += [f"  {where}{note['text'].splitlines()[0]}"]
    return out


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
