"""One contract for every way of weighting, on two workers: the same as one process that lays the tasks' gradients side by side."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from worlds import run_world, saved_state, train_world

from distmtl.config import Config, WeightingConfig
from distmtl.config_file import parse_config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.evaluation import evaluate
from distmtl.loop import Training
from distmtl.model import loss
from distmtl.model.loss import StepNumbers
from distmtl.model.weighting import Weighting, make_weighting
from distmtl.model.weighting.weighting import Seen, State
from distmtl.progress import Progress
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import ShortRun, short_run

KINDS = {kind: c for c in get_args(get_args(WeightingConfig)[0]) for kind in get_args(c.model_fields["kind"].annotation)}
MMOE = {"kind": "mmoe", "num_experts": 3, "expert": [16, 8]}
HEADS = {
    "shared_bottom": {"kind": "shared_bottom", "bottom": [16, 8]},
    "mmoe": MMOE,
    "ple": {"kind": "ple", "num_levels": 2, "shared_experts": 1, "task_experts": 1, "expert": [8]},
    "esmm": {"kind": "esmm", "network": MMOE},
    "stem": {"kind": "stem", "shared_experts": 1, "task_experts": 1, "expert": [16, 8]},
}
OPTIONS = {"dwa": {"window": 1}}  # λ moves within the few steps of a test
LATER = ("static", "bandit")  # λ = 1 for good, or until an evaluation
SGD = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.1}}


def config_for(folder: Path, run: Path, head: str, weighting: dict, **sections) -> Config:
    raw = tiny.raw(folder, run, model=HEADS[head], weighting=weighting, optimizer=SGD, **sections)
    raw["tasks"][1] |= {"parents": ["click"]}
    return parse_config(raw)


def short_runs(configs: dict[str, Config]) -> dict[str, ShortRun]:
    return {name: short_run(config, steps=5) for name, config in configs.items()}


@pytest.fixture(scope="module")
def worlds(tiny_data):
    """Head → weighting → its config and both ranks' runs; one world for all of a head's."""
    made: dict[str, dict[str, tuple[Config, list[ShortRun]]]] = {}

    def of(head: str) -> dict[str, tuple[Config, list[ShortRun]]]:
        if head not in made:
            configs = {kind: config_for(tiny_data, Path("run"), head, {"kind": kind, **OPTIONS.get(kind, {})}) for kind in KINDS}
            if head in ("mmoe", "stem"):
                configs["features"] = config_for(tiny_data, Path("run"), head, {"kind": "pcgrad", "cut": "features"})
            ranks = run_world(short_runs, 2, configs)
            made[head] = {name: (config, [rank[name] for rank in ranks]) for name, config in configs.items()}
        return made[head]

    return of


CASES = [(head, kind) for head in HEADS for kind in KINDS] + [("mmoe", "features"), ("stem", "features")]


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_two_workers_weigh_as_one_process_with_explicit_gradients(worlds, head, kind):
    """λ of every step, and all weights after five of plain SGD: tables were stepped once per batch, by the weighted gradient."""
    config, (first, second) = worlds(head)[kind]
    assert torch.equal(first.gradients, second.gradients) and torch.equal(first.weighting, second.weighting)
    losses, weighting, expected = unsharded_run(config, [first, second])
    torch.testing.assert_close(first.weighting, weighting, rtol=1e-4, atol=0)
    assert kind in LATER or (first.weighting != 1).any()
    torch.testing.assert_close(first.losses, losses, rtol=0, atol=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(first.after[name], weight, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first.after[name], second.after[name]), name


class Moving(Weighting):
    """λ by a moving mean of the losses: the smallest method with a state."""

    def __init__(self, tasks: int):
        super().__init__(tasks, mean=[1.0] * tasks, steps=0)

    def weigh(self, seen: Seen, state: State) -> np.ndarray:
        state["mean"][seen.tasks] += 0.3 * (seen.losses - state["mean"][seen.tasks])
        state["steps"] += 1
        return len(seen.tasks) * state["mean"][seen.tasks] / state["mean"][seen.tasks].sum()


STATEFUL = [kind for kind in KINDS if [*make_weighting(config_for(Path(), Path(), "mmoe", {"kind": kind})).buffers()]]


@pytest.mark.parametrize("kind", ["moving", *STATEFUL])
def test_a_resumed_run_weighs_as_an_uninterrupted_one(tiny_data, tmp_path, monkeypatch, kind):
    """Six steps on two workers, then six on one: λ's state is in the checkpoint, and goes on to where two workers bring it. What only
    wants the weights does not mind it."""
    if kind == "moving":
        monkeypatch.setattr(loss, "make_weighting", lambda config: Moving(len(config.tasks)))
    train = {"steps": 12, "save_every": 6, "eval_every": 12, "keep": 9}
    asked = {"kind": "static" if kind == "moving" else kind}
    whole, rest = (config_for(tiny_data, tmp_path / run, "mmoe", asked, train=train) for run in ("whole", "rest"))
    train_world(whole, 2)
    shutil.copytree(whole.run_dir, rest.run_dir, ignore=shutil.ignore_patterns("step-*12-0", "result.json"))
    train_world(rest, 1)
    half, end, found = saved_state(whole, 6), saved_state(whole, 12), saved_state(rest, 12)
    names = [name for name in end if name.startswith("dense/loss.weighting.")]
    assert names and not all(torch.equal(half[n], end[n]) for n in names)
    for name in end:
        torch.testing.assert_close(found[name], end[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert run_world(evaluate, 1, whole.run_dir, None, "validation")
    monkeypatch.undo()
    new = config_for(tiny_data, tmp_path / "new", "mmoe", {"kind": "static"}, train={"steps": 1})
    assert train_world(new, 1, resume=whole.run_dir)["steps"] == 1


def spoilt_steps(config: Config, spoil: list[str]) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], StepNumbers]]:
    """The first steps, in each a NaN in rank 1's rows: this rank's weights, tables and state of λ before and after."""
    with process_group(config) as process:
        training, out = Training(config, process, open_splits(config), Progress(None, False, print)), []
        batches = list(training.reader.batches(0, len(spoil)))
        for part, batch in zip(spoil, batches, strict=True):
            if process.rank == 1:
                getattr(batch, part)[3] = torch.nan
        source = iter(batches)
        for _ in batches:
            before = weights_and_state(training.model)
            numbers = training.pipeline.progress(source)
            out.append((before, weights_and_state(training.model), numbers))
        return out


def weights_and_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a rank holds."""
    whole = model.state_dict()
    shards = {f"{n}{s.metadata.shard_offsets}": s.tensor for n, v in whole.items() if hasattr(v, "local_shards") for s in v.local_shards()}
    return {n: v.detach().clone() for n, v in {**whole, **shards}.items() if isinstance(v, torch.Tensor) and not hasattr(v, "local_shards")}


@pytest.mark.parametrize("kind", ["static", *(k for k, c in KINDS.items() if c.reads_gradients)])
def test_a_skipped_step_changes_nothing(tiny_data, kind):
    """Neither weights nor tables nor the state of λ, although gradients at the cut are not finite. They may be so while no loss is:
    ReLU hides a NaN. Then too there is no step, and no λ, where gradients are looked at."""
    config = config_for(tiny_data, Path("run"), "mmoe", {"kind": kind})
    for before, after, numbers in run_world(spoilt_steps, 2, config, ["labels"] if kind == "static" else ["labels", "dense"])[0]:
        assert not numbers.trained and numbers.non_finite.sum() > 0
        assert torch.equal(numbers.weighting, torch.ones(3, dtype=torch.float64))
        changed = [n for n in before if not torch.equal(before[n], after[n])]
        assert changed == []
