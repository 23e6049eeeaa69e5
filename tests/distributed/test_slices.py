"""Metrics of slices equal those of a file that holds the slice alone, on one rank and on two."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
from sklearn.metrics import roc_auc_score
from worlds import run_world, train_world

from distmtl.__main__ import main
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate

WANTED = ("user", "item:55,65", "domain=", "x_bucket=", "city:1")
KNOWN = 100  # users with a row of their own


def config_of(folder: Path, run: Path, **sections):
    raw = tiny.raw(folder, run, train={"global_batch_size": 128, "steps": 12}, **sections)
    raw["features"][0] |= {"rows": KNOWN, "out_of_range": "oov", "id_dropout": 0.3}
    raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
    return parse_config(raw)


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory) -> Path:
    """A data set of its own, and a run on it. Its validation split has users that training has not, and some without one."""
    out = tmp_path_factory.mktemp("sliced")
    (out / "train").symlink_to(tiny_data / "train")
    (out / "validation").mkdir()
    rows = tiny.table(900, seed=7)
    users, draws = rows["user"].to_numpy(), np.random.default_rng(5).random(900)
    users = pa.array(np.where(draws < 0.2, 60 + users % 60, users), mask=draws > 0.95)
    pq.write_table(rows.set_column(1, "user", users), out / "validation" / "part-0.parquet", row_group_size=128)
    train_world(config_of(out, out / "run"), 1)
    return out


@pytest.fixture(scope="module")
def sliced(folder):
    return run_world(evaluate, 1, str(folder / "run"), None, None, WANTED)[0]["validation"]


def expected_of(folder: Path) -> dict[str, list[str]]:
    """Feature → the slice of every row, by counting in a dictionary."""
    train, rows = pq.read_table(folder / "train"), pq.read_table(folder / "validation")
    user, item, city = (Counter(train[c].to_pylist()) for c in ("user", "item", "city"))

    def of_user(u) -> str:
        n = user[u]
        return "missing" if u is None else "oov" if u >= KNOWN else "0" if n == 0 else "1-4" if n < 5 else "5-49" if n < 50 else "50+"

    def of_item(i) -> str:
        return "0-54" if item[i] < 55 else "55-64" if item[i] < 65 else "65+"

    def of_x(x) -> str:
        return "missing" if x is None else "< -1" if x < -1 else "-1 to 0" if x < 0 else "0 to 1" if x < 1 else ">= 1"

    functions = {"user": of_user, "item": of_item, "domain": str, "x_bucket": of_x, "city": lambda c: "1+" if city[c] else "0"}
    return {name: [of(v) for v in rows[name.removesuffix("_bucket")].to_pylist()] for name, of in functions.items()}


def same(got: dict, want: dict, rel: float) -> bool:
    """None where None, else about as much."""
    numbers = {k: v for k, v in want.items() if v is not None}
    return got.keys() == want.keys() and {k: v for k, v in got.items() if v is not None} == pytest.approx(numbers, rel=rel)


def test_each_slice_equals_a_file_of_its_rows(folder, sliced, tmp_path):
    rows, seen = pq.read_table(folder / "validation"), set()
    for feature, names in expected_of(folder).items():
        got = sliced["click"]["slices"][feature]
        assert got.keys() == set(names)
        assert sum(of["rows"] for of in got.values()) == len(names), "every row once"
        for name in set(names):
            file = tmp_path / "slice.parquet"
            pq.write_table(rows.filter(pa.array([n == name for n in names])), file)
            alone = run_world(evaluate, 1, str(folder / "run"), str(file))[0]["data"]
            for task, metrics in alone.items():
                if metrics["rows"]:
                    assert same(sliced[task]["slices"][feature][name], metrics, 1e-6)
                else:
                    assert name not in sliced[task]["slices"][feature]
            seen.add(name)
    assert {"0", "1-4", "5-49", "50+", "oov", "missing", "0-54", "65+"} <= seen, "the log has rows of every sort"


def test_best_possible_auc_of_a_slice_is_scikit_learns(folder, sliced):
    """Of the true probabilities, which no model comes into."""
    rows, names = pq.read_table(folder / "validation"), np.array(expected_of(folder)["user"])
    for name in ("1-4", "5-49", "50+", "oov"):
        part = rows.filter(pa.array(names == name))
        want = roc_auc_score(part["click"].to_numpy(), part["p"].to_numpy(), sample_weight=part["w"].to_numpy())
        assert sliced["click"]["slices"]["user"][name]["best_possible_auc"] == pytest.approx(want, rel=1e-6)


def test_two_ranks_count_and_measure_what_one_does(folder, sliced):
    first, second = run_world(evaluate, 2, str(folder / "run"), None, None, WANTED)
    assert first == second
    for task, values in sliced.items():
        assert first["validation"][task]["slices"].keys() == {w.rstrip("=").split(":")[0] for w in WANTED}
        for feature, slices in values["slices"].items():
            again = first["validation"][task]["slices"][feature]
            assert again.keys() == slices.keys() and all(same(again[n], of, 1e-5) for n, of in slices.items())


def test_beyond_exact_rows_a_slice_has_its_bound(folder, sliced, tmp_path):
    config = config_of(folder, tmp_path / "run", evaluation={"exact_rows": 500})
    train_world(config, 1)
    got = run_world(evaluate, 1, config.run_dir, None, None, ("domain=",))[0]["validation"]["click"]["slices"]["domain"]
    for name, exact in sliced["click"]["slices"]["domain"].items():
        assert got[name]["rows"] == exact["rows"] and got[name]["logloss"] == pytest.approx(exact["logloss"], rel=1e-6)
        assert 0 < abs(got[name]["auc"] - exact["auc"]) + 1e-12 <= got[name]["auc_error_bound"] + 1e-12


def test_the_command_prints_a_line_for_each_slice(folder, sliced, tmp_path, capsys):
    assert main(["evaluate", str(folder / "run"), "--slices", "user,item:55,65,domain=", "--out", str(tmp_path / "m.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["split", "task", "slice", "AUC"]
    assert sum("click  " in line and " item 55-64 " in line for line in lines) == 1
    saved = json.loads((tmp_path / "m.json").read_text())["validation"]["click"]
    assert saved["slices"]["item"].keys() == {"0-54", "55-64", "65+"} == sliced["click"]["slices"]["item"].keys()
    assert json.loads(lines[-1])["validation"]["click"] == saved


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("itme", "slices 'itme': 'itme' is no id or bucket feature; did you mean 'item'?"),
        ("image", "'image' is no id or bucket feature"),
        ("tags", "column 'tags' of .* holds lists, and a row of several ids is in no one slice; slice by a feature of one id per row"),
        ("item:5,1", "slices 'item:5,1': write FEATURE, FEATURE:1,5,50 with increasing numbers above 0, or FEATURE= for its values"),
        ("item:0", "increasing numbers above 0"),
        ("item:many", "increasing numbers above 0"),
        ("item=3", "FEATURE= for its values"),
        ("item=", "its table has 50 rows, and by value at most 32 can be told apart; write item for how often"),
        ("x_bucket", "x_bucket is a bucket feature, sliced by its buckets; write x_bucket="),
    ],
)
def test_what_cannot_be_sliced_is_refused(folder, monkeypatch, wanted, sentence):
    monkeypatch.setattr("distmtl.slices.MAX_VALUES", 32)
    with pytest.raises(DistmtlError, match=sentence):
        evaluate(str(folder / "run"), slices=[wanted])


@pytest.mark.parametrize("split", ["valid", "group"])
def test_another_split_is_refused(folder, split):
    with pytest.raises(DistmtlError, match=f"split '{split}' is not one of validation and test"):
        evaluate(str(folder / "run"), split=split)


def test_a_feature_is_sliced_once(folder):
    with pytest.raises(DistmtlError, match="domain is there twice; once is enough"):
        evaluate(str(folder / "run"), slices=["domain=", "domain"])


def test_counting_needs_the_training_split(folder, tmp_path):
    """Not at its place, or with an id that the table does not have: on two ranks one sentence."""
    here = tmp_path / "moved"
    here.mkdir()
    pq.write_table(pq.read_table(folder / "train").slice(0, 500), here / "part-0.parquet")
    config = config_of(folder, tmp_path / "run", data={"train": str(here)})
    train_world(config, 1)
    rows = pq.read_table(here)
    pq.write_table(rows.set_column(2, "item", pc.add(rows["item"], 30)), here / "part-0.parquet")
    with pytest.raises(DistmtlError, match=r"data set .*moved: feature 'item': id \d+ at .* is outside its table's 0 … 49"):
        run_world(evaluate, 2, config.run_dir, None, None, ("item",))
    (here / "part-0.parquet").unlink()
    with pytest.raises(
        DistmtlError, match=r"slices 'item' count the ids of the training split, data.train of the run: .*no \*.parquet files"
    ):
        run_world(evaluate, 2, config.run_dir, None, None, ("item",))
    by_value = run_world(evaluate, 1, config.run_dir, None, None, ("domain=",))[0]
    assert len(by_value["validation"]["click"]["slices"]["domain"]) == 3
