"""`distmtl predict`: the model's predictions in the order of the data, bad rows aside; killed, continued, on Ray workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from torch import nn
from worlds import run_world, train_world

from distmtl import checkpoint, export
from distmtl.__main__ import main
from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.collate import ROW, Collator
from distmtl.data.dataset import open_dataset
from distmtl.data.rows import batch_of
from distmtl.distributed.process import process_group
from distmtl.distributed.sharding import shard
from distmtl.errors import DistmtlError
from distmtl.model.multitask import MultiTaskModel
from distmtl.run_directory import find_checkpoint
from distmtl.serving import batch
from distmtl.serving.batch import PartScorer, bad_rows, in_this_process, open_job, parts_of, predict
from distmtl.serving.predictor import Scored
from distmtl.storage import place

ROWS, FILES = 3001, 3


def with_grade(table: pa.Table) -> pa.Table:
    return table.append_column("grade", pa.array(np.arange(len(table)) % 4))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """data/ of three files with several row groups each, a run trained on it, its export; the tags are a sequence here."""
    folder = tmp_path_factory.mktemp("predict")
    tiny.write(folder / "tiny")
    (folder / "data").mkdir()
    for path in (folder / "tiny" / "train").iterdir():
        pq.write_table(with_grade(pq.read_table(path)), folder / "data" / path.name, row_group_size=310)
    raw = tiny.raw(folder / "tiny", folder / "run", train={"global_batch_size": 128, "steps": 12, "log_every": 12})
    raw["data"] |= {"train": str(folder / "data"), "validation": None}
    raw["features"][1]["out_of_range"] = "oov"
    raw["features"][2] = {"kind": "sequence", "name": "tags", "rows": 20, "dim": 8, "max_length": 3}
    raw["tasks"].append({"kind": "multiclass", "name": "mark", "label": "grade", "classes": 4, "tower": [8]})
    train_world(parse_config(raw), 1)
    export(str(folder / "run"), str(folder / "export"), say=lambda text: None)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Many parts and blocks of few rows."""
    monkeypatch.setattr(batch, "PART_ROWS", 700)
    monkeypatch.setattr(batch, "BLOCK_ROWS", 128)


def command(made: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["predict", str(made / "export"), "--data", str(data), "--out", str(out), *more]


def parts(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.parquet"))}


def written(out: Path) -> pa.Table:
    """The folder as any reader of Parquet sees it."""
    return pq.read_table(out)


def rejected(out: Path) -> dict[int, dict]:
    tables = [pq.read_table(f) for f in sorted((out / batch.REJECTED).glob("part-*.parquet"))]
    return {row["row"]: row for table in tables for row in table.to_pylist()}


def by_the_model(run: str, data: str) -> np.ndarray:
    """(n, outputs) of the checkpoint's own model."""
    found = find_checkpoint(run)
    config = Config.model_validate(found.manifest["config"])
    table = pa.concat_tables([pq.read_table(p.path) for p in open_dataset(data).parts])
    rows = Collator(config)(table.append_column(ROW, pa.array(np.arange(len(table)))))
    with process_group(config) as process:
        model = MultiTaskModel(config, process.device)
        sharded, _ = shard(nn.ModuleDict({"model": model}), config, process)
        checkpoint.load_weights(found, sharded)
        with torch.no_grad():
            return model.eval()(batch_of([(rows, 0, len(table))], [f.name for f in config.embedded], len(table))).numpy()


def test_predictions_are_the_models_in_the_order_of_the_data(made, tmp_path, small, capsys):
    out = tmp_path / "out"
    assert main(command(made, made / "data", out, "--keep", "user,city,grade")) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = json.loads((made / "export" / "manifest.json").read_text())
    found, given = written(out), pa.concat_tables([pq.read_table(f) for f in sorted((made / "data").iterdir())])
    assert summary | {"seconds": 0, "rows_per_second": 0} == {
        "rows": ROWS, "scored": ROWS, "rejected": 0, "replaced_ids": 0, "files": 6, "seconds": 0, "rows_per_second": 0,
        "export": manifest["digest"],
    }  # fmt: skip
    assert found.schema.names == ["row", "user", "city", "grade", "click", "conversion", "rating", "mark"]
    assert found["row"].to_pylist() == list(range(ROWS)) and rejected(out) == {}
    assert found.select(["user", "city", "grade"]).equals(given.select(["user", "city", "grade"]))
    outputs = run_world(by_the_model, 1, str(made / "run"), str(made / "data"))[0].astype(np.float64)
    marks = np.exp(outputs[:, 3:]) / np.exp(outputs[:, 3:]).sum(1, keepdims=True)
    assert found.schema.field("mark").type == pa.list_(pa.float32(), 4) and found.schema.field("click").type == pa.float32()
    np.testing.assert_allclose(found["click"], 1 / (1 + np.exp(-outputs[:, 0])), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["conversion"], 1 / (1 + np.exp(-outputs[:, 1])), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["rating"], outputs[:, 2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(found["mark"].to_pylist()), marks, rtol=0, atol=1e-5)


def test_parts_are_runs_of_row_groups(made, monkeypatch):
    dataset = open_dataset(str(made / "data"))
    for limit in (1, 311, 620, 10**6):
        monkeypatch.setattr(batch, "PART_ROWS", limit)
        cut = parts_of(dataset)
        assert [p.number for p in cut] == list(range(len(cut)))
        assert [p.row for p in cut] == np.cumsum([0, *(p.rows for p in cut)])[:-1].tolist() and sum(p.rows for p in cut) == ROWS
        for p in cut:
            groups = dataset.parts[p.file].group_rows
            assert sum(groups[p.first : p.last]) == p.rows and sum(groups[: p.first]) == p.within
            assert p.rows <= limit or p.last == p.first + 1
    assert len(cut) == FILES


BAD = {  # column: row in the second file → value, what the reason says
    "user": {3: (500, "id 500 at row 3 is outside"), 4: (-1, "id -1 at row 4 is outside"), 8: (2.5, "2.5 at row 8 is not whole")},
    "x": {128: (float("nan"), "nan at row 128"), 900: (float("inf"), "inf at row 900")},
    "tags": {5: ([1, 2, 3, 4], "a list of 4 ids at row 5"), 999: ([1, None], "a null inside a list at row 999")},
    "image": {700: ([0.0, float("nan"), 0.0], "in the vector at row 700")},
}


def broken(made: Path, folder: Path) -> Path:
    """The data set with the values of BAD, and text that is none in the city of row 6."""
    for path in sorted((made / "data").iterdir()):
        table = pq.read_table(path)
        if path.name == "part-1.parquet":
            for column, values in BAD.items():
                kind = pa.float64() if column == "user" else table.schema.field(column).type  # as pandas would write it
                new = [values[i][0] if i in values else v for i, v in enumerate(table[column].to_pylist())]
                table = table.set_column(table.schema.names.index(column), column, pa.array(new, kind))
            cities = [b"\xff\xfe" if i == 6 else v.encode() for i, v in enumerate(table["city"].to_pylist())]
            table = table.set_column(table.schema.names.index("city"), "city", pa.array(cities).view(pa.string()))
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / path.name, row_group_size=310)
    return folder


def test_bad_rows_go_aside_with_their_reason_and_no_others(made, tmp_path, small, capsys):
    assert main(command(made, made / "data", tmp_path / "good")) == 0
    assert main(command(made, broken(made, tmp_path / "bad"), tmp_path / "out", "--keep", "row")) == 1
    assert "--keep row: the predictions have a column of that name already" in capsys.readouterr().err
    assert main(command(made, tmp_path / "bad", tmp_path / "out")) == 0
    expected = {1000 + i: words for values in BAD.values() for i, (_, words) in values.items()} | {1006: "is not UTF-8 text"}
    aside = rejected(tmp_path / "out")
    assert sorted(aside) == sorted(expected)
    assert all(words in aside[row]["reason"] for row, words in expected.items()), aside
    assert {row["file"] for row in aside.values()} == {str(tmp_path / "bad" / "part-1.parquet")}
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["rows"], summary["scored"], summary["rejected"]) == (ROWS, ROWS - len(expected), len(expected))
    found, good = written(tmp_path / "out"), written(tmp_path / "good")
    others = np.setdiff1d(np.arange(ROWS), list(expected))
    assert found["row"].to_pylist() == others.tolist()
    for task in ("click", "conversion", "rating"):
        np.testing.assert_allclose(found[task], good[task].to_numpy()[others], rtol=0, atol=1e-6)


def test_ids_outside_their_tables_are_counted(made, tmp_path, small, capsys):
    """Also those of the parts that were there before."""
    (tmp_path / "data").mkdir()
    for path in sorted((made / "data").iterdir()):
        table = pq.read_table(path)
        items = [i + 50 if row < 7 and i is not None else i for row, i in enumerate(table["item"].to_pylist())]
        table = table.set_column(table.schema.names.index("item"), "item", pa.array(items, pa.int64()))
        pq.write_table(table, tmp_path / "data" / path.name, row_group_size=310)
    outside = sum(
        i is not None and i >= 50 for i in pa.concat_tables(map(pq.read_table, (tmp_path / "data").iterdir()))["item"].to_pylist()
    )
    for _ in range(2):
        assert main(command(made, tmp_path / "data", tmp_path / "out")) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert 0 < summary["replaced_ids"] == outside and summary["rejected"] == 0
        (tmp_path / "out" / "part-000000.parquet").unlink()


def without_the_sixth(scored: Scored) -> Scored:
    return replace(scored, predictions={t: np.where(np.arange(len(p)) == 5, np.nan, p.T).T for t, p in scored.predictions.items()})


def test_a_row_without_a_finite_prediction_goes_aside_too(made, tmp_path, small):
    job = open_job(str(made / "export"), str(made / "data"), str(tmp_path / "out"))

    def score(job, parts):
        scorer = PartScorer(job)
        of = scorer.score
        scorer.score = lambda table: without_the_sixth(of(table))
        yield parts[1], scorer(parts[1])

    with pytest.raises(DistmtlError, match=r"5 parts are not in .*/out, though workers wrote them"):  # which would be lost in silence
        predict(replace(job, max_rejected=1), score, say=lambda text: None)
    aside = rejected(tmp_path / "out")
    assert list(aside) == [620 + 5, 620 + 128 + 5, 620 + 256 + 5]
    assert aside[625]["reason"] == "task 'click': the model predicts nan at row 625"
    assert written(tmp_path / "out")["row"].to_pylist() == [i for i in range(620, 1000) if i not in aside]


def test_a_good_block_costs_one_collate_and_a_bad_row_few(made):
    config = Config.model_validate(find_checkpoint(str(made / "run")).manifest["config"])
    collate, calls = Collator(config, labelled=False), []
    table = pq.read_table(made / "data" / "part-0.parquet").append_column(ROW, pa.array(np.arange(1000)))

    def counting(rows: pa.Table):
        calls.append(len(rows))
        return collate(rows)

    assert list(bad_rows(counting, table)) == [] and calls == [1000]
    users = table["user"].to_numpy().copy()
    users[[7, 8, 611]] = 200
    found = list(bad_rows(counting, table.set_column(table.schema.names.index("user"), "user", pa.array(users))))
    assert [row for row, _ in found] == [7, 8, 611] and len(calls) < 2 + 2 * 3 * 10


def test_more_bad_rows_than_allowed_end_it_and_raising_the_share_goes_on(made, tmp_path, small, capsys):
    bad, out = broken(made, tmp_path / "bad"), tmp_path / "out"
    assert main(command(made, bad, out, "--max-rejected", "0.001")) == 1
    err = capsys.readouterr().err
    assert "4 or more of 3,001 rows cannot be scored, but --max-rejected is 0.001" in err and "id 500 at row 3" in err
    before = {f: f.stat().st_mtime_ns for f in out.glob("*.parquet")}
    assert len(before) == 2 and not list(out.rglob("*.partial"))
    assert main(command(made, bad, out, "--max-rejected", "0.005")) == 0
    assert before.items() <= {f: f.stat().st_mtime_ns for f in out.glob("*.parquet")}.items()


KILLED = """
import os, signal, sys
from distmtl.serving import batch
batch.PART_ROWS, batch.BLOCK_ROWS = 700, 128
calls = 0
def until_killed(score, table):
    global calls
    calls += 1
    if calls == 13:  # within the third part
        os.kill(os.getpid(), signal.SIGKILL)
    return score(table)
def score(job, parts):
    scorer = batch.PartScorer(job)
    of = scorer.score
    scorer.score = lambda table: until_killed(of, table)
    for part in parts:
        yield part, scorer(part)
batch.predict(batch.open_job(*sys.argv[1:]), score)
"""


def test_killed_and_continued_is_as_if_uninterrupted(made, tmp_path, small):
    bad, out = broken(made, tmp_path / "bad"), tmp_path / "out"
    whole = predict(open_job(str(made / "export"), str(bad), str(tmp_path / "whole")), in_this_process, say=lambda text: None)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(made / "export"), str(bad), str(out)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {f: f.stat().st_mtime_ns for f in out.glob("*.parquet")}
    assert sorted(f.name for f in before) == ["part-000000.parquet", "part-000001.parquet"] and list(out.glob("*.partial"))
    said: list[str] = []
    result = predict(open_job(str(made / "export"), str(bad), str(out)), in_this_process, said.append)
    assert "2 of them done" in said[0]
    assert {**result, "seconds": 0, "rows_per_second": 0} == {**whole, "seconds": 0, "rows_per_second": 0}
    assert parts(out) == parts(tmp_path / "whole") and not list(out.rglob("*.partial"))
    assert before.items() <= {f: f.stat().st_mtime_ns for f in out.glob("*.parquet")}.items(), "a finished part was touched"


def test_two_workers_and_one_of_them_killed_write_what_one_process_writes(made, tmp_path):
    """The worker is killed as its first part begins; another one scores that part."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted((made / "data").iterdir()):
        pq.write_table(pa.concat_tables([pq.read_table(path)] * 150), data / path.name)
    assert main(command(made, data, tmp_path / "one", "--keep", "tags")) == 0
    words = [sys.executable, "-m", "distmtl", *command(made, data, tmp_path / "two", "--keep", "tags", "--workers", "2")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": "local"})
    assert process.stdout
    for line in process.stdout:
        if found := re.fullmatch(r"worker on \S+ (\d+)\n", line):
            os.kill(int(found[1]), signal.SIGKILL)
            break
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert re.search(r"the worker of part-00000\d.parquet died; another one scores it", out)
    assert json.loads(out.splitlines()[-1])["scored"] == 150 * ROWS
    assert parts(tmp_path / "two") == parts(tmp_path / "one") and len(parts(tmp_path / "one")) == FILES
    assert not list((tmp_path / "two").rglob("*.partial"))


def test_into_an_object_store(made, tmp_path, small, capsys):
    bad, store, disk = broken(made, tmp_path / "bad"), place("memory://predictions"), tmp_path / "disk"
    for out in (str(store), str(disk), str(store)):
        assert main(["predict", str(made / "export"), "--data", str(bad), "--out", out]) == 0
    assert "6 of them done" in capsys.readouterr().out
    names = [*parts(disk), batch.PLAN]
    assert [(store / name).read_bytes() for name in names] == [(disk / name).read_bytes() for name in names]


def test_kept_columns_keep_their_types(made, tmp_path):
    table = pq.read_table(made / "data" / "part-0.parquet")
    kept = {
        "kind": pa.array(["a", "b", None, "a"] * 250).dictionary_encode(),
        "flag": pa.array([True, False] * 500),
        "key": pa.array([2**64 - 1 - i for i in range(1000)], pa.uint64()),
        "when": pa.array(range(1000), pa.timestamp("ms")),
        "place": pa.array([{"x": i, "y": [i]} for i in range(1000)]),
    }
    path, out = tmp_path / "data.parquet", tmp_path / "out"
    pq.write_table(pa.table({**dict(zip(table.schema.names, table.columns)), **kept}), path, row_group_size=300)
    assert main(command(made, path, out, "--keep", ",".join(kept))) == 0
    found = written(out)
    for name, values in kept.items():
        assert found[name].type == values.type and found[name].to_pylist() == values.to_pylist(), name


def test_what_cannot_be_scored_is_refused_before_anything_is_written(made, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    table = pq.read_table(made / "data" / "part-0.parquet")

    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 1
        err = capsys.readouterr().err
        assert err.startswith("distmtl predict: ") and "Traceback" not in err
        assert not out.exists()
        return err

    assert "is no export: it has no manifest.json" in refused("predict", str(data), "--data", str(made / "data"), "--out", str(out))
    assert "no *.parquet files in it" in refused(*command(made, data, out))
    pq.write_table(table.drop_columns(["item", "click", "w"]), data / "a.parquet")
    users = pa.array([f"u{u}" for u in table["user"].to_pylist()])
    pq.write_table(table.set_column(table.schema.names.index("user"), "user", users), data / "b.parquet")
    tags = pa.array(["|".join(map(str, tags or [])) for tags in table["tags"].to_pylist()])
    table = table.set_column(table.schema.names.index("tags"), "tags", tags)
    pq.write_table(table, data / "c.parquet")
    err = refused(*command(made, data, out, "--keep", "itme"))
    assert f"column 'tags' in {data / 'c.parquet'} holds strings, but the model was trained on lists of integers in it" in err
    assert "6 mistakes" in err and err.count("column 'itme' is missing") == 3
    assert f"column 'item' is missing in {data / 'a.parquet'}" in err
    assert "click" not in err.split("it has")[0] and "'w'" not in err
    assert f"column 'user' in {data / 'b.parquet'} holds strings, but the model was trained on integers in it" in err
    assert "--keep click: the predictions have a column" in refused(*command(made, made / "data", out, "--keep", "click"))
    with pytest.raises(SystemExit):
        main(command(made, made / "data", out, "--workers", "0"))


def test_labels_are_not_asked_for_and_columns_that_nobody_needs_not_read(made, tmp_path, capsys):
    """A column whose pages are damaged does not matter."""
    data = tmp_path / "data"
    data.mkdir()
    table = pq.read_table(made / "data" / "part-0.parquet").drop_columns(["click", "conversion", "rating", "grade", "w", "p"])
    path = data / "a.parquet"
    pq.write_table(table.append_column("other", table["row"]), path, use_dictionary=False)
    column = next(
        c for g in [pq.read_metadata(path).row_group(0)] for c in map(g.column, range(g.num_columns)) if c.path_in_schema == "other"
    )
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(bytes(column.total_compressed_size))
    assert main(command(made, data, tmp_path / "out")) == 0
    assert main(command(made, data, tmp_path / "kept", "--keep", "other")) == 1
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_a_folder_of_another_job_is_refused_with_what_differs(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(made, made / "data", out)) == 0
    before = parts(out)
    assert main(command(made, made / "data" / "part-0.parquet", out, "--keep", "user")) == 1
    err = capsys.readouterr().err
    assert re.search(r"is of another job, which differs in data \(\w{16}, now \w{16}\) and keep \(\[\], now \['user'\]\) and parts; ", err)
    assert parts(out) == before
    assert main(command(made, made / "data", made / "tiny")) == 1
    assert "is not empty, and no predictions are in it" in capsys.readouterr().err
    assert main(command(made, made / "data", made / "run" / "config.yaml")) == 1
    assert "is a file; give a folder" in capsys.readouterr().err
