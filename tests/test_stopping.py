"""STOP: a run asked to end saves a checkpoint first, on all ranks at the same step, and goes on as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny
from worlds import run_world, train_world

from distmtl import stopping

TRAIN = {"global_batch_size": 128, "epochs": 12, "eval_every": 96, "save_every": 96}


def _train_and_ask(config, step: int):
    from distmtl.loop import train

    def ask(record) -> None:
        if record["kind"] == "train" and record["step"] == step:
            (Path(config.run_dir) / stopping.Request.STOP).touch()

    return train(config, report=ask)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tiny_data, tmp_path):
    config = tiny.config(tiny_data, tmp_path / "stopped", train=TRAIN)
    stopped = run_world(_train_and_ask, 2, config, 100)[0]
    run = tmp_path / "stopped"
    assert stopped["stopped"] is True and 100 <= stopped["steps"] < 288
    assert (run / "checkpoints" / f"step-{stopped['steps']:09d}-0" / "manifest.json").exists() and not (run / "STOP").exists()
    resumed = train_world(config, 2)
    undisturbed = train_world(tiny.config(tiny_data, tmp_path / "undisturbed", train=TRAIN), 2)
    assert resumed["stopped"] is False and resumed["restarts"] == 1
    for key in ("steps", "rows", "best_step", "metrics"):
        assert resumed[key] == undisturbed[key]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_a_signal_asks_and_the_second_ends(run):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    (run / stopping.Request.STOP).touch()  # left over from an attempt that was killed
    with stopping.stop_on_signals(run) as request:
        assert stopping.asked(run) is None
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked(run) == stopping.Request.STOP and request.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stopping.asked(run) is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_before_there_is_a_run_a_signal_ends_at_once(tmp_path):
    with stopping.stop_on_signals(tmp_path / "none"), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert not (tmp_path / "none").exists()


def test_a_foreign_directory_keeps_its_file(tmp_path):
    (tmp_path / stopping.Request.STOP).touch()
    with stopping.stop_on_signals(tmp_path):
        pass
    assert (tmp_path / stopping.Request.STOP).exists()


def test_looks_are_about_a_second_apart():
    assert [stopping.steps_between_looks(*pace) for pace in ((1, 20.0), (100, 10.0), (1000, 1.0))] == [1, 10, 1000]
