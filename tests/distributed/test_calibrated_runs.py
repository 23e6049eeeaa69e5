"""Calibration at the end of whole runs: fitted to the best checkpoint, the same on any number of ranks, applied to no other."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
from worlds import records, run_world, train_world

from distmtl.__main__ import main
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate

CALIBRATIONS = {"click": {"kind": "platt", "slices": "item", "min_rows": 15}, "conversion": {"kind": "isotonic"}}


def config(folder: Path, run: Path, calibrations=CALIBRATIONS, **data: str):
    raw = tiny.raw(folder, run, data=data, train={"global_batch_size": 128, "steps": 20, "eval_every": 10, "keep": 5})
    for task in raw["tasks"]:
        if task["kind"] == "binary":
            task |= {"focal": 2.0, "calibration": calibrations.get(task["name"])}
    return parse_config(raw)


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory) -> Path:
    """The tiny data with a test split."""
    folder = tmp_path_factory.mktemp("with test")
    for split in ("train", "validation"):
        (folder / split).symlink_to(tiny_data / split)
    (folder / "test").mkdir()
    pq.write_table(tiny.table(500, seed=3), folder / "test" / "part-0.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """World size → config and result."""
    folder, out = tmp_path_factory.mktemp("runs"), {}
    for world_size in (1, 2):
        c = config(data, folder / str(world_size), test=str(data / "test"))
        out[world_size] = c, train_world(c, world_size)
    return out


def fitted(c) -> dict:
    return json.loads((Path(c.run_dir) / "calibration.json").read_text())


def test_the_best_checkpoint_is_calibrated(runs):
    c, result = runs[1]
    raw = next(r for r in records(c, "evaluation") if r["step"] == result["best_step"])["metrics"]
    for task in CALIBRATIONS:
        before, after = raw[task], result["metrics"]["validation"][task]
        assert abs(before["calibration"] - 1) > 0.01, "focal loss is not calibrated"
        exact = task == "conversion"  # items of few rows do not share the overall bias
        assert after["calibration"] == pytest.approx(1, abs=1e-4 if exact else 0.02) and after["logloss"] < before["logloss"]
    assert result["metrics"]["validation"]["conversion"]["auc"] == pytest.approx(raw["conversion"]["auc"], abs=0.05)
    assert result["metrics"]["test"]["click"]["rows"] == 500
    assert result["calibration"]["click"] == {"kind": "platt", "slices": "item", "min_rows": 15}
    assert any("values of item by their own rows" in r["text"] for r in records(c, "note"))
    assert len(fitted(c)["tasks"]["click"]["values"]) > 3


def test_two_workers_fit_what_one_fits(runs):
    (a, one), (b, two) = runs.values()
    x, y = (fitted(c)["tasks"]["click"] for c in (a, b))
    assert x["values"] == y["values"]
    assert x["a"] == pytest.approx(y["a"], rel=1e-2) and x["b"] == pytest.approx(y["b"], rel=1e-2, abs=1e-2)
    for split, tasks in one["metrics"].items():
        for task in CALIBRATIONS:
            assert tasks[task]["logloss"] == pytest.approx(two["metrics"][split][task]["logloss"], rel=1e-3)


def measured(path: str, split: str) -> dict:
    """In a process of its own: torch's threads would not survive the next fork."""
    return run_world(evaluate, 1, path, None, split)[0][split]


def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert main(list(arguments)) == 0
    return out.getvalue()


def test_evaluate_applies_it_to_its_own_checkpoint_alone(runs):
    c, result = runs[1]
    best = result["best_step"]
    other = ({10, 20} - {best}).pop()
    assert measured(c.run_dir, "validation") == result["metrics"]["validation"]
    assert measured(f"{c.run_dir}/checkpoints/step-{best:09d}-0", "test") == result["metrics"]["test"]
    raw = next(r for r in records(c, "evaluation") if r["step"] == other)["metrics"]
    assert measured(f"{c.run_dir}/checkpoints/step-{other:09d}-0", "validation") == raw
    out = run_world(printed, 1, "evaluate", c.run_dir)[0]
    assert "task click: calibrated, platt by item\ntask conversion: calibrated, isotonic\n" in out


def test_a_finished_run_is_calibrated_anew_when_that_is_asked_for(data, tmp_path):
    plain = train_world(config(data, tmp_path, {}), 1)
    assert plain["calibration"] == {} and not (tmp_path / "calibration.json").exists()
    c = config(data, tmp_path)
    later = train_world(c, 1)
    assert later["restarts"] == 1 and later["metrics"]["validation"]["conversion"]["calibration"] == pytest.approx(1, abs=1e-4)
    assert train_world(c, 1)["restarts"] == 1, "complete: the former result"
    assert train_world(config(data, tmp_path, {}), 1)["metrics"] == plain["metrics"]
    assert not (tmp_path / "calibration.json").exists()


def test_one_class_is_refused_on_every_rank(data, tmp_path):
    table = tiny.table(300, seed=9)
    column = table.schema.names.index("conversion")
    (tmp_path / "validation").mkdir()
    no = table["conversion"].to_pandas().where(table["conversion"].is_null().to_pandas(), 0)
    pq.write_table(table.set_column(column, "conversion", [no.astype("Int8")]), tmp_path / "validation" / "a.parquet")
    c = config(data, tmp_path / "run", validation=str(tmp_path / "validation"))
    with pytest.raises(DistmtlError, match="task 'conversion': its calibration cannot be fitted: all .* known labels are 0"):
        train_world(c, 2)
