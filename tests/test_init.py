"""init: every guess against a column made for it, a CSV and a Parquet log from end to end, and bad input in one sentence."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import train_world

from distmtl.__main__ import main
from distmtl.config_file import load_config
from distmtl.data.init import Asked, Draft, init, sample
from distmtl.data.init.csv_log import to_parquet
from distmtl.data.init.guess import guess, roomy, width
from distmtl.data.init.labels import gives_away, parents_of, task_of
from distmtl.data.init.sample import Column, holds_of
from distmtl.data.init.splits import split_by
from distmtl.errors import DistmtlError

N = 2000
RNG = np.random.default_rng(0)
ROW = np.arange(N)
CLICK = RNG.random(N) < 0.3
BUY = CLICK & (RNG.random(N) < 0.3)
WHERE_CLICKED = pa.array(BUY.astype(int), mask=~CLICK)


def column(values, name: str = "x", share: float = 1.0) -> Column:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    holds = "boolean" if pa.types.is_boolean(array.type) else holds_of(array.type)
    array = array.cast(pa.int8()) if holds == "boolean" else array
    flat = array.flatten() if holds.startswith("list") else array
    low, high = (
        (min(flat.to_pylist()), max(flat.to_pylist())) if holds.endswith("integer") and not flat.null_count and len(flat) else (None, None)
    )
    return Column(name, holds, array, share, low, high)


# ------------------------------------------------------------------------------------------------------------ the guesses

FEATURES = {
    "small integers": (column(ROW % 40, "item"), {"kind": "id", "rows": 50, "dim": 16, "out_of_range": "oov"}),
    "huge integers": (column((ROW % 40 + 1) * 10**12, "item"), {"kind": "id", "rows": 400, "out_of_range": "hash"}),
    "negative integers": (column(ROW % 40 - 7), {"kind": "id", "rows": 400, "out_of_range": "hash"}),
    "many strings": (column([f"u{i % 1500}" for i in ROW]), {"kind": "id", "rows": 3000, "dim": 32, "hashes": 2, "out_of_range": "hash"}),
    "few strings, some null": (
        column([None if i % 10 == 0 else f"c{i % 7}" for i in ROW]),
        {"kind": "id", "rows": 70, "missing": "row", "out_of_range": "hash"},
    ),
    "an integer that counts": (column(ROW % 40, "num_clicks"), {"kind": "numeric", "mean": 19.5}),
    "an integer that counts a little": (column(ROW % 5, "num_clicks"), {"kind": "id", "rows": 7}),
    "an id by its name": (column(ROW % 40, "price_id"), {"kind": "id", "rows": 50}),
    "boolean": (column(CLICK), {"kind": "bucket", "boundaries": [0.5]}),
    "normal": (column(3.0 + ROW % 2), {"kind": "numeric", "mean": 3.5, "std": 0.5}),
    "skewed": (column(np.exp(RNG.normal(size=N))), {"kind": "numeric", "log": True}),
    "float with nulls": (column(pa.array(np.sin(ROW), mask=ROW % 5 == 0)), {"kind": "bucket", "dim": 8}),
    "bag": (column([[f"t{i % 5}"] * (i % 3) for i in ROW], "tags"), {"kind": "id", "pooling": "mean", "rows": 50}),
    "sequence": (
        column([list(range(i % 10)) if i > 3 else list(range(400)) for i in ROW], "watch_history"),
        {"kind": "sequence", "max_length": 9, "too_long": "newest", "rows": 500},
    ),
    "vector": (column(pa.array([[float(i), 0.5, 1.0] for i in ROW], pa.list_(pa.float32()))), {"kind": "vector", "width": 3}),
    "wide vector": (column([[float(i)] * 65 for i in ROW]), {"kind": "vector", "width": 65, "project": 32}),
}


@pytest.mark.parametrize("case", FEATURES)
def test_a_column_becomes_a_feature(case):
    values, expected = FEATURES[case]
    found = guess(values, values.name)
    assert found.why and found.feature is not None
    assert {k: found.feature.get(k) for k in expected} == expected
    assert found.feature.get("log", False) == expected.get("log", False)


LEFT_OUT = {
    "all null": (column(pa.nulls(N)), "every value is null"),
    "constant": (column(["a"] * N), "constant: always 'a'"),
    "row number": (column(ROW), "no value is there twice in 2,000 rows"),
    "uuid": (column([f"{i:032x}" for i in ROW]), "no value is there twice"),
    "visit": (column(ROW // 3, "session_id"), "names a visit"),
    "text of times": (column(["2024-01-02 10:00:00", "2024-01-03"] * (N // 2)), "a time as text"),
    "text of days first": (column([f"{1 + i % 28}/12/2024" for i in ROW]), "such as '1/12/2024'; write it as a timestamp, year first"),
    "long text": (column([f"{i % 9} " + "so it goes " * 9 for i in ROW]), "long text"),
    "ragged floats": (column([[0.5] * (1 + i % 3) for i in ROW]), "lists of 1 to 3 floats"),
    "null in a list": (column([[1, None]] * N), "nulls inside its lists"),
    "NaN in a vector": (column([[1.0, float("nan")]] * N), "NaN or infinite"),
    "struct": (column([{"a": 1}] * N), "type struct"),
}


SAID = {
    "lists in text": (column(["|".join("abcdef"[i % 3 : 1 + i % 7]) for i in ROW]), "71 % look like lists, such as 'a|b|c|d'"),
    "lists with commas": (column([", ".join("abcdef"[i % 3 : 4]) for i in ROW]), "100 % look like lists, such as 'a, b, c, d'"),
    "money in text": (
        column([f"${i % 900 + 200:,}" for i in ROW]),
        "100 % look like numbers with signs or commas, such as '$200': write plain",
    ),
    "thousands in text": (column([f"{i % 50 * 40:,}" for i in ROW]), "50 % look like numbers with signs or commas, such as '1,000'"),
    "decimal commas": (column([f"{i % 99},{i % 10}0" for i in ROW]), "decimal comma, such as '0,00': write plain numbers"),
    "an amount that is none": (column(["n/a", *(f"{i % 97}%" for i in ROW[1:])]), "such as '1%': write plain numbers, 1"),
    "three ids of three digits": (
        column([f"{100 + i % 7},{102 + i % 5},{101 + i % 6}" for i in ROW]),
        "look like lists, such as '100,102,101'",
    ),
    "ids of a table too large": (column(ROW % 7 + 25 * 10**6, "user_id"), "25,000,000 to 25,000,006: of 25,000,007 rows most would never"),
    "ids far from 0": (column(ROW % 501 + 10**6), "1,000,000 to 1,000,500: of 1,000,501 rows most would never be read, so they are hashed"),
    "ids near each other": (column(ROW % 501 + 10**6), "subtract 1,000,000 from them, and each has a row of its own"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_was_seen_and_how_to_mend_it_is_said(case):
    values, why = SAID[case]
    assert why in guess(values, values.name).why


@pytest.mark.parametrize(
    "values",
    [
        [f"Drama, {i % 400} (2001)" for i in ROW],
        [f"{i % 300:05d}" for i in ROW],
        [f"10.0.{i % 9}" for i in ROW],
        [f"40-{60 + i % 9}-1000" for i in ROW],
    ],
)
def test_other_text_is_text(values):
    found = guess(column(values), "x")
    assert found.feature["kind"] == "id" and "look like" not in found.why and "time" not in found.why


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_column_is_left_out_with_a_reason(case):
    values, why = LEFT_OUT[case]
    found = guess(values, values.name)
    assert found.feature is None and why in found.why


def test_sizes():
    assert [roomy(n) for n in (3, 50, 63.2, 101, 24_841)] == [3, 50, 64, 110, 25_000]
    assert [width(n) for n in (1, 10, 100, 1000, 10**9)] == [8, 12, 20, 32, 32]


def test_the_number_of_ids_is_estimated_from_a_sample():
    """GEE of a tenth: the ids seen once stand for √10 ones each, and the truth lies within that factor."""
    ids = np.random.default_rng(1).zipf(1.4, 200_000)
    seen = column(ids[np.random.default_rng(2).random(len(ids)) < 0.1].astype(np.int64), share=0.1)
    once = (np.unique(seen.values, return_counts=True)[1] == 1).sum()
    assert seen.estimate == seen.distinct - once + round(once * 10**0.5)
    assert 1 / 10**0.5 < seen.estimate / len(np.unique(ids)) < 10**0.5
    assert not seen.unique and "in the sample" in guess(seen, "x").why


LABELS = {
    "boolean": (column(CLICK), {"kind": "binary"}),
    "0, 1, null": (WHERE_CLICKED, {"kind": "binary"}),
    "floats 0 and 1": (CLICK.astype(float), {"kind": "binary"}),
    "levels": (ROW % 4, {"kind": "ordinal", "levels": 4}),
    "stars": (1 + ROW % 5, {"kind": "regression", "bias": 3.0, "weight": 0.5}),
    "a number": (np.where(ROW % 2, 0.0, 20.0), {"kind": "regression", "bias": 10.0, "weight": 0.01}),
}


@pytest.mark.parametrize("case", LABELS)
def test_a_label_becomes_a_task(case):
    values, expected = LABELS[case]
    task, why = task_of(values if isinstance(values, Column) else column(values), "y")
    assert why and {k: task.get(k) for k in expected} == expected


def test_a_funnel_is_found_and_chance_is_none():
    paid = BUY & (ROW % 2 == 0)
    labels = {"click": CLICK, "buy": WHERE_CLICKED, "pay": paid, "like": np.roll(CLICK, 7), "rating": ROW % 5}
    labels["rare"] = np.flatnonzero(CLICK)[0] == ROW  # one row, of a click by chance
    assert parents_of({name: column(y, name) for name, y in labels.items()}) == {"buy": "click", "pay": "buy"}


GIVEN_AWAY = {
    "the label itself": (CLICK.astype(int), True),
    "its opposite": ((~CLICK).astype(float), True),
    "in words": (np.where(CLICK, "yes", "no"), True),
    "almost": (CLICK ^ (ROW == 5), True),
    "above a threshold": (np.where(CLICK, 3 + np.sin(ROW), np.sin(ROW)), True),
    "known only after it": (pa.array([f"order {i}" for i in ROW], mask=~BUY), True),
    "an amount of it": (np.where(BUY, ROW, 0), True),
    "a good feature": (CLICK + RNG.normal(size=N), False),
    "an id": (ROW % 40, False),
    "few strings": (np.where(ROW % 2, "a", "b"), False),
}


@pytest.mark.parametrize("case", GIVEN_AWAY)
def test_a_column_that_gives_a_label_away_is_found(case):
    values, found = GIVEN_AWAY[case]
    assert (gives_away(column(values), column(CLICK, "click")) is not None) == found


def test_a_number_that_is_the_label_is_found():
    y = np.exp(np.sin(ROW))
    assert "correlation with label x 1.0000" in (gives_away(column(2 * y + 1e-6 * ROW), column(y)) or "")
    assert gives_away(column(y + RNG.normal(size=N)), column(y)) is None


def test_the_last_rows_by_time_are_held_out():
    days = np.datetime64("2024-01-01", "D") + ROW // 200
    other = column(pa.array(days - np.timedelta64(900)), "born_on")
    split = split_by([other, column(ROW % 9, "ts"), column(pa.array(days), "date")], None)
    assert (split.column, split.told) == ("date", ("2024-01-09 00:00:00", "2024-01-10 00:00:00"))
    assert np.bincount(split.of(0, pa.table({"date": days}))).tolist() == [1600, 200, 200]
    seconds = split_by([column(1_700_000_000 + ROW, "event_time")], None)
    assert np.bincount(seconds.of(0, pa.table({"event_time": 1_700_000_000 + ROW}))).tolist() == [1600, 200, 200]
    by_hash = split_by([column(ROW, "watch_time")], None)
    assert by_hash.column is None and np.bincount(by_hash.of(0, pa.table({"x": ROW})), minlength=3) == pytest.approx(
        [1600, 200, 200], abs=60
    )
    assert (by_hash.of(500, pa.table({"x": ROW[500:]})) == by_hash.of(0, pa.table({"x": ROW}))[500:]).all()


# --------------------------------------------------------------------------------------------------------------- whole logs


def log() -> dict[str, list]:
    user, item = RNG.zipf(1.5, N) % 300, RNG.integers(0, 50, N)
    return {
        "request id": [f"r{i}" for i in ROW],
        "timestamp": [f"2024-01-{1 + i * 10 // N:02d} 10:00:00" for i in ROW],
        "user_id": [f"user {u}" for u in user],
        "item_id": item.tolist(),
        "city": [None if u % 7 == 0 else f'the "{u % 5}", city' for u in user],
        "is_new": [["true", "FALSE", None][i % 3] for i in ROW],
        "price": [f"{np.exp(np.sin(i) * 3):.2f}" for i in ROW],
        "paid": [f"{4.5 * b}" for b in BUY],
        "click": CLICK.astype(int).tolist(),
        "purchase": BUY.astype(int).tolist(),
    }


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))
    return path


def trained(draft: Draft, tmp_path: Path):
    """Three steps, and what was evaluated."""
    config = load_config(draft.config, [f"run.dir={tmp_path / 'run'}", "train.steps=3"])
    result = train_world(config, 1)
    assert result["steps"] == 3
    return config, result["metrics"]


def test_a_csv_log_trains(tmp_path):
    out = tmp_path / "out"
    command = ["init", str(write_csv(tmp_path / "log.csv", log())), "--labels", "click,purchase", "--out", str(out)]
    assert main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == ["mmoe.yaml", "test", "train", "validation"]
    config, metrics = trained(Draft(out / "mmoe.yaml", {}, [], []), tmp_path)
    assert {f.name: f.kind for f in config.features} == {
        "user_id": "id",
        "item_id": "id",
        "city": "id",
        "is_new": "bucket",
        "price": "numeric",
    }
    assert config.data.group == "user_id" and config.tasks[1].parents == ("click",)
    assert metrics["test"]["click"]["rows"] == 200 and "gauc" in metrics["validation"]["click"]
    rows = pq.read_table(out / "train").to_pandas()
    assert rows.timestamp.max() < pq.read_table(out / "test").to_pandas().timestamp.min()
    assert set(rows.city.dropna()) == {f'the "{k}", city' for k in range(5)}
    lines = (out / "mmoe.yaml").read_text().splitlines()
    assert all("  # " in line for line in lines if line.startswith("  - ")) and "# paid is left out: other than 0 only where" in "\n".join(
        lines
    )


def table() -> pa.Table:
    columns = log()
    return pa.table(
        {
            "user_id": columns["user_id"],
            "item_id": pa.array([float(i) for i in columns["item_id"]], mask=ROW % 9 == 0),  # as pandas writes ids with nulls
            "items seen": [[(i * k) % 50 for k in range(i % 6)] for i in ROW],
            "x": np.where(ROW == 77, np.nan, np.sin(ROW)),
            "w": np.ones(N),
            "click": CLICK,
            "seconds": np.where(CLICK, 30.0 + ROW % 7, np.nan),
        }
    )


def test_a_parquet_log_trains(tmp_path):
    for i in range(2):
        (tmp_path / f"log/day={i}").mkdir(parents=True)
        pq.write_table(table().slice(i * N // 2, N // 2), tmp_path / f"log/day={i}/a.parquet", row_group_size=300)
    draft = init(str(tmp_path / "log"), Asked(["click", "seconds"], weight="w"), tmp_path / "out")
    config, metrics = trained(draft, tmp_path)
    features = {f.name: f for f in config.features}
    assert features["items_seen"].source == "items seen" and features["item_id"].rows == 63 and config.data.weight == "w"
    assert (features["x"].mean, draft.rows.keys()) == (pytest.approx(0, abs=0.01), {"train", "validation", "test"})
    assert metrics["test"]["seconds"]["rmse"] > 0 and metrics["test"]["click"]["auc"] > 0
    whole = sum(len(pq.read_table(tmp_path / "out" / s)) for s in draft.rows)
    assert whole == N and sum(draft.rows.values()) == N


def test_a_sequence_reads_the_table_of_its_items(tmp_path):
    pq.write_table(table().rename_columns({"items seen": "item_history"}), tmp_path / "log.parquet")
    config = load_config(init(str(tmp_path / "log.parquet"), Asked(["click"]), tmp_path / "out").config)
    item, history = (next(f for f in config.features if f.name == name) for name in ("item_id", "item_history"))
    assert history.table == "item_id" and history.rows == item.rows and history.max_length == 5


def test_splits_that_are_there_and_large_logs_stay_where_they_are(tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / "log" / split).mkdir(parents=True)
        pq.write_table(table().drop_columns(["seconds"]), tmp_path / "log" / split / "a.parquet")
    data = load_config(init(str(tmp_path / "log"), Asked(["click"], left_out=["x"]), tmp_path / "ready").config).data
    assert (Path(data.train), Path(data.validation or ""), data.test) == (tmp_path / "log/train", tmp_path / "log/val", None)
    monkeypatch.setattr("distmtl.data.init.COPIED_ROWS", 1000)
    draft = init(str(tmp_path / "log/train"), Asked(["click"]), tmp_path / "large")
    assert [p.name for p in (tmp_path / "large").iterdir()] == ["shared_bottom.yaml"] and "not copied" in draft.notices[-1]
    assert {n: becomes for n, _, becomes, _ in draft.columns}["x"] == "left out"  # its NaN would stop the training


def test_a_sample_is_drawn_from_the_whole_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 400)
    pq.write_table(pa.table({"user_id": ROW // 20, "row_number": ROW, "click": CLICK}), tmp_path / "log.parquet")
    draft = init(str(tmp_path / "log.parquet"), Asked(["click"]), tmp_path / "out")
    assert "a sample of 4" in draft.config.read_text().splitlines()[0]
    features = {f.name: f for f in load_config(draft.config).features}
    assert features["user_id"].rows == roomy(1.25 * 100)  # the largest id is known from the footer
    assert "row_number" not in features


# --------------------------------------------------------------------------------------------------------------- bad input

BAD_CSV = {
    "a,b,click\n1,2,0\n3,1\n4,5,1,7\n": r"2 lines do not have the header's 3 columns, the first is line 3 with 2: '3,1'",
    "a,click\n1.5,0\n" * 1
    + "2.5,1\n" * 30
    + "oops,1\n": r"column 'a' .* holds numbers, but 1 of 32 values are none, such as 'oops' in line 33",
    "1,2\n3,4\n": "its first line must name the columns",
    "": "its first line must name the columns",
    "a,click\n": "holds no rows",
    "a,a,click\n1,2,3\n": "column 'a' is 2 times in its header",
    "a,clck\n1,0\n": "no column 'click'; did you mean 'clck'",
    "a,click\n1,1\n2,1\n": "label 'click' is 1 in all 2 rows where it is known; there is nothing to learn from one class",
    "a,click\n1,\n2,\n": "label 'click' is null in all 2 rows",
    "a,click\n1,yes\n2,no\n": "label 'click' holds strings such as 'yes'; write it as 0 and 1",
    "a,click\n1,0\n1,1\n": "no column is left that could be a feature .a: constant",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv_is_refused_in_a_sentence(text, tmp_path, capsys):
    (tmp_path / "log.csv").write_text(text)
    refused(tmp_path, BAD_CSV[text], capsys)


def test_text_that_is_not_utf8_is_refused_by_its_line(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes("a,click\nx,0\ncaf\xe9,1\n".encode("latin-1"))
    refused(tmp_path, r"log.csv: line 3, column 'a', is not UTF-8 text", capsys)


def refused(tmp_path: Path, match: str, capsys, *options: str, data: str = "log.csv") -> None:
    with pytest.raises(DistmtlError, match=match):
        main(["init", str(tmp_path / data), "--labels", "click", "--out", str(tmp_path / "out"), "--debug", *options])
    assert main(["init", str(tmp_path / data), "--labels", "click", "--out", str(tmp_path / "out"), *options]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_other_bad_input_is_refused_in_a_sentence(tmp_path, capsys):
    refused(tmp_path, "no such file", capsys, data="none.parquet")
    write_csv(tmp_path / "log.csv", log())
    refused(tmp_path, "--group: no column 'user'; did you mean 'user_id'", capsys, "--group", "user")
    refused(tmp_path, "--group price: it holds numbers", capsys, "--group", "price")
    refused(tmp_path, "--weight: column 'click' is a label already", capsys, "--weight", "click")
    refused(tmp_path, "--time city: it holds strings", capsys, "--time", "city")
    (tmp_path / "notes.txt").write_text("a,click\n")
    refused(tmp_path, "neither CSV nor Parquet by its name", capsys, data="notes.txt")
    with pytest.raises(DistmtlError, match="is not empty"):
        init(str(tmp_path / "log.csv"), Asked(["click"]), tmp_path)


def test_files_that_differ_are_refused(tmp_path, capsys):
    write_csv(tmp_path / "logs/a.csv", {"a": [1, 2], "click": [0, 1]})
    write_csv(tmp_path / "logs/b.csv", {"b": [1, 2], "click": [0, 1]})
    refused(tmp_path, r"b.csv has other columns than .*a.csv \(\['a', 'b'\]\)", capsys, data="logs")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "logs/c.parquet")
    refused(tmp_path, "holds CSV .a.csv. and Parquet .c.parquet.", capsys, data="logs")
    for name, values in (("a", [1, 2]), ("b", ["x", "y"])):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        pq.write_table(pa.table({"a": values, "click": [0, 1]}), tmp_path / f"mixed/{name}.parquet")
    refused(tmp_path, "column 'a' has type int64 in .*a.parquet, but string in .*b.parquet", capsys, data="mixed")


def test_csv_types(tmp_path):
    """Codes stay text, integers beyond int64 too; zones are known; a column may turn out to be another kind late."""
    columns = {
        "zip": ["007", "12"], "huge": [10**19, 1], "at": ["2024-01-01T10:00:00Z", ""], "n": [1, "2.5"], "b": ["True", "false"],
        "mixed ids": [1, "x"], "null": ["NA", ""], "two\nlines": ["a\nb", " c "],
    }  # fmt: skip
    del columns["two\nlines"]
    columns["lines"] = ["a\nb", " c "]
    to_parquet([write_csv(tmp_path / "a.csv", columns)], tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    kinds = ["string", "string", "timestamp[us, tz=UTC]", "double", "bool", "string", "string", "string"]
    assert [str(kind) for kind in found.schema.types] == kinds
    assert found["lines"].to_pylist() == ["a\nb", "c"] and found["null"].null_count == 2 and found["zip"].to_pylist() == ["007", "12"]
