"""The command line on real Ray Train workers: one is killed, bad data is met in mid-run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from worlds import records, train_world

from distmtl.config_file import load_config


def write_config(folder: Path, raw: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "distmtl", *map(str, arguments)]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)


def last_record(run: Path, kind: str) -> dict | None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return next((r for r in map(json.loads, reversed(lines)) if r["kind"] == kind), None)


def test_a_killed_worker_costs_nothing(tiny_data, tmp_path):
    """kill -9 of rank 1 in mid-run: training resumes by itself and ends with the metrics of the undisturbed run, which is
    made without Ray: both launchers run the same loop."""
    train = {"global_batch_size": 128, "epochs": 60, "eval_every": 240, "save_every": 60, "log_every": 20}
    raw = tiny.raw(tiny_data, tmp_path / "killed", train=train, model={"kind": "mmoe", "num_experts": 3, "expert": [16, 8], "dropout": 0.1})
    config = write_config(tmp_path, raw)
    process = start("train", config, "--workers", 2)
    run = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while (seen := last_record(run, "train")) is None or seen["step"] < 300:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.kill(int(last_record(run, "start")["workers"][1].rsplit(" ", 1)[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((run / "result.json").read_text())
    assert result["restarts"] == 1 and result["world_size"] == 2 and result["steps"] == 60 * 24
    second = last_record(run, "start")
    assert second["step"] >= 240 and second["step"] % 60 == 0
    assert "continuing from" in out

    undisturbed = load_config(config, [f"run.dir={tmp_path / 'undisturbed'}"])
    expected = train_world(undisturbed, 2)
    assert result["metrics"] == expected["metrics"]
    assert (result["rows"], result["best_step"]) == (expected["rows"], expected["best_step"])
    assert records(undisturbed, "train")[-1]["losses"] == last_record(run, "train")["losses"]


def test_bad_data_in_mid_run_ends_the_job_once(tiny_data, tmp_path):
    """An id that no footer shows and no sample meets: one sentence, exit code 1, no restart, no hang."""
    table = tiny.table(6000)
    users = table["user"].to_numpy().copy()
    users[5900] = 100_000
    (tmp_path / "train").mkdir()
    table = table.set_column(table.schema.get_field_index("user"), "user", pa.array(users))
    pq.write_table(table, tmp_path / "train" / "a.parquet", row_group_size=6000, write_statistics=False)
    raw = tiny.raw(tiny_data, tmp_path / "run", data={"train": str(tmp_path / "train")}, train={"global_batch_size": 64, "epochs": 2})
    process = start("train", write_config(tmp_path, raw), "--workers", 2)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "Traceback" not in err
    assert "feature 'user': id 100000" in err and "a.parquet, row 5900" in err and "raise rows" in err
    assert sum(r["kind"] == "start" for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())) == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_of_a_relative_path(tiny_data, tmp_path):
    """It is the command's own directory that `--resume` is relative to, not the workers'."""
    raw = tiny.raw(tiny_data, tmp_path / "first", train={"global_batch_size": 128, "steps": 4})
    train_world(load_config(write_config(tmp_path, raw)), 1)
    process = start("train", "config.yaml", f"run.dir={tmp_path / 'second'}", "--resume", "first", cwd=tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"starting with the weights from {tmp_path / 'first' / 'checkpoints'}" in out


@pytest.mark.parametrize("workers", [2])
def test_torchrun_without_ray(tiny_data, tmp_path, workers):
    config = write_config(tmp_path, tiny.raw(tiny_data, tmp_path / "run"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={workers}",
        "--standalone",
        "-m",
        "distmtl",
        "train",
        str(config),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["world_size"] == workers and result["steps"] == 24
    assert result["metrics"]["validation"]["click"]["rows"] == tiny.ROWS["validation"]
    evaluated = subprocess.run(
        [sys.executable, "-m", "distmtl", "evaluate", str(tmp_path / "run"), "--data", str(tiny_data / "validation")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads(evaluated.stdout.splitlines()[-1])["data"]
    for task, values in result["metrics"]["validation"].items():
        for name, value in values.items():
            assert again[task][name] == pytest.approx(value, abs=1e-6), f"{task}.{name}: train and evaluate disagree"
