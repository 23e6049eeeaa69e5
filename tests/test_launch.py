"""What an operator runs or edits: scripts parse and say how they are used, YAML has the parts its reader wants."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from distmtl.__main__ import parse

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RAYJOB = yaml.safe_load((LAUNCH / "kuberay" / "rayjob.yaml").read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    asked = subprocess.run([script], capture_output=True, text=True, check=False)
    assert asked.returncode == 2 and f"launch/{script.name}" in asked.stdout


def test_submit_says_what_a_job_is_given(tmp_path):
    """The command that submit.sh builds, seen by a `ray` that only prints its arguments."""
    for file in ("launch/submit.sh", ".venv/bin/ray"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "launch" / "submit.sh").write_text((LAUNCH / "submit.sh").read_text())
    (tmp_path / ".venv" / "bin" / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / ".venv" / "bin" / "ray").chmod(0o755)
    command = "bash launch/submit.sh my.yaml --workers 2 run.dir=/shared/my"
    environment = {"PATH": "/usr/bin:/bin", "PASS_ENV": "REGION", "REGION": 'a "b"', "RAY_JOB_OPTIONS": "--no-wait --submission-id x"}
    said = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[:4] == ["job", "submit", "--working-dir", "."]
    assert said[6:] == ["--no-wait", "--submission-id", "x", "--", "distmtl", "train", "my.yaml", "--workers", "2", "run.dir=/shared/my"]
    given = yaml.safe_load(said[5])
    assert given["env_vars"] == {"REGION": 'a "b"', "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert "/data" in given["excludes"] and "data" not in given["excludes"]  # distmtl/data goes along


def test_rayjob_is_one():
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = RAYJOB["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert all(isinstance(v, str) for v in head["rayStartParams"].values()) and head["rayStartParams"]["num-cpus"] == "0"
    for pod in (head["template"]["spec"], workers["template"]["spec"]):
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"] and mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_rayjob_runs_a_command_that_its_workers_can_hold():
    arguments = parse(shlex.split(RAYJOB["spec"]["entrypoint"])[1:])
    assert arguments.command == "train" and arguments.overrides == ["run.dir=/shared/runs/mine"]
    (workers,) = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cpus = workers["replicas"] * int(workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert int(arguments.workers) == cpus and workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_versions_agree():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (LAUNCH.parent / "constraints.txt").read_text(), re.MULTILINE))
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]
    assert re.findall(r"torchrec==([\d.]+)", (LAUNCH / "Dockerfile").read_text()) == re.findall(
        r"^TORCHREC := torchrec==([\d.]+)", (LAUNCH.parent / "Makefile").read_text(), re.MULTILINE
    )


def test_ray_up_passes_ray_s_own_check():
    """Ray's schema of a cluster file."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((LAUNCH / "ray_up.yaml").read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local"
