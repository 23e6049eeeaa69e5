"""A followed run on real Ray Train workers that is killed again and again: workers, and the driver."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import partitioned
import pytest
import recording
import torch
import yaml
from partitioned import assert_every_row_once, config_of, index_of
from worlds import run_world, saved_state

from distmtl import loop
from distmtl.config_file import parse_config
from distmtl.distributed.process import process_group
from distmtl.following import Until
from distmtl.following import follow as follow_here

ROWS, STEPS = 4000, 63  # of a day, in steps of 64


def on_ranks(config, source, days):
    with process_group(config) as process:
        return follow_here(config, str(source), loop.train, Until(days), report=lambda record: None, process=process)


def follow(config: Path, source: Path, days: int) -> subprocess.Popen[str]:
    arguments = ["train", str(config), "--follow", str(source), "--partitions", str(days), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "distmtl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(Path(recording.__file__).parent)}, start_new_session=True,
    )  # fmt: skip


def steps_of(log: Path) -> int:
    """That all processes made so far, summed."""
    return sum(file.read_bytes().count(b"\n") for file in log.iterdir())


def workers(run: Path) -> list[int]:
    """The living processes of the partition under way."""
    newest = max((run / "partitions").iterdir(), key=lambda folder: folder.name)
    lines = (newest / "metrics.jsonl").read_text().splitlines() if (newest / "metrics.jsonl").exists() else []
    starts = [json.loads(line) for line in lines if line.startswith('{"kind": "start"')]
    pids = [int(w.rsplit(" ", 1)[1]) for w in starts[-1]["workers"]] if starts else []
    return [p for p in pids if Path(f"/proc/{p}/cmdline").exists() and b"RayTrain" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("days", "kills"), [(2, 2), pytest.param(6, 10, marks=pytest.mark.slow)])
def test_killed_at_random_it_ends_as_if_undisturbed_on_ray(tmp_path, days, kills):
    """SIGKILL of a worker or of the driver at random steps: every row of every partition is trained once, and weights and optimizer state
    of the end are those of two ranks that were left alone, without Ray."""
    draw, source, run, log = random.Random(3), tmp_path / "log", tmp_path / "run", tmp_path / "rows"
    for i in range(days):
        partitioned.write(source, i, rows=ROWS)
    raw = recording.recorded(partitioned.raw(source, run), log)
    raw["cluster"] = {"max_failures": 9}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    process, killed = follow(tmp_path / "config.yaml", source, days), []
    deadline = time.monotonic() + 1500
    for n in range(kills):
        left = (2 * days * STEPS - steps_of(log)) // (kills - n)  # on a busy machine it is seen late how far they are
        at, what = steps_of(log) + draw.randrange(10, max(min(80, left), 11)), draw.choice(["worker", "worker", "driver"])
        while steps_of(log) < at or not (alive := workers(run)):
            assert process.poll() is None and time.monotonic() < deadline, (killed, process.communicate()[0][-3000:])
            time.sleep(0.005)
        killed.append(what)
        if what == "worker":
            os.kill(draw.choice(alive), signal.SIGKILL)
            continue
        process.kill()
        process.communicate()
        while any(p in workers(run) for p in alive):  # they end with their driver
            assert time.monotonic() < deadline, "workers outlive their driver"
            time.sleep(0.1)
        process = follow(tmp_path / "config.yaml", source, days)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:]
    print(killed, [line["restarts"] for line in index_of(parse_config(raw))])

    others = recording.recorded(partitioned.raw(source, tmp_path / "undisturbed"), tmp_path / "others")
    run_world(on_ranks, 2, parse_config(others), source, days)
    states = [saved_state(config_of(parse_config(r), source, days - 1, f"day={days - 1}"), STEPS) for r in (raw, others)]
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []
    assert_every_row_once(run, log, ROWS)
    result = json.loads(out.splitlines()[-1])
    assert (result["partitions"], result["rows"]) == (days, days * ROWS) and result["restarts"] >= kills // 2
