"""The log with planted conflict: consistent with its own truth, opposed where it says so, and seen in the tasks' gradients."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score

from distmtl import loop
from distmtl.__main__ import main
from distmtl.config_file import load_config
from distmtl.data.conflict import RATE, SECONDS, TASKS, ConflictWorld
from distmtl.errors import DistmtlError
from distmtl.model.loss import JointLoss


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pa.concat_tables([ConflictWorld().block("test", b) for b in range(6)]).to_pandas()


def test_a_seed_gives_the_same_rows():
    block = ConflictWorld(3, 0.5).block("validation", 2)
    assert ConflictWorld(3, 0.5).block("validation", 2).equals(block)
    for other in (ConflictWorld(4, 0.5).block("validation", 2), ConflictWorld(3, 0.5).block("validation", 1)):
        assert not other.equals(block)


def test_labels_follow_the_truth(rows):
    """In every tenth of it; the truth itself is kept from training."""
    assert not [c for c in ConflictWorld().block("train", 0).column_names if c[:2] in ("p_", "e_")]
    for task in RATE:
        p = rows[f"p_{task}"]
        assert p.mean() == pytest.approx(RATE[task], rel=0.05)
        for low, high in pairwise(np.quantile(p, np.linspace(0, 1, 11))):
            some = rows[p.between(low, high)]
            deviation = np.sqrt((some[f"p_{task}"] * (1 - some[f"p_{task}"])).sum())
            assert abs((some[task] - some[f"p_{task}"]).sum()) < 4 * deviation
    assert rows.e_watch.mean() == pytest.approx(SECONDS, rel=0.05)
    for low, high in pairwise(np.quantile(rows.e_watch, np.linspace(0, 1, 11))):
        some = rows[rows.e_watch.between(low, high)]
        assert abs((some.watch - some.e_watch).mean()) < 4 * some.watch.std() / np.sqrt(len(some))


def test_nothing_else_orders_the_rows_as_well_as_the_truth(rows):
    for task, other in (("click", "like"), ("like", "click")):
        best = roc_auc_score(rows[task], rows[f"p_{task}"])
        assert 0.75 < best < 0.85
        assert best > roc_auc_score(rows[task], rows[f"p_{other}"]) + 0.2


def wishes(strength: float) -> np.ndarray:
    """Correlations of what the three tasks want of the same rows."""
    world = ConflictWorld(0, strength)
    x = world.impressions(np.random.default_rng(0))
    return np.corrcoef([world.logit(task, x) for task in TASKS])[np.triu_indices(3, 1)]


def test_strength_turns_the_tasks_from_one_wish_to_opposed_ones():
    """(COMMON² + TURNED²·cos 120° ) / (COMMON² + TURNED² + OWN²) = (0.04 + cos)/1.2, but for chance."""
    assert wishes(0.0) == pytest.approx(1.04 / 1.2, abs=0.1)
    assert wishes(1.0) == pytest.approx(-0.46 / 1.2, abs=0.1)
    assert (wishes(0.0) > wishes(0.5)).all() and (wishes(0.5) > wishes(1.0)).all()


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(DistmtlError, match="not in 0 … 1"):
        ConflictWorld(0, strength)


def test_options_of_other_logs_are_refused(tmp_path, capsys):
    for options in (["--users", "5"], ["--wide"]):
        assert main(["synth", "--conflict", *options, "--out", str(tmp_path / "log")]) == 1
    assert "says nothing about a --conflict log" in capsys.readouterr().err


@pytest.mark.parametrize(("strength", "sign"), [("1", -1), ("0", 1)])
def test_the_tasks_gradients_oppose_each_other_where_it_is_planted(tmp_path, monkeypatch, strength, sign):
    """From the command line to a trained model: mean cosine of the tasks' gradients at the bottom's output."""
    assert main(["synth", "--conflict", strength, "--rows", "60000", "--out", str(tmp_path / "log")]) == 0
    overrides = [f"run.dir={tmp_path / 'run'}", "train.log_every=1", "tasks.2.weight=0.003"]
    config, grams, forward = load_config(tmp_path / "log" / "shared_bottom.yaml", overrides), [], JointLoss.forward

    def watched(self, outputs, batch):
        loss, numbers = forward(self, outputs, batch)
        grams.append(numbers.gram)
        return loss, numbers

    monkeypatch.setattr(JointLoss, "forward", watched)
    result = loop.train(config, report=lambda record: None)
    gram = torch.stack(grams[10:]).numpy()
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    cosines = (gram / norms[:, :, None] / norms[:, None, :]).mean(0)[np.triu_indices(3, 1)]
    assert sign * cosines.mean() > 0.05
    assert result["metrics"]["test"]["click"]["best_possible_auc"] > 0.75
