"""`distmtl tune` on Ray: a trial that ASHA stops and one that fails; killed in the middle and continued, a trial's process killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from worlds import train_world

from distmtl.config_file import load_config

OPTIMIZERS = [{"dense": {"lr": lr}, "tables": {"lr": lr}} for lr in (1e-9, 1e30)]  # learns nothing; diverges


def write(folder: Path, data: Path, **fields) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny.raw(data, folder / "unused", data={"test": str(data / "validation")})))
    search = {"config": "base.yaml", "out": "out", "metric": "click.auc", **fields}
    (folder / "search.yaml").write_text(yaml.safe_dump(search, sort_keys=False))
    return folder / "search.yaml"


def start(search: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "distmtl", "tune", str(search)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=search.parent, env={**os.environ, "RAY_ADDRESS": "local"}, **pipes)


def found(out: Path) -> dict:
    return json.loads((out / "tune.json").read_text())


def log(run: Path) -> list[dict]:
    """A run's records, but for a line that is being written."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_one_is_stopped_and_one_fails(tiny_data, tmp_path):
    space = {"optimizer": {"choice": OPTIMIZERS}}
    search = write(tmp_path, tiny_data, trials=3, parallel=1, space=space, overrides=["train.epochs=3"], scheduler={"reduction": 2})
    process = start(search)
    text, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    tune = found(tmp_path / "out")
    good, *others = tune["trials"]
    idle, wild = sorted(others, key=lambda t: t["point"]["optimizer"]["dense"]["lr"])
    assert (good["state"], good["evaluations"], tune["best"]) == ("finished", 3, 0) and good["validation"] > 0.7
    assert idle["ended"] == "stopped by asha at step 24 of 72" and idle["validation"] < good["validation"], "at the first evaluation"
    ends = [[r["kind"] for r in log(tmp_path / "out" / "trials" / f"{t['trial']:03d}")][-1] for t in (good, idle, wild)]
    assert ends == ["end", "stopped", "failed"]
    assert wild["ended"].startswith("failed: step 1: the loss of") and wild["validation"] is None and not err
    assert all(
        e["split"] == "validation" for n in range(3) for e in log(tmp_path / "out" / "trials" / f"{n:03d}") if e["kind"] == "evaluation"
    )
    validation = json.loads((tmp_path / "out" / "trials" / "000" / "result.json").read_text())["metrics"]["validation"]
    assert tune["tests"] == {"0": validation}, "its test split is its validation split here"
    assert "3 trials in" in text and "[3/3] trial" in text and "best by validation click.auc: trial 0" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["best.yaml", "trials", "tune.json", "tune.md"]

    best = load_config(tmp_path / "out" / "best.yaml", [f"run.dir={tmp_path / 'alone'}"])
    assert train_world(best, 1)["metrics"]["validation"] == validation


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_that_is_killed_goes_on(tiny_data, tmp_path):
    space = {"model.num_experts": {"int": [2, 6]}, "optimizer.dense.lr": {"loguniform": [1e-4, 1e-1]}}
    out = tmp_path / "out"
    search = write(
        tmp_path, tiny_data, trials=6, parallel=2, space=space, overrides=["train.epochs=12"], scheduler={"reduction": 2, "grace": 2}
    )

    process, deadline = start(search), time.monotonic() + 600
    while not (out / "tune.json").exists() or sum(t["state"] != "waiting" for t in found(out)["trials"]) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = found(out)["trials"]
    ended = [t["trial"] for t in before if t["state"] != "waiting"]
    logs = {n: (out / "trials" / f"{n:03d}" / "metrics.jsonl").read_bytes() for n in ended}
    time.sleep(10)  # the trials' processes see that their driver is gone, and end

    former = {n: len(log(out / "trials" / f"{n:03d}")) for n in range(6)}
    process = start(search)
    while not (new := [n for n in range(6) if len(log(out / "trials" / f"{n:03d}")) > former[n] + 1]):
        assert process.poll() is None and time.monotonic() < deadline + 600, process.communicate()
        time.sleep(0.02)
    begin = [r for r in log(out / "trials" / f"{new[0]:03d}") if r["kind"] == "start"][-1]
    os.kill(int(begin["workers"][0].rsplit(" ", 1)[1]), signal.SIGKILL)  # that trial goes on in another process
    text, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert int(re.search(r"(\d+) to train", text)[1]) <= 6 - len(ended) and "[6/6]" in text  # another may have ended before the kill
    trials = found(out)["trials"]
    assert [trials[n] for n in ended] == [before[n] for n in ended]
    assert {n: (out / "trials" / f"{n:03d}" / "metrics.jsonl").read_bytes() for n in ended} == logs, "what had ended was touched"
    assert {t["state"] for t in trials} == {"finished", "stopped"}
    best = max((t for t in trials if t["state"] == "finished"), key=lambda t: t["validation"])
    assert found(out)["best"] == best["trial"] and best["validation"] == max(t["validation"] for t in trials)

    for trial in trials:  # as a run that nobody cut off
        if trial["state"] == "finished":
            run = out / "trials" / f"{trial['trial']:03d}"
            alone = train_world(load_config(run / "config.yaml", [f"run.dir={tmp_path / 'alone' / run.name}"]), 1)
            assert json.loads((run / "result.json").read_text())["metrics"] == alone["metrics"]

    again = start(search)
    text, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "0 to train" in text and found(out)["trials"] == trials
