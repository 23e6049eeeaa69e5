"""Stopping, failing, resubmitting: signals to driver, controller and workers, a lost node, `ray job submit` to several nodes here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from test_ray import last_record, start, write_config
from worlds import train_world

from distmtl.config_file import load_config

LAUNCH = Path(__file__).parents[2] / "launch"
TRAIN = {"global_batch_size": 128, "epochs": 60, "eval_every": 240, "save_every": 60, "log_every": 20}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def long_run(data: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, tiny.raw(data, folder / "run", train=TRAIN))


def wait_for_step(run: Path, step: int, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 180
    while (seen := last_record(run, "train")) is None or seen["step"] < step:
        assert time.monotonic() < deadline and (process is None or process.poll() is None), process and process.communicate()
        time.sleep(0.05)


def undisturbed(config: Path, folder: Path) -> dict:
    return train_world(load_config(config, [f"run.dir={folder / 'undisturbed'}"]), 2)


def test_sigterm_saves_first_and_the_same_command_goes_on(tiny_data, tmp_path):
    config = long_run(tiny_data, tmp_path / "a")
    run = tmp_path / "a" / "run"
    process = start("train", config, "--workers", 2)
    wait_for_step(run, 300, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped = json.loads(out.splitlines()[-1])
    assert stopped["stopped"] is True and 300 <= stopped["steps"] < 1440
    assert (run / "checkpoints" / f"step-{stopped['steps']:09d}-0" / "manifest.json").exists()
    assert not (run / "STOP").exists()
    process = start("train", config, "--workers", 2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert last_record(run, "start")["step"] == stopped["steps"]
    assert json.loads(out.splitlines()[-1])["metrics"] == undisturbed(config, tmp_path)["metrics"]


def test_a_killed_driver_takes_its_workers_along_and_resubmission_resumes(tiny_data, tmp_path):
    config = long_run(tiny_data, tmp_path / "a")
    run = tmp_path / "a" / "run"
    process = start("train", config, "--workers", 2)
    wait_for_step(run, 300, process)
    pids = [int(w.rsplit(" ", 1)[1]) for w in last_record(run, "start")["workers"]]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() and b"RayTrain" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.2)
    process = start("train", config, "--workers", 2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert last_record(run, "start")["step"] >= 240
    assert json.loads(out.splitlines()[-1])["metrics"] == undisturbed(config, tmp_path)["metrics"]


def wait_for_restart(run: Path, process: subprocess.Popen, within: float) -> float:
    """Seconds from now to the first line of a further attempt's training."""
    began, seen = time.monotonic(), len(starts(run))
    while len(starts(run)) == seen or last_record(run, "train")["time"] < starts(run)[-1]["time"]:
        assert time.monotonic() - began < within and process.poll() is None, (
            process.communicate() if process.poll() is not None else "hangs"
        )
        time.sleep(0.1)
    return time.monotonic() - began


def starts(run: Path) -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "start"]


def test_a_worker_that_hangs_is_given_up(tiny_data, tmp_path):
    """SIGSTOP of rank 1; 20 seconds for a collective instead of 300."""
    config = long_run(tiny_data, tmp_path / "a")
    run = tmp_path / "a" / "run"
    process = start("train", config, "cluster.collective_timeout_s=20", "--workers", 2)
    wait_for_step(run, 300, process)
    stopped = int(last_record(run, "start")["workers"][1].rsplit(" ", 1)[1])
    os.kill(stopped, signal.SIGSTOP)
    print(f"recovered {wait_for_restart(run, process, within=120):.1f} s after the hang began")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert not Path(f"/proc/{stopped}").exists()
    assert json.loads(out.splitlines()[-1])["metrics"] == undisturbed(config, tmp_path)["metrics"]


def test_a_killed_controller_is_started_again(tiny_data, tmp_path):
    config = long_run(tiny_data, tmp_path / "a")
    run = tmp_path / "a" / "run"
    process = start("train", config, "--workers", 2)
    wait_for_step(run, 300, process)
    controllers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "TrainController" in " ".join([p.name(), *p.cmdline()])
    ]
    assert len(controllers) == 1
    controllers[0].kill()
    print(f"recovered {wait_for_restart(run, process, within=120):.1f} s after the controller's death")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "Ray's controller died" in out
    assert json.loads(out.splitlines()[-1])["metrics"] == undisturbed(config, tmp_path)["metrics"]


@pytest.fixture
def cluster(tmp_path):
    """Two worker nodes and a head, by launch/local_cluster.sh; yields the environment of a submitter."""
    env = {**os.environ, "CLUSTER_DIR": str(tmp_path / "cluster"), "RAY_PORT": "26479", "RAY_DASHBOARD_PORT": "28365"}
    env.pop("RAY_ADDRESS", None)
    script = str(LAUNCH / "local_cluster.sh")
    started = subprocess.run([script, "start", "2", "1"], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield {**env, **dict(re.findall(r"(RAY_\w+)=(\S+)", started.stdout))}
    finally:
        subprocess.run([script, "stop"], env=env, timeout=120, check=False)


def test_a_lost_node_is_replaced(tiny_data, tmp_path, cluster):
    """kill -9 of all that a worker node runs; a new node comes a few seconds later."""
    config = long_run(tiny_data, tmp_path / "job")
    run = tmp_path / "job" / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "distmtl", "train", str(config), "--workers", "2"],
        env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(run, 300, process)
    script = str(LAUNCH / "local_cluster.sh")
    subprocess.run([script, "kill", "2"], env=cluster, timeout=60, check=True)
    began = time.monotonic()
    subprocess.run([script, "add", "1"], env=cluster, timeout=120, check=True)
    added = time.monotonic() - began
    print(f"recovered {added + wait_for_restart(run, process, within=180):.1f} s after the node's death; the new one took {added:.1f} s")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["metrics"] == undisturbed(config, tmp_path)["metrics"]


def test_ray_job_submit(tiny_data, tmp_path, cluster):
    config = long_run(tiny_data, tmp_path / "job")
    run = tmp_path / "job" / "run"
    submit = [str(LAUNCH / "submit.sh"), str(config), "--workers", "2"]
    # A variable that the session would set too: Ray refuses to merge two values.
    env = {**cluster, "WORKING_DIR": str(tmp_path / "job"), "PASS_ENV": "PYTHONWARNINGS", "PYTHONWARNINGS": "ignore"}

    failed = subprocess.run([*submit, "train.epohcs=1"], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert failed.returncode != 0 and "did you mean 'epochs'" in failed.stdout + failed.stderr

    job = subprocess.Popen(
        submit, env={**env, "RAY_JOB_OPTIONS": "--submission-id first"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(run, 200, job)
    subprocess.run(
        ["ray", "job", "stop", "first"], env={**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}, timeout=180, check=True
    )
    job.communicate(timeout=120)
    stopped = json.loads((run / "result.json").read_text())
    assert stopped["stopped"] is True and stopped["steps"] >= 200

    done = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_record(run, "start")["step"] == stopped["steps"] and "samples/s" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"] == undisturbed(config, tmp_path)["metrics"]
