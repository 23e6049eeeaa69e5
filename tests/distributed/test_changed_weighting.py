"""The state of a weighting in checkpoints: it goes on bit for bit, and starts anew, alone, where it would mean something else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from worlds import records, run_world, saved_state, train_world

from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate
from distmtl.run_directory import open_run

STATE = "dense/loss.weighting."


def raw(data, run, steps, weighting, **sections):
    out = tiny.raw(data, run, weighting=weighting, **sections)
    out["train"] |= {"steps": steps, "eval_every": 2, "save_every": 2, "keep": 9}
    return out


def config(*args, **sections):
    return parse_config(raw(*args, **sections))


def train(config, resume="auto", policy="strict"):
    """The result, and this rank's state of the weighting at the end."""
    from distmtl import loop

    kept = []
    make = loop.TrainModel

    def watched(*args):
        kept.append(make(*args))
        return kept[-1]

    loop.TrainModel = watched
    loop.train(config, resume, lambda record: None, policy=policy)
    return {name: buffer.clone() for name, buffer in kept[0].loss.weighting.named_buffers()}


@pytest.fixture(scope="module")
def saved(tiny_data, tmp_path_factory):
    """A run of 2 workers under uncertainty weighting, 4 steps."""
    made = config(tiny_data, tmp_path_factory.mktemp("saved") / "run", 4, {"kind": "uncertainty"})
    train_world(made, 2)
    return Path(made.run_dir)


@pytest.mark.parametrize("weighting", [{"kind": "bandit"}, {"kind": "gradnorm"}], ids=lambda w: w["kind"])
def test_a_continued_run_weighs_as_an_uninterrupted_one(tiny_data, tmp_path, weighting):
    """Bit for bit; and the state is the same on every rank, that of the bandit too, which is told the validation loss."""
    whole, halves = (config(tiny_data, tmp_path / name, 10, weighting) for name in ("whole", "halves"))
    ranks = run_world(train, 2, whole)
    run_world(train, 2, config(tiny_data, tmp_path / "halves", 4, weighting))
    run_world(train, 2, halves)
    a, b = saved_state(whole, 10), saved_state(halves, 10)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0])
    assert {k.removeprefix(STATE) for k in a if k.startswith(STATE)} == ranks[0].keys()
    if weighting["kind"] == "bandit":
        assert int((ranks[0]["held"] > 0).sum()) == 4, "four intervals between evaluations, an arm in each"


def test_another_weighting(tiny_data, saved, tmp_path):
    """Refused unless asked for; then its state is new, with a note, and all else is taken over."""
    shutil.copytree(saved, tmp_path / "run")
    changed = config(tiny_data, tmp_path / "run", 6, {"kind": "imtl_l"})
    with pytest.raises(DistmtlError, match="--resume-policy matching") as e:
        open_run(changed, "auto", open_dataset(f"{tiny_data}/train"))
    assert "\n  - weighting.kind: 'uncertainty' there, 'imtl_l' now" in str(e.value)
    run_world(train, 2, changed, "auto", "matching")
    notes = [r["text"] for r in records(changed, "note")]
    assert notes[1:] == ["weighting: its state starts anew: it was uncertainty, is imtl_l"]
    assert [r["step"] for r in records(changed, "start")] == [0, 4]
    state = saved_state(changed, 6)
    assert (state[f"{STATE}updates"] == 2).all() and (state["optimizer/model.head.towers.0.output.bias/step"] == 6).all()
    assert f"{STATE}log_factor" in state and f"{STATE}log_variance" not in state
    without = config(tiny_data, tmp_path / "run", 8, {"kind": "static"})
    run_world(train, 2, without, "auto", "matching")
    assert not any(k.startswith(STATE) for k in saved_state(without, 8))


def test_the_same_weighting_of_a_changed_model(tiny_data, saved, tmp_path):
    """Of the same tasks it goes on; of other tasks, or in another order, it starts anew."""
    notes = []
    for name, change in (
        ("head", {"model": {"kind": "shared_bottom"}}),
        ("tasks", {"tasks": tiny.raw(tiny_data, tmp_path)["tasks"][::-1]}),
    ):
        shutil.copytree(saved, tmp_path / name)
        changed = config(tiny_data, tmp_path / name, 6, {"kind": "uncertainty", "lr": 0.5}, **change)
        run_world(train, 1, changed, "auto", "matching")
        assert (saved_state(changed, 6)[f"{STATE}updates"] == (6 if name == "head" else 2)).all()
        notes.append([r["text"] for r in records(changed, "note") if r["text"].startswith("weighting")])
    assert notes == [[], ["weighting: its state starts anew: it balances tasks that are others, in another order or of other weights, now"]]


@pytest.mark.parametrize("policy", ["strict", "matching"])
def test_weights_to_start_from_bring_no_state(tiny_data, saved, tmp_path, policy):
    for name, weighting in (("other", {"kind": "gradnorm"}), ("same", {"kind": "uncertainty"}), ("none", {"kind": "static"})):
        new = config(tiny_data, tmp_path / name, 2, weighting)
        run_world(train, 1, new, str(saved), policy)
        state = saved_state(new, 2)
        assert (state.get(f"{STATE}updates", torch.tensor(2.0)) == 2).all()
        assert not any("starts anew" in r["text"] or "left behind" in r["text"] for r in records(new, "note"))


def test_a_checkpoint_is_evaluated_without(tiny_data, saved):
    expected = records(config(tiny_data, saved, 4, {"kind": "uncertainty"}), "evaluation")[-1]
    ((found),) = run_world(evaluate, 1, str(saved), None, "validation")
    assert found["validation"]["click"]["logloss"] == pytest.approx(expected["metrics"]["click"]["logloss"], rel=1e-4)
