"""A run as it stands, in some lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

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
    state, *where = standing(log)
    out = [f"{log.path}: {state}"]
    if trained:
        share = 1.0 if outcome(log) == "complete" else min(_step(log, trained[-1]) / trained[-1]["of"], 1.0)  # early stopping ends it too
        out += [f"{'█' * round(share * BAR):░<{BAR}} {share:4.0%}   {where[0]}", "", *_tasks(log, trained), "", *where[1:]]
    out += _events(log)
    silent = now - max((r["time"] for r in log.events + log.records[-1:] if "time" in r), default=now)
    if silent > SILENT_S and outcome(log) is None:
        out += ["", f"nothing was logged for {duration(silent)}"]
    return "\n".join(out)


def standing(log: RunLog) -> list[str]:
    """Its state; once it trains, where it is, and how fast."""
    last = next((r for r in reversed(log.records) if r["kind"] == "train"), None)
    end = outcome(log)
    if last is None:
        return [end or "starting"]
    state = (end or "training") + (f", partition {last['partition']}" if "partition" in last else "")
    where = f"step {_step(log, last):,} of {last['of']:,}, epoch {last['epoch']}, {si(last['rows'])} rows"
    where += f"   ETA {duration(last['eta_s'])}" if end is None and last["eta_s"] else ""
    speed = f"{last['samples_per_second']:,.0f} samples/s   {last['data_wait']:.1%} waiting for data   {last['memory_mb']:,} MiB on rank 0"
    if saved := next((r for r in reversed(log.records[log.first :]) if r["kind"] == "checkpoint"), None):
        speed += f"   checkpoint of step {_step(log, saved):,}, written in {saved['seconds']:.1f} s"
    return [state, where, speed]


def _step(log: RunLog, record: Record) -> int:
    """Within its partition, if it is of one."""
    return record["step"] - (log.offset if "partition" in record else 0)


def _tasks(log: RunLog, trained: Sequence[Record]) -> list[str]:
    """Task by task: its training loss, over time, and what the evaluations of every split last said."""
    seen: dict[str, Record] = {r["split"]: r for r in log.records if r["kind"] == "evaluation"}
    losses = trained[-1]["losses"]
    width = max(map(len, ("training", *losses)))
    out = [f"{'training':{width}}   {'loss':>8}   over time"]
    for task, loss in losses.items():
        out += [f"{task:{width}}   {_number(loss):>8}   {sparkline([r['losses'].get(task) for r in trained])}"]
    for split, r in seen.items():
        best = " (best so far)" if r.get("best") else ""
        out += ["", f"{split} at step {r['step']:,}: loss {_number(r['loss'])}{best}"]
        out += [f"{task:{width}}   {headline(metrics)}" for task, metrics in r["metrics"].items()]
    return out


def _events(log: RunLog) -> list[str]:
    restarts = restarts_of(log.events)
    out = [f"{len(restarts)} restart(s), the last from step {restarts[-1]['step']:,}"] if restarts else ["no restart"]
    notes = [e for e in log.events if e["kind"] == "note"][-NOTES:]
    for note in notes:
        where = f"step {note['step']:,}: " if "step" in note else ""
        out += [f"  {where}{note['text'].splitlines()[0]}"]
    return out


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
