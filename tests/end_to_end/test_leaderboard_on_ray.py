"""`distmtl leaderboard` on Ray: ended in the middle and continued, a process killed, with a cell that cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny
import yaml
from worlds import train_world

from distmtl.config_file import load_config


def start(board: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "distmtl", "leaderboard", str(board)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": "local"})


def finished(out: Path) -> dict[Path, int]:
    """Results and checkpoints of finished runs → when they were written."""
    runs = [r.parent for r in out.rglob("result.json")]
    return {f: f.stat().st_mtime_ns for run in runs for f in (run / "result.json", *run.glob("checkpoints/*/*"))}


def pids(out: Path) -> set[int]:
    """Of the processes that runs were trained in."""
    logs = [line for log in out.rglob("metrics.jsonl") for line in log.read_text().splitlines() if line.startswith('{"kind": "start"')]
    return {int(json.loads(line)["workers"][0].rsplit(" ", 1)[1]) for line in logs}


def test_a_board_that_is_ended_goes_on(tiny_data, tmp_path):
    data, out = {"test": str(tiny_data / "validation")}, tmp_path / "out"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.raw(tiny_data, tmp_path / "unused", data=data)))
    heads = {kind: {"model": {"kind": kind, "bottom": [8]}} for kind in ("single_task", "shared_bottom")}
    board = {"name": "board", "out": str(out), "data": {"tiny": "base.yaml"}, "heads": heads, "seeds": 2, "select": "click.auc"}
    board |= {"weightings": {"static": {"kind": "static"}, "pcgrad": {"kind": "pcgrad"}}, "overrides": ["train.epochs=4"], "parallel": 2}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(board, sort_keys=False))

    process = start(tmp_path / "board.yaml")
    deadline = time.monotonic() + 120
    while not (out / "leaderboard.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    before = finished(out)
    done = sum(path.name == "result.json" for path in before)
    assert 1 <= done < 6

    process, former = start(tmp_path / "board.yaml"), pids(out)
    while not (new := pids(out) - former):
        assert process.poll() is None and time.monotonic() < deadline + 120, process.communicate()
        time.sleep(0.02)
    os.kill(new.pop(), signal.SIGKILL)  # the run that it is at begins again in another process
    text, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"{done} runs are finished, {6 - done} to train" in text and "[8/8]" in text
    assert before.items() <= finished(out).items(), "a finished run was touched"

    table = json.loads((out / "leaderboard.json").read_text())["data"]["tiny"]
    cells = {f"{c['head']}/{c['weighting']}": c for c in table["cells"]}
    assert cells["single_task/pcgrad"]["rank"] is None and "single_task" in cells["single_task/pcgrad"]["failure"]
    assert all(c["seeds"] == [0, 1] and c["parameters"]["dense"] > 0 for c in cells.values() if not c["failure"]) and len(cells) == 4
    best = max((c for c in cells.values() if c["rank"]), key=lambda c: c["validation"]["mean"])
    assert best["chosen"] and table["chosen"] == f"tiny/{best['head']}/{best['weighting']}" and "chosen by validation click.auc" in text

    run = out / "tiny" / "shared_bottom" / "pcgrad" / "seed-1"  # a run like any other
    alone = train_world(load_config(run / "config.yaml", [f"run.dir={tmp_path / 'alone'}"]), 1)
    assert json.loads((run / "result.json").read_text())["metrics"] == alone["metrics"]
