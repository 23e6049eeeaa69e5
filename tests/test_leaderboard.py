"""A leaderboard's cells from its YAML, and the table from results that are given."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tiny
import yaml

from distmtl.config_file import dump_config, in_a_line, load_config, merge, override, parse_config
from distmtl.errors import DistmtlError
from distmtl.leaderboard import Cell, Key, Mean, Table, load_leaderboard, make_cells
from distmtl.run_directory import finished

ROOT = Path(__file__).parents[1]
HEADS = {
    "single_task": {"model": {"kind": "single_task", "bottom": [8]}},
    "mmoe": {"model": {"num_experts": 2}, "tasks": [{"name": "conversion", "tower": [4]}]},
}


def write(folder: Path, **fields) -> Path:
    """A board over the tiny data, whose config is written beside it."""
    data = {"test": str(folder / "data" / "validation")}
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny.raw(folder / "data", folder / "unused", data=data)))
    board = {"name": "board", "out": str(folder / "out"), "data": {"tiny": "base.yaml"}, "heads": HEADS}
    board |= {"weightings": {"static": {"kind": "static"}, "pcgrad": {"kind": "pcgrad"}}, "seeds": 3, "select": "click.auc", **fields}
    (folder / "board.yaml").write_text(yaml.safe_dump(board, sort_keys=False))
    return folder / "board.yaml"


def result(click: float, conversion: float, rating: float, value: float) -> dict:
    test = {"click": {"auc": click}, "conversion": {"auc": conversion}, "rating": {"rmse": rating}}
    return {
        "metrics": {"validation": {}, "test": test}, "best_value": value, "samples_per_second": 1000.0, "seconds": 2.0,
        "parameters": {"tables": 7000, "dense": 300},
    }  # fmt: skip


@pytest.fixture
def table(tmp_path) -> tuple[Table, dict[str, np.ndarray]]:
    """Cells: the baseline; mmoe/static, better at clicks and ratings and surely worse at conversions; one that failed; one unfinished."""
    board = load_leaderboard(write(tmp_path))
    cells = make_cells(board)
    noise = np.random.default_rng(0).normal(size=(2, 3, 4)) * 1e-3
    figures = {
        "single_task/static": np.array([0.70, 0.80, 0.50, 0.69]) + noise[0],
        "mmoe/static": np.array([0.75, 0.70, 0.40, 0.74]) + noise[1],
        "mmoe/pcgrad": np.array([[0.71, 0.81, 0.49, 0.73]]),
    }
    results = {(c.key, s): result(*f) for c in cells for s, f in enumerate(figures.get(f"{c.key.head}/{c.key.weighting}", []))}
    return Table(board, cells, results, ["seeds: 0, 1, 2"]), figures


def test_cells_are_the_base_with_the_heads_sections_over_it(tmp_path):
    board = load_leaderboard(write(tmp_path), ["seeds=[7, 3]", "overrides=[train.epochs=2]"])
    cells = make_cells(board)
    assert [str(c.key) for c in cells] == ["tiny/single_task/static", "tiny/single_task/pcgrad", "tiny/mmoe/static", "tiny/mmoe/pcgrad"]
    assert "single_task" in cells[1].failure and not cells[1].runs and "\n" not in cells[1].failure
    run = cells[3].runs[3]
    assert run.run.seed == 3 and run.run_dir == str(tmp_path / "out" / "tiny" / "mmoe" / "pcgrad" / "seed-3")
    assert (run.model.num_experts, run.model.expert) == (2, (16, 8)), "merged where the kind is the base's"
    assert [t.tower for t in run.tasks] == [(8,), (4,), (8,)] and cells[0].runs[3].tasks[1].tower == (8,)
    assert cells[0].runs[7].model.bottom == (8,) and cells[2].runs[7].weighting.kind == "static" and run.weighting.kind == "pcgrad"
    assert (run.train.epochs, run.train.keep, run.train.monitor, run.train.global_batch_size) == (2, 1, "click.auc", 128)


def test_merge():
    base = {"model": {"kind": "a", "x": 1, "y": 2}, "tasks": [{"name": "t", "w": 1}, {"name": "u"}], "l": [1, 2]}
    assert merge(base, {"model": {"y": 3}, "tasks": [{"name": "u", "w": 2}, {"name": "v"}], "l": [3]}) == {
        "model": {"kind": "a", "x": 1, "y": 3}, "tasks": [{"name": "t", "w": 1}, {"name": "u", "w": 2}, {"name": "v"}], "l": [3],
    }  # fmt: skip
    assert merge(base, {"model": {"kind": "b"}})["model"] == {"kind": "b"} and base["model"]["y"] == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": 3}, "seed: unknown key; did you mean 'seeds'?"),
        ({"weightings": {"a": {"kind": "pcgrd"}}}, "weightings.a: kind 'pcgrd' is not one of"),
        ({"weightings": {"a": {"kind": "pcgrad", "cat": 1}}}, "weightings.a.cat: unknown key; did you mean 'cut'?"),
        ({"heads": {"a": {"modl": {}}}}, "heads.a.modl: unknown section; did you mean 'model'?"),
        ({"heads": {"a": {"run": {}}}}, "heads.a.run: run is not a head's"),
        ({"baseline": "mmo/static"}, "no head 'mmo'; did you mean 'mmoe'?"),
        ({"baseline": "mmoe"}, "no weighting ''; it is HEAD/WEIGHTING"),
        ({"seeds": [1, 1]}, "they must differ"),
        ({"heads": {}}, "heads"),
    ],
)
def test_mistakes_of_the_board(tmp_path, fields, sentence):
    with pytest.raises(DistmtlError) as e:
        load_leaderboard(write(tmp_path, **fields))
    assert sentence in str(e.value) and str(tmp_path / "board.yaml") in str(e.value)


def test_mistakes_of_cells_are_theirs_alone(tmp_path):
    heads = HEADS | {"typo": {"model": {"kind": "mmoe", "num_expert": 3}}}
    cells = make_cells(load_leaderboard(write(tmp_path, heads=heads, metrics={"click": "rmse"})))
    assert all(c.failure for c in cells) and "metrics.click: 'rmse' is not one of auc" in cells[0].failure
    cells = make_cells(load_leaderboard(write(tmp_path, heads=heads)))
    assert [bool(c.failure) for c in cells] == [False, True, False, False, True, True]
    assert cells[4].failure == "model.num_expert: unknown key; did you mean 'num_experts'?"


def test_a_metric_is_of_the_data_sets_that_have_its_task(tmp_path):
    data = {"test": str(tmp_path / "data" / "validation")}
    other = tiny.raw(tmp_path / "data", tmp_path / "unused", data=data)
    other["tasks"] = [{"kind": "binary", "name": "like"}]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    fields = {"data": {"tiny": "base.yaml", "other": "other.yaml"}, "heads": {"single_task": HEADS["single_task"]}, "select": None}
    fields |= {"weightings": {"static": {"kind": "static"}}}
    board = load_leaderboard(write(tmp_path, **fields, metrics={"conversion": "pr_auc", "like": "joint_pr_auc"}))
    cells = make_cells(board)
    assert [c.failure for c in cells] == [None, None]
    made = result(0.7, 0.7, 0.5, 0.6)
    made["metrics"]["test"] = {"like": {"joint_pr_auc": 0.25}}
    table = Table(board, cells, {(cells[1].key, 0): made})
    assert table.tasks("tiny")["conversion"] == "pr_auc" and table.tasks("other") == {"like": "joint_pr_auc"}
    assert "like joint PR-AUC 0.2500" in table.text()
    nowhere = make_cells(load_leaderboard(write(tmp_path, **fields, metrics={"lik": "auc"})))
    assert "metrics.lik: no task 'lik'" in nowhere[0].failure and "did you mean 'like'?" in nowhere[1].failure


def test_a_stopped_run_is_still_to_train(tmp_path):
    from distmtl.cluster.leaderboard import note

    cell, results = make_cells(load_leaderboard(write(tmp_path)))[0], {}
    stopped = {"stopped": True, "best_value": None, "metrics": {}}
    assert note(0, cell, {"result": stopped}, results) == "stopped; the same command continues it" and not results and not cell.failure
    ended = result(0.7, 0.7, 0.5, 0.6) | {"stopped": False}
    assert note(1, cell, {"result": ended}, results) == "validation click.auc 0.6000" and results == {(cell.key, 1): ended}
    assert note(2, cell, {"error": "it rains"}, results) == "failed: seed 2: it rains" == f"failed: {cell.failure}"


def test_a_finished_run_of_another_config_or_of_other_data_is_not_taken(tmp_path):
    """Also where `distmtl train` would continue it: its figures would be another board's."""
    config = tiny.config(Path(), tmp_path / "run")
    digests = {"train": "a", "validation": "b", "test": "c"}
    assert finished(config, digests) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    assert finished(config, digests) is None, "it was stopped before its end"
    for stopped in (True, False):
        (tmp_path / "run" / "result.json").write_text(json.dumps({"stopped": stopped, "data": digests}))
        assert finished(config, digests) == (None if stopped else {"stopped": False, "data": digests})
    tracked = tiny.config(Path(), tmp_path / "run", tracking={"mlflow": {"uri": "file:///mlruns"}})
    assert finished(tracked, digests), "who is told of a run makes it no other"
    for key, section in (("train.steps=3", "train"), ("train.monitor=click.auc", "train"), ("evaluation.exact_rows=7", "evaluation")):
        raw = config.model_dump(mode="json")
        override(raw, key)
        with pytest.raises(DistmtlError, match=rf"was made with another config \({section}\); delete it, or choose another out"):
            finished(parse_config(raw), digests)
    with pytest.raises(DistmtlError, match="data.test changed since the run in"):
        finished(config, digests | {"test": "d"})


def test_intervals_are_students():
    x = [0.71, 0.74, 0.72, 0.70, 0.75]
    mean = Mean.of(x)
    low, high = scipy.stats.t.interval(0.95, len(x) - 1, loc=np.mean(x), scale=scipy.stats.sem(x))
    assert mean.mean == pytest.approx(np.mean(x)) and (mean.mean - mean.half, mean.mean + mean.half) == pytest.approx((low, high))
    assert Mean.of([0.7]) == Mean(0.7, None, 1) and Mean.of([]) is None and Mean.of([0.7, None]) is None


def test_gains_are_paired_and_signed(table):
    table, figures = table
    first, second, third, failed = table.rows["tiny"]
    assert [str(r.cell.key) for r in (first, second, third, failed)] == [
        "tiny/mmoe/static", "tiny/mmoe/pcgrad", "tiny/single_task/static", "tiny/single_task/pcgrad",
    ]  # fmt: skip
    base, mine = figures["single_task/static"], figures["mmoe/static"]
    paired = (mine - base)[:, :3] / base[:, :3] * [1, 1, -1]  # of rmse less is better
    for t, task in enumerate(("click", "conversion", "rating")):
        assert first.gains[task].mean == pytest.approx(paired[:, t].mean())
        assert first.gains[task].half == pytest.approx(scipy.stats.sem(paired[:, t]) * scipy.stats.t.ppf(0.975, 2))
    assert first.gain.mean == pytest.approx(paired.mean()) and first.gain.half == pytest.approx(
        scipy.stats.sem(paired.mean(1)) * scipy.stats.t.ppf(0.975, 2)
    )
    assert first.worse == 1 and third.worse == 0 and third.gain.mean == 0
    assert second.seeds == [0] and second.worse is None and second.gain.half is None, "of one seed nothing is known for sure"
    assert third.behind.mean == pytest.approx((mine - base)[:, 3].mean()) and third.behind.mean > third.behind.half


def test_every_form_says_the_same(table, tmp_path):
    table, figures = table
    table.write(tmp_path / "out")
    text, markdown = table.text(), (tmp_path / "out" / "leaderboard.md").read_text()
    mean = figures["mmoe/static"].mean(0)
    for form in (text, markdown):
        assert f"chosen by validation click.auc ({mean[3]:.4f} ±" in form and "tiny/mmoe/static; test: click AUC" in form
        assert "single_task/pcgrad failed: weighting pcgrad" in form and "1/3" in form and "seeds: 0, 1, 2" in form
    assert text.splitlines()[1].startswith("1*  mmoe") and "| 1* | mmoe | static |" in markdown and "| Δ click % |" in markdown
    written = json.loads((tmp_path / "out" / "leaderboard.json").read_text())["data"]["tiny"]
    assert written["chosen"] == "tiny/mmoe/static" and written["metrics"]["rating"] == "rmse"
    assert written["cells"][0]["test"]["click"]["mean"] == pytest.approx(mean[0]) and written["cells"][0]["gains"]["conversion"]["mean"] < 0
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "leaderboard.csv").read_text())))
    assert float(lines[0]["click.auc"]) == pytest.approx(mean[0]) and lines[0]["chosen"] == "1" and lines[0]["worse"] == "1"
    assert lines[3]["failure"].startswith("weighting pcgrad") and lines[3]["click.auc"] == "" and lines[1]["seeds"] == "1"


def test_lower_is_better_for_a_loss(tmp_path):
    board = load_leaderboard(write(tmp_path, select=None, weightings={"static": {"kind": "static"}}))
    a, b = (Key("tiny", head, "static") for head in HEADS)
    results = {(a, 0): result(0.7, 0.7, 0.5, 0.6), (b, 0): result(0.9, 0.9, 0.1, 0.5)}
    table = Table(board, make_cells(board), results)
    assert table.monitor("tiny") == "loss" and table.chosen("tiny").cell.key == b


def test_nothing_finished_is_a_table_too(tmp_path):
    board = load_leaderboard(write(tmp_path))
    table = Table(board, [Cell(Key("tiny", "mmoe", "static"), failure="it rains")], {})
    assert "no run is finished" in table.text() and "mmoe/static failed: it rains" in table.text() and table.chosen("tiny") is None
    table.write(tmp_path / "out")


def test_an_error_in_a_line():
    assert in_a_line(DistmtlError("x.yaml: 2 mistakes\n  - a: b\n  - c")) == "a: b; c"
    assert in_a_line(DistmtlError("run.dir x is another's\n  - k: 'a' there")) == "run.dir x is another's: k: 'a' there"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "leaderboards").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_leaderboards_have_sound_cells(path, tmp_path):
    """With a config in place of a prepared data set's, where that is not on this machine; only surgery on single_task fails."""
    board = load_leaderboard(path)
    stand_in = tmp_path / "prepared.yaml"
    tasks = {"census": ["income", "never_married"], "movielens": ["rating", "like", "love"]}.get(board.name, [])
    base = yaml.safe_load((ROOT / "configs" / "synthetic.yaml").read_text())
    base |= {"interaction": {"kind": "cross"}} if board.name == "movielens" else {}
    base["tasks"] = [{"kind": "regression" if t == "rating" else "binary", "name": t} for t in tasks]
    stand_in.write_text(yaml.safe_dump(base))
    board = board.model_copy(update={"data": {n: str(stand_in) if tasks else p for n, p in board.data.items()}})
    failures = {str(c.key): c.failure for c in make_cells(board) if c.failure}
    surgery = {name for name, w in board.weightings.items() if w.reads_gradients}
    assert set(failures) <= {f"{board.name.replace('funnel', 'synthetic')}/single_task/{name}" for name in surgery}, failures
    assert all(load_config(p) for p in board.data.values())
