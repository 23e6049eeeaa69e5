"""Whether a run that is watched has ended."""

from __future__ import annotations

from distmtl.reporting.gathering import RunLog
from distmtl.run_directory import partition_runs, read_json


def outcome(log: RunLog) -> str | None:
    """`complete`, `stopped`, or `failed` and why; None while it runs, moves to other workers, or is started anew after one's death."""
    last = next((e for e in reversed(log.events) if e["kind"] in ("start", "failed", "stopped", "end")), None)
    if last is None or last["kind"] == "start" or last.get("moves"):
        return None
    if last["kind"] == "failed":
        return f"failed: {last['text']}"
    if last["kind"] == "stopped":
        return "stopped"
    if not partition_runs(log.folder):
        return "stopped" if last["result"]["stopped"] else "complete"
    result = log.folder / "result.json"  # of a followed run; its start writes config.yaml
    if not result.exists() or result.stat().st_mtime < (log.folder / "config.yaml").stat().st_mtime:
        return None
    return "stopped" if (read_json(result) or {}).get("stopped") else "complete"
