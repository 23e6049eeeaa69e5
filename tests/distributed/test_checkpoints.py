"""Checkpoints written in the background, and what happens when writing them fails or what was written is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
from worlds import records, run_world, saved_state, train_world

from distmtl import checkpoint
from distmtl.checkpoint import writing
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate

STEPS, SAVE_EVERY = 12, 4


def config(data, run, steps=STEPS, **train):
    return tiny.config(
        data,
        run,
        tables={"user": {"sharding": ["row_wise"]}, "item": {"sharding": ["table_wise"]}},
        model={"kind": "mmoe", "num_experts": 3, "expert": [16, 8], "dropout": 0.3},
        train={
            "global_batch_size": 128, "log_every": 1, "steps": steps, "save_every": SAVE_EVERY, "eval_every": 100, "keep": 9, **train,
        },
    )  # fmt: skip


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def wait_until_trained(run: Path, step: int) -> None:
    deadline = time.monotonic() + 20
    while f'"step": {step}, "of"' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, "training waits for its checkpoint"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory):
    """The config of a run that wrote its checkpoints while training waited."""
    c = config(tiny_data, tmp_path_factory.mktemp("plain") / "run", save_in_background=False)
    train_world(c, 2)
    return c


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_in_the_background(tiny_data, tmp_path, plain, monkeypatch):
    """Training goes on while a checkpoint is written, and up to the next one it changes nothing: not the losses, not a bit of any
    checkpoint. The next one waits for the one before; all are written, and said."""
    write, run = checkpoint.write, tmp_path / "run"

    def slow(path, state, group):
        if (step := step_of(path)) < STEPS:  # all steps up to the next checkpoint are made while this one is not yet written
            wait_until_trained(run, step + SAVE_EVERY)
        return write(path, state, group)

    monkeypatch.setattr(checkpoint, "write", slow)
    c = config(tiny_data, run)
    train_world(c, 2)
    assert names(run) == [f"step-{s:09d}-0" for s in (4, 8, 12)]
    for step in (4, 8, 12):
        assert same(saved_state(plain, step), saved_state(c, step)), f"step {step}"
    assert [r["losses"] for r in records(plain, "train")] == [r["losses"] for r in records(c, "train")]
    assert [r["step"] for r in records(c, "checkpoint")] == [4, 8, 12]


def test_without_background_training_waits(plain):
    """What the test before would see if it saw nothing: here every checkpoint is said before the next step."""
    said = [(r["kind"], r["step"]) for r in map(json.loads, (Path(plain.run_dir) / "metrics.jsonl").read_text().splitlines())]
    for step in (4, 8):
        assert said.index(("train", step)) < said.index(("checkpoint", step)) < said.index(("train", step + 1))


def refusal(config):
    from distmtl.loop import train

    try:
        train(config, report=lambda record: None)
    except DistmtlError as e:
        return str(e)
    return None


def test_a_full_disk_ends_all_ranks_with_one_sentence(tiny_data, tmp_path, plain, monkeypatch):
    """The second rank's file is /dev/full. The checkpoint before stays, what there is of the failed one goes; the next start continues."""
    prepare = checkpoint.prepare

    def full(path):
        prepare(path)
        if step_of(path) == 8:
            (path / "__1_0.distcp").symlink_to("/dev/full")

    c = config(tiny_data, tmp_path / "run")
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "prepare", full)
        said = run_world(refusal, 2, c)
    path = tmp_path / "run" / "checkpoints" / "step-000000008-0"
    assert said == [f"checkpoint {path} could not be written: [Errno 28] No space left on device"] * 2
    assert names(tmp_path / "run") == ["step-000000004-0"]
    train_world(c, 2)
    assert [r["step"] for r in records(c, "start")] == [0, 4]
    assert same(saved_state(plain, 12), saved_state(c, 12))


def mounted(size: str, folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_disk_that_is_really_full(tiny_data, tmp_path):
    """Nothing can be written any more, progress included: the last whole checkpoint is what a start continues from when there is space."""
    disk = tmp_path / "disk"
    if os.geteuid() or not mounted("1m", disk):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        c = config(tiny_data, disk / "run", save_every=1)
        said = run_world(refusal, 2, c)
        assert said[0] == said[1] and "could not be written" in said[0] and "No space left on device" in said[0]
        written = names(disk / "run")
        assert len(written) > 1 and all((disk / "run" / "checkpoints" / n / "manifest.json").exists() for n in written)
        records(c, "train")  # all of its lines are JSON
        assert mounted("16m", disk, "remount")
        train_world(c, 2)
        assert f"{records(c, 'start')[-1]['step']:09d}" in written[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_rank_killed_while_writing(tiny_data, tmp_path, plain, monkeypatch):
    """No manifest, no checkpoint: the next start says so and takes the one before. The survivor ends soon, its own write unfinished."""
    write = checkpoint.write

    def dying(path, state, group):
        if step_of(path) == 8 and os.environ["RANK"] == "1":
            (path / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, state, group)

    c = config(tiny_data, tmp_path / "run")
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write", dying)
        with pytest.raises(RuntimeError, match="rank 1 of 2 died"):
            run_world(refusal, 2, c, timeout_s=30)
    assert names(tmp_path / "run") == ["step-000000004-0", "step-000000008-0"]
    train_world(c, 2)
    path = tmp_path / "run" / "checkpoints" / "step-000000008-0"
    assert f"checkpoint {path} is incomplete: it has no manifest.json" in [r["text"] for r in records(c, "note")]
    assert names(tmp_path / "run") == ["step-000000004-0", "step-000000008-1", "step-000000012-1"], "what was half-written is gone"
    assert same(saved_state(plain, 12), saved_state(c, 12))


def hanging(config, folder):
    """The second rank stops answering while the last checkpoint is written; what the first one makes of it is written down."""
    import torch.distributed as dist

    from distmtl.loop import train

    write, rank = checkpoint.write, int(os.environ["RANK"])

    def stop(path, state, group):
        if rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(path, state, group)

    checkpoint.write = stop  # this process ends here
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=3))
    try:
        train(config, report=lambda record: None)
    except RuntimeError as e:
        (folder / "said").write_text(str(e))
    finally:
        os.kill(pids[1], signal.SIGKILL)


def test_a_rank_that_hangs_while_writing(tiny_data, tmp_path):
    """Ranks that have nothing left to do but to wait notice it as soon as in a step, not when the writer's six hours are over."""
    with pytest.raises(RuntimeError, match="rank 1 of 2 died"):
        run_world(hanging, 2, config(tiny_data, tmp_path / "run", steps=3), tmp_path, timeout_s=30)
    assert "Timed out waiting 3000ms" in (tmp_path / "said").read_text()


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_of_a_checkpoint_that_changed(tiny_data, tmp_path, plain, workers):
    """Right sizes, wrong bytes: torch would load them. All ranks pass it over, say why, and take the one before."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", plain.run_dir, run], check=True)
    c = config(tiny_data, run, steps=13)
    newest = run / "checkpoints" / "step-000000012-0"
    flip(newest / "__1_0.distcp")
    with pytest.raises(DistmtlError, match=r"step-000000012-0 is damaged: __1_0.distcp has CRC-32 [0-9a-f]{8} instead of"):
        run_world(evaluate, 1, str(newest), None, "validation")
    train_world(c, workers)
    assert records(c, "start")[-1]["step"] == 8
    assert any("step-000000012-0 is damaged: __1_0.distcp has CRC-32" in r["text"] for r in records(c, "note"))


def test_a_run_that_cannot_begin_says_so_in_its_log(tiny_data, tmp_path, plain):
    """Whoever watches it learns of its end, also before the first step."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", plain.run_dir, run], check=True)
    for part in (run / "checkpoints").glob("*/__0_0.distcp"):
        flip(part)
    c = config(tiny_data, run, steps=13)
    with pytest.raises(DistmtlError, match="is damaged"):
        train_world(c, 2)
    assert len(failed := records(c, "failed")) == 1 and "is damaged" in failed[0]["text"]


def test_only_whole_checkpoints_count_as_kept(tmp_path):
    """What is incomplete is no reason to delete a whole one; what is not ours stays."""
    for step in (1, 2, 3, 4, 5):
        checkpoint.prepare(tmp_path / checkpoint.name_of(step, 0))
        if step != 4:
            checkpoint.commit(tmp_path / checkpoint.name_of(step, 0), {"step": step})
    (tmp_path / "step-3-of-mine").mkdir()
    checkpoint.retain(tmp_path, 2, 1, tmp_path / checkpoint.name_of(5, 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(checkpoint.name_of(s, 0) for s in (1, 3, 5)), "step-3-of-mine"]


def test_ranks_that_do_not_share_a_disk(tmp_path, monkeypatch):
    """What another rank wrote and rank 0 cannot see is not there: no checkpoint, rather than half of one."""
    monkeypatch.setattr(writing, "VISIBLE_WITHIN_S", 0.0)
    checkpoint.prepare(path := tmp_path / checkpoint.name_of(1, 0))
    (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(DistmtlError, match="rank 0 does not see __1_0.distcp, which another rank has written; run.dir must be on storage"):
        checkpoint.commit(path, {"step": 1}, {"__0_0.distcp": 1, "__1_0.distcp": 2})
    assert not (path / "manifest.json").exists()
