"""Bad input ends in one sentence that says what, where and what to do; exit code 1, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from worlds import records, run_world

from distmtl.__main__ import main
from distmtl.config_file import load_config, parse_config
from distmtl.data import check
from distmtl.data.check import check_dataset
from distmtl.data.collate import ROW, Collator
from distmtl.data.dataset import open_dataset
from distmtl.data.reader import Reader
from distmtl.errors import DistmtlError
from distmtl.loop import train

FILES, FILE_ROWS = 2, 200
STEPS = 7  # 400 rows in steps of 64, 8 of each of the 8 streams


@pytest.fixture
def folder(tmp_path) -> Path:
    """train/a.parquet, train/b.parquet of 200 rows in row groups of 60; validation/a.parquet."""
    for split, names in (("train", "ab"), ("validation", "a")):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i, name in enumerate(names):
            put(tmp_path / "data" / split / f"{name}.parquet", tiny.table(FILE_ROWS, seed=i))
    return tmp_path


def put(path: Path, table: pa.Table, **options) -> None:
    pq.write_table(table, path, **{"row_group_size": 60, **options})


def change(folder: Path, column: str, values, file: str = "train/b", **options) -> None:
    """Rewrite a column of a file: to an Arrow array, or with the values of a {row: value} set."""
    path = folder / "data" / f"{file}.parquet"
    table = pq.read_table(path)
    if isinstance(values, dict):
        old, kind = table[column].to_pylist(), table.schema.field(column).type
        values = pa.array([values.get(i, v) for i, v in enumerate(old)], kind)
    put(path, table.set_column(table.schema.names.index(column), column, values), **options)


def renamed(path: Path, names: dict[str, str]) -> pa.Table:
    table = pq.read_table(path)
    return table.rename_columns([names.get(c, c) for c in table.schema.names])


def config_of(folder: Path, **sections):
    raw = tiny.raw(folder / "data", folder / "run", train={"global_batch_size": 64, "log_every": 1, "eval_every": 100})
    raw["data"]["shuffle"] = False
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return raw


@pytest.fixture
def refused(folder, monkeypatch, capfd):
    """`distmtl train` as torchrun would start it: exit code 1, one message on stderr, which is returned; no trace on disk."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))

    def run(raw=None, *arguments: str) -> str:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(raw or config_of(folder)))
        before = set(folder.rglob("*"))
        assert main(["train", str(path), *arguments]) == 1
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert err.startswith("distmtl train: ") and err.count("distmtl train: ") == 1, err
        assert set(folder.rglob("*")) == before
        return err.removeprefix("distmtl train: ").rstrip("\n")

    return run


# ------------------------------------------------------------------------------------- found before anything is written


def no_file(f):
    shutil.rmtree(f / "data/train")
    return [f"data path {f}/data/train: no such file or folder"]


def empty_folder(f):
    for p in (f / "data/train").iterdir():
        p.unlink()
    return [f"data path {f}/data/train: no *.parquet files in it"]


def zero_rows(f):
    for name in "ab":
        put(f / f"data/train/{name}.parquet", tiny.table(5)[:0])
    return [f"data path {f}/data/train: its 2 Parquet file(s) hold no rows"]


def not_parquet(f):
    (f / "data/train/b.parquet").write_text("user,item\n1,2\n")
    return ["not a whole Parquet file", f"{f}/data/train/b.parquet (14 bytes)"]


def empty_file(f):
    (f / "data/train/b.parquet").write_bytes(b"")
    return ["not a whole Parquet file", f"{f}/data/train/b.parquet (0 bytes)"]


def truncated(f):
    for name in ("train/a", "validation/a"):
        path = f / f"data/{name}.parquet"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return ["not a whole Parquet file", f"{f}/data/train/a.parquet", f"{f}/data/validation/a.parquet"]


def damaged_page(f):
    """The footer is whole, the pages are not."""
    path = f / "data/train/a.parquet"
    blob = bytearray(path.read_bytes())
    blob[4 : len(blob) // 2] = bytes(len(blob) // 2 - 4)
    path.write_bytes(blob)
    return [f"{path} cannot be read: "]


def missing_column(f):
    path = f / "data/train/b.parquet"
    put(path, renamed(path, {"user": "user_", "tags": "labels"}))
    change(f, "x", pa.array(["a"] * FILE_ROWS))
    return [f"column 'user' is missing in {path}; did you mean 'user_'?", "column 'tags' is missing in", "column 'x' in"]


def doubled_column(f):
    path = f / "data/train/b.parquet"
    put(path, renamed(path, {"row": "user"}))
    return [f"column 'user' is 2 times in {path}"]


def wrong_types(f):
    change(f, "item", pa.array(np.zeros(FILE_ROWS)))
    change(f, "x", pa.array(["a"] * FILE_ROWS))
    change(f, "image", pa.array(np.zeros(FILE_ROWS)))
    change(f, "click", pa.array([b"1"] * FILE_ROWS))
    change(f, "w", pa.array([[1.0]] * FILE_ROWS))
    change(f, "p", pa.array(["0.5"] * FILE_ROWS), "validation/a")
    b = f"{f}/data/train/b.parquet"
    return [
        f"column 'item' in {b} has type double, but feature 'item' needs integers or strings, or lists of them; pandas",
        f"column 'x' in {b} has type string, but feature 'x_bucket' needs a number",
        f"column 'image' in {b} has type double, but feature 'image' needs lists of floats",
        f"column 'click' in {b} has type binary, but label of task 'click' needs a number or boolean",
        f"column 'w' in {b} has type list<element: double>, but data.weight needs a number",
        f"column 'p' in {f}/data/validation/a.parquet has type string, but true_probability needs a number",
    ]


def strings_and_numbers(f):
    change(f, "item", pa.array(["a"] * FILE_ROWS))
    return [f"column 'item' has type int64 in {f}/data/train/a.parquet, but string in {f}/data/train/b.parquet; use one type"]


def lists_and_numbers(f):
    change(f, "item", pa.array([[1]] * FILE_ROWS))
    return [f"column 'item' has type int64 in {f}/data/train/a.parquet, but list<element: int64> in {f}/data/train/b.parquet; use one type"]


def negative_id(f):
    change(f, "item", {190: -3})
    return [
        f"feature 'item': id -3 in {f}/data/train/b.parquet, row group 3, is outside its table's 0 … 49; raise rows, or set out_of_range"
    ]


def large_id(f):
    change(f, "user", {190: 200})
    change(f, "tags", {100: [1, 20]})
    return [
        f"feature 'user': id 200 in {f}/data/train/b.parquet, row group 3, is outside its table's 0 … 199",
        f"feature 'tags': id 20 in {f}/data/train/b.parquet, row group 1, is outside its table's 0 … 19",
    ]


def huge_id(f):
    change(f, "item", pa.array(np.full(FILE_ROWS, 2**64 - 1, dtype=np.uint64)))
    return ["feature 'item': id 18446744073709551615 in"]


def sampled_ids(f):
    change(f, "item", {3: 77}, write_statistics=False)
    change(f, "tags", {4: [1, -1]}, write_statistics=False)
    return [
        f"feature 'item': id 77 at {f}/data/train/b.parquet, row 3 is outside its table's 0 … 49; raise rows, or set out_of_range",
        f"feature 'tags': id -1 at {f}/data/train/b.parquet, row 4 is outside",
    ]


def huge_id_without_statistics(f):
    ids = np.zeros(FILE_ROWS, dtype=np.uint64)
    ids[5] = 2**63 + 1
    change(f, "item", pa.array(ids), write_statistics=False)
    return [f"feature 'item': id 9223372036854775809 at {f}/data/train/b.parquet, row 5 is outside"]


def nan(f):
    change(f, "x", {3: float("nan")})
    change(f, "image", {4: [0.0, float("inf"), 0.0]})
    b = f"{f}/data/train/b.parquet"
    return [
        f"feature 'x_bucket': nan at {b}, row 3; write null where a number is unknown, and nothing infinite",
        f"feature 'x': nan at {b}, row 3; write null where a number is unknown, and nothing infinite",
        f"feature 'image': a NaN, infinite or null number in the vector at {b}, row 4",
    ]


def infinite(f):
    change(f, "x", {3: float("-inf")})
    return [f"feature 'x': -inf at {f}/data/train/b.parquet, row 3"]


def beyond_float32(f):
    change(f, "x", {3: 1e39})
    return [f"feature 'x': 1e+39 at {f}/data/train/b.parquet, row 3 is 1e+39 after normalisation, beyond float32"]


def wrong_width(f):
    change(f, "image", pa.array([[0.0, 1.0, 2.0]] * 7 + [[1.0]] * (FILE_ROWS - 7)))
    return [f"feature 'image': a vector of 1 numbers at {f}/data/train/b.parquet, row 7, but width is 3"]


def null_in_vector(f):
    change(f, "image", {4: [0.0, None, 0.0]})
    return [f"feature 'image': a NaN, infinite or null number in the vector at {f}/data/train/b.parquet, row 4"]


def null_in_list(f):
    change(f, "tags", {4: [1, None]})
    return [f"feature 'tags': a null inside a list at {f}/data/train/b.parquet, row 4; leave it out of the list"]


def label_two(f):
    change(f, "click", {190: 2})
    return [f"label 'click': 2 in {f}/data/train/b.parquet, row group 3; a binary label is 0 or 1, or null where unknown"]


def label_half(f):
    change(f, "conversion", pa.array([0.5] * FILE_ROWS))
    return [f"label 'conversion': 0.5 at {f}/data/train/b.parquet, row 0; a binary label is 0 or 1, or null where unknown"]


def label_nan(f):
    change(f, "rating", {3: float("nan")})
    return [f"label 'rating': nan at {f}/data/train/b.parquet, row 3"]


def no_labels(f):
    for name in ("train/a", "train/b"):
        change(f, "conversion", pa.nulls(FILE_ROWS, pa.int8()), name)
    return ["label 'conversion': all 400 rows are null; task 'conversion' would have nothing to learn"]


def no_labels_and_no_statistics(f):
    for name in ("train/a", "train/b"):
        change(f, "conversion", pa.nulls(FILE_ROWS, pa.int8()), name, write_statistics=False)
    return ["label 'conversion': all 400 rows are null"]


def weights(f):
    change(f, "w", {3: -1.0})
    return [f"weight 'w': -1.0 at {f}/data/train/b.parquet, row 3; a sample weight is a finite number ≥ 0"]


def nan_weight(f):
    change(f, "w", {3: float("nan")})
    return ["weight 'w': nan at"]


def null_weight(f):
    change(f, "w", {3: None})
    return ["weight 'w': null at"]


def not_text(f):
    bad = pa.array([b"a", b"\xff\xfe"] * (FILE_ROWS // 2)).view(pa.string())
    change(f, "city", bad, write_statistics=False)
    return [f"feature 'city': b'\\xff\\xfe' is not UTF-8 text, in the rows from {f}/data/train/b.parquet, row 0 on"]


def every_split(f):
    change(f, "click", {190: 2})
    change(f, "item", {190: -3}, "validation/a")
    return [f"data.train {f}/data/train: 1 mistake\n", f"data.validation {f}/data/validation: 1 mistake\n", "id -3", "'click': 2"]


BEFORE = [
    no_file, empty_folder, zero_rows, not_parquet, empty_file, truncated, damaged_page, missing_column, doubled_column, wrong_types,
    strings_and_numbers, lists_and_numbers, negative_id, large_id, huge_id, sampled_ids,
    huge_id_without_statistics, nan, infinite, beyond_float32,
    wrong_width, null_in_vector, null_in_list, label_two, label_half, label_nan, no_labels, no_labels_and_no_statistics, weights,
    nan_weight, null_weight, not_text, every_split,
]  # fmt: skip


@pytest.mark.parametrize("spoil", BEFORE, ids=lambda f: f.__name__)
def test_refused_before_training(folder, refused, spoil):
    words = spoil(folder)
    message = refused()
    for w in words:
        assert w in message


CONFIGS = {
    "unknown key": ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean 'epochs'?"),
    "unknown kind": ({"model": {"kind": "mmeo"}}, "model: kind 'mmeo' is not one of"),
    "batch": ({"train": {"global_batch_size": 63}}, "train.global_batch_size 63 is not divisible by data.num_streams 8; try 56"),
    "workers": ({"cluster": {"workers": 9}}, "cluster.workers 9 exceeds data.num_streams 8"),
    "plug-in": ({"model": {"kind": "plugin", "target": "json"}}, "model.target: must be package.module:Name, got 'json'"),
    "data path": ({"data": {"train": "nowhere://bucket/x"}}, "data path nowhere://bucket/x: "),
    "glob": ({"data": {"train": "/no/such/*.parquet"}}, "data path /no/such/*.parquet: no *.parquet files in it"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_configs(folder, refused, case):
    sections, words = CONFIGS[case]
    raw = config_of(folder)
    for key, value in sections.items():
        raw[key] = value if "kind" in value else {**raw.get(key, {}), **value}
    assert words in refused(raw)


def test_evaluate_refuses_like_train(folder, capfd):
    for path, words in ((folder / "absent", "no such folder"), (folder / "data", "is incomplete: it has no manifest.json")):
        assert main(["evaluate", str(path)]) == 1
        err = capfd.readouterr().err
        assert err == f"distmtl evaluate: checkpoint {path}{': ' if 'such' in words else ' '}{words}\n"


# ----------------------------------------------------------------------------------------------------- met in mid-run


def attempt(raws: list[dict], resume: str = "auto") -> list[tuple[str, str]]:
    """The error of every run: its class and words."""
    out = []
    for raw in raws:
        try:
            out.append(("none", str(train(parse_config(raw), resume, report=lambda record: None)["steps"])))
        except Exception as e:
            out.append((type(e).__name__, str(e)))
    return out


UNKNOWN = {"write_statistics": False}  # nothing in the footer tells
DEEP = 190  # row 190 of b.parquet is row 390: step 5, on the last rank


def deep_page(f):
    """A page that only training reads is overwritten, behind footer, statistics and sample."""
    path = f / "data/train/b.parquet"
    put(path, pq.read_table(path), use_dictionary=False, compression="zstd")
    meta = pq.read_metadata(path).row_group(3).column(2)
    with path.open("r+b") as file:
        file.seek(meta.data_page_offset)
        file.write(bytes(meta.total_compressed_size))
    return [f"data set {f}/data/train: "]


MIDRUN = {
    "id": (lambda f: change(f, "item", {DEEP: 50}, **UNKNOWN), "feature 'item': id 50 at {b}, row 190 is outside its table's 0 … 49"),
    "id in a list": (lambda f: change(f, "tags", {DEEP: [0, -1]}, **UNKNOWN), "feature 'tags': id -1 at {b}, row 190 is outside"),
    "NaN": (lambda f: change(f, "x", {DEEP: float("nan")}), "feature 'x_bucket': nan at {b}, row 190; write null"),
    "inf in a vector": (lambda f: change(f, "image", {DEEP: [0.0, 0.0, float("inf")]}), "number in the vector at {b}, row 190"),
    "label": (lambda f: change(f, "click", {DEEP: 3}, **UNKNOWN), "label 'click': 3 at {b}, row 190; a binary label is 0 or 1"),
    "weight": (lambda f: change(f, "w", {DEEP: -1.0}), "weight 'w': -1.0 at {b}, row 190"),
    "null in a list": (lambda f: change(f, "tags", {DEEP: [None]}), "a null inside a list at {b}, row 190"),
    "page": (deep_page, "data set {data}/train: "),
    "text": (
        lambda f: change(f, "city", pa.array([b"a"] * DEEP + [b"\xff"] * 10).view(pa.string()), write_statistics=False),
        "feature 'city': b'\\xff' is not UTF-8 text, in the rows from {data}/train/",
    ),
    "validation": (
        lambda f: change(f, "item", {DEEP: 50}, "validation/a", write_statistics=False),
        "feature 'item': id 50 at {data}/validation/a.parquet, row 190 is outside",
    ),
    "loss": (lambda f: change(f, "rating", {DEEP: 1e30}), "step 5: the loss of rating is not finite, at {b}, row 190. Lower the"),
    "loss skipped too often": (
        lambda f: change(f, "rating", {DEEP: 1e30}),
        "step 12: the loss of rating is not finite, at {b}, row 190. That is skipped step 2, more than train.non_finite.limit=1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def midrun(tmp_path_factory):
    """Every case on two ranks, in one world: case → folder, and the error of each rank."""
    patch = pytest.MonkeyPatch()
    patch.setattr(check, "SAMPLE_ROWS", 16)
    folders, raws = {}, []
    for case, (spoil, _) in MIDRUN.items():
        folder = folders[case] = tmp_path_factory.mktemp("midrun")
        for split, names in (("train", "ab"), ("validation", "a")):
            (folder / "data" / split).mkdir(parents=True)
            for i, name in enumerate(names):
                put(folder / "data" / split / f"{name}.parquet", tiny.table(FILE_ROWS, seed=i))
        spoil(folder)
        raws.append(config_of(folder, train={"global_batch_size": 64, "log_every": 1, "save_every": 2}, data={"shuffle_window": 8}))
        if case == "loss skipped too often":
            raws[-1]["train"] |= {"epochs": 3, "non_finite": {"policy": "skip", "limit": 1}}
    errors = run_world(attempt, 2, raws)
    patch.undo()
    return {case: (folders[case], [rank[i] for rank in errors]) for i, case in enumerate(MIDRUN)}


@pytest.mark.parametrize("case", MIDRUN)
def test_every_rank_ends_with_the_same_error(midrun, case):
    folder, errors = midrun[case]
    words = MIDRUN[case][1].format(b=f"{folder}/data/train/b.parquet", data=f"{folder}/data")
    assert [kind for kind, _ in errors] == ["DistmtlError"] * 2, errors
    assert errors[0] == errors[1] and words in errors[0][1]
    assert not list(folder.rglob("*.partial"))
    checkpoints = sorted(p.name for p in (folder / "run/checkpoints").iterdir())
    last = {"page": 2, "validation": 7, "loss skipped too often": 12}.get(case, 4)  # step 5 fails; the page is first read in step 3
    assert checkpoints[-1] == f"step-{last:09d}-0" and not (folder / "run/result.json").exists()


def test_more_ranks_than_streams(folder):
    raw = config_of(folder)
    raw["data"]["num_streams"] = 2
    errors = [rank[0] for rank in run_world(attempt, 3, [raw])]
    assert errors == [("DistmtlError", "3 workers, but data.num_streams is 2: a worker owns at least one stream; raise num_streams")] * 3
    assert not (folder / "run").exists()


def test_a_mistake_found_by_rank_0_stops_every_rank(folder):
    change(folder, "click", {190: 2})
    errors = [rank[0] for rank in run_world(attempt, 2, [config_of(folder)])]
    assert errors[0] == errors[1] and errors[0][0] == "DistmtlError" and "label 'click': 2 in" in errors[0][1]
    assert not (folder / "run").exists()


def test_a_skipped_loss_is_counted_and_leaves_the_weights_finite(folder):
    change(folder, "rating", {DEEP: 1e30})
    raw = config_of(folder, train={"global_batch_size": 64, "log_every": 1, "non_finite": {"policy": "skip", "limit": 1}})
    result = train(parse_config(raw), report=lambda record: None)
    assert result["steps"] == STEPS
    (note,) = records(parse_config(raw), "note")
    assert "step 5: the loss of rating is not finite" in note["text"] and "this step's update is left out (1 so far)" in note["text"]
    assert np.isfinite([m["click"]["logloss"] for m in result["metrics"].values()]).all()
    manifest = json.loads((folder / f"run/checkpoints/step-{STEPS:09d}-0/manifest.json").read_text())
    assert manifest["loop"]["skipped"] == 1


def test_conversions_without_a_click_are_counted_and_too_many_refused(folder, refused):
    raw = config_of(folder, train={"global_batch_size": 64, "log_every": 1})
    raw["tasks"][1]["parents"] = ["click"]
    clicks = pq.read_table(folder / "data/train/b.parquet")["click"].to_pylist()
    never = [i for i, y in enumerate(clicks) if not y]
    change(folder, "conversion", dict.fromkeys(never[:20], 1))
    where = f"{folder}/data/train/b.parquet, row {never[0]}"
    assert f"label 'conversion': 20 of 200 rows have conversion without click, such as {where}; mend the labels" in refused(raw)
    change(folder, "conversion", dict.fromkeys(never[1:20], 0))
    config = parse_config(raw)
    train(config, report=lambda record: None)
    assert records(config, "train")[-1]["contradictions"] == 1


def test_a_learning_rate_that_explodes(folder):
    raw = config_of(folder, optimizer={"dense": {"kind": "sgd", "lr": 1e30}})
    with pytest.raises(
        DistmtlError, match=r"step \d: the loss of .*rating.* is not finite, at .*parquet, row \d+.*Lower the learning rate"
    ):
        train(parse_config(raw), report=lambda record: None)


def test_a_plug_in_that_cannot_be_imported(folder):
    for target in ("no.such.module:Head", "json:NoSuchName", "json:loads"):
        raw = config_of(folder) | {"model": {"kind": "plugin", "target": target}}
        with pytest.raises(DistmtlError, match=f"model.target '{target}' cannot be built with args"):
            train(parse_config(raw), report=lambda record: None)


# --------------------------------------------------------------------------------------------- run directories, resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    for split, names in (("train", "ab"), ("validation", "a")):
        (folder / "data" / split).mkdir(parents=True)
        for i, name in enumerate(names):
            put(folder / "data" / split / f"{name}.parquet", tiny.table(FILE_ROWS, seed=i))
    train(parse_config(config_of(folder, train=SHORT)), report=lambda record: None)
    return folder


SHORT = {"global_batch_size": 64, "log_every": 1, "eval_every": 100, "save_every": 2, "steps": 4, "keep": 9}
LONG = {**SHORT, "steps": 6}


@pytest.fixture
def copied(finished, folder) -> Path:
    """A copy of it, data included."""
    shutil.rmtree(folder / "data")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def go(raw, resume="auto"):
    return train(parse_config(raw), resume, report=lambda record: None)


def test_a_copied_run_goes_on(copied):
    result = go(config_of(copied, train=LONG))
    assert (result["steps"], result["restarts"]) == (6, 1)


def changed_size(f):
    change(f, "item", {3: 4}, compression="none")
    return ["b.parquet: ", "bytes and 200 rows then", "and 200 now"]


def another_file(f):
    shutil.copy(f / "data/train/a.parquet", f / "data/train/c.parquet")
    return ["- c.parquet added"]


def file_gone(f):
    (f / "data/train/a.parquet").unlink()
    return ["- a.parquet gone"]


def file_renamed(f):
    (f / "data/train/a.parquet").rename(f / "data/train/0.parquet")
    return ["- 0.parquet added", "- a.parquet gone"]


@pytest.mark.parametrize("alter", [changed_size, another_file, file_gone, file_renamed], ids=lambda f: f.__name__)
def test_a_changed_data_set_is_refused_at_resume(copied, refused, alter):
    words = alter(copied)
    message = refused(config_of(copied, train=LONG))
    assert message.startswith(f"data.train {copied}/data/train changed since checkpoint {copied}/run/checkpoints/step-000000004-0: ")
    assert all(w in message for w in words) and "bring the files back, or start another run.dir" in message


OTHER = {
    "batch": ({"train": {**LONG, "global_batch_size": 128}}, ["train.global_batch_size: 64 there, 128 now"]),
    "seed and streams": (
        {"run": {"seed": 5}, "data": {"num_streams": 4}}, ["run.seed: 0 there, 5 now", "data.num_streams: 8 there, 4 now"],
    ),
    "learning rate": (
        {"optimizer": {"dense": {"kind": "adamw", "lr": 0.5}}}, ["optimizer.dense.lr: 0.001 there, 0.5 now"],
    ),
    "model": ({"model": {"num_experts": 5}}, ["model.num_experts: 3 there, 5 now"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_refused_by_field(copied, refused, case):
    sections, words = OTHER[case]
    message = refused(config_of(copied, **{"train": LONG, **sections}))
    assert message.startswith(f"run.dir {copied}/run was made with another config; use its values or another run.dir")
    assert message.count("\n") == len(words) and all(w in message for w in words)


def test_reordered_features_are_another_config(copied, refused):
    raw = config_of(copied, train=LONG)
    raw["features"] = raw["features"][::-1]
    assert "features.(order): ['user', 'item'" in refused(raw)
    raw = config_of(copied, train=LONG)
    raw["features"][1]["rows"] = 60
    assert "features.item.rows: 50 there, 60 now" in refused(raw)


def test_an_exchange_that_is_written_out_is_the_one_that_it_would_be(copied, refused):
    text = (copied / "run/config.yaml").read_text()
    assert "exchange: null" in text
    for written, words in (("fp32", []), ("bf16", ["sharding.exchange: 'bf16' there, 'fp32' now"])):
        (copied / "run/config.yaml").write_text(text.replace("exchange: null", f"exchange: {written}"))
        message = refused(config_of(copied, train=LONG, run={"seed": 5}))  # refused in any case
        assert message.count("\n") == 1 + len(words) and all(w in message for w in words)


def test_a_longer_run_is_another_where_the_learning_rate_decays(copied, refused):
    raw = config_of(copied, train=LONG, optimizer={"schedule": {"decay": "cosine"}})
    message = refused(raw)
    assert "train.steps: 4 there, 6 now" in message and "optimizer.schedule.decay: 'none' there, 'cosine' now" in message


def test_run_directories_that_are_none(folder, refused):
    raw = config_of(folder)
    (folder / "run").write_text("mine")
    assert refused(raw) == f"run.dir {folder}/run is a file; choose another run.dir"
    raw["run"]["dir"] = str(folder / "run" / "below")
    assert refused(raw) == f"run.dir {folder}/run/below cannot be written: Not a directory; choose another run.dir"
    assert (folder / "run").read_text() == "mine"
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("mine")
    raw["run"]["dir"] = str(folder / "thesis")
    assert refused(raw) == f"run.dir {folder}/thesis is not empty and not a run (no config.yaml); choose another run.dir or empty it"


@pytest.mark.parametrize("text", [b"a: [", b"\xff\xfe\x00", b"", b"[1]"])
def test_a_run_whose_config_cannot_be_read(copied, refused, text):
    (copied / "run/config.yaml").write_bytes(text)
    message = refused(config_of(copied, train=LONG))
    assert f"{copied}/run/config.yaml" in message and ("cannot be read" in message or "must be a mapping" in message)


def test_a_run_that_has_lost_its_log_is_still_a_run(copied, refused):
    (copied / "run/metrics.jsonl").unlink()
    assert "was made with another config" in refused(config_of(copied, train=LONG, run={"seed": 5}))


def test_where_a_table_lies_may_change_but_not_what_it_is(copied, refused):
    """Also where the run's own config says nothing of tables."""
    message = refused(config_of(copied, train=LONG, tables={"user": {"memory": "cached", "init_scale": 0.01}}))
    assert message.count("\n") == 1 and "tables.user.init_scale: None there, 0.01 now" in message


def test_resume_never_wants_an_empty_directory(copied, refused):
    message = refused(config_of(copied, train=LONG), "--resume", "never")
    assert message == (f"run.dir {copied}/run already holds a run; choose another run.dir, delete it, or continue it with --resume auto")


def elsewhere(f):
    return config_of(f, train=LONG, run={"dir": str(f / "new")})


def test_resume_from_a_path(copied, refused):
    assert refused(elsewhere(copied), "--resume", str(copied / "no")) == f"checkpoint {copied}/no: no such folder"
    checkpoints = copied / "run/checkpoints"
    newest = checkpoints / "step-000000004-0"

    raw = elsewhere(copied)
    raw["features"][0]["rows"] += 1
    message = refused(raw, "--resume", str(newest))
    assert message.startswith(f"checkpoint {newest} was made with another config") and "features.user.rows: 200 there, 201 now" in message

    shard = next(newest.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    message = refused(elsewhere(copied), "--resume", str(newest))
    assert message == f"checkpoint {newest} is damaged: {shard.name} has {len(whole) - 1} bytes instead of {len(whole)}"
    shard.unlink()
    assert "is damaged: " + shard.name + " has no bytes instead of" in refused(elsewhere(copied), "--resume", str(newest))
    shard.write_bytes(whole)

    manifest = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text(manifest[:-20])
    assert f"checkpoint {newest}: manifest.json is not one of ours, or damaged" in refused(elsewhere(copied), "--resume", str(newest))
    (newest / "manifest.json").write_text(json.dumps({**json.loads(manifest), "format": 99}))
    assert f"checkpoint {newest}: format 99, but this version reads format 1" in refused(elsewhere(copied), "--resume", str(newest))
    (newest / "manifest.json").unlink()
    assert refused(elsewhere(copied), "--resume", str(newest)) == f"checkpoint {newest} is incomplete: it has no manifest.json"

    (checkpoints / "step-000000002-0/manifest.json").unlink()
    message = refused(elsewhere(copied), "--resume", str(copied / "run"))
    assert message.startswith(f"run {copied}/run has no complete checkpoint\n") and message.count("is incomplete") == 2


def test_resume_from_a_path_starts_from_it(copied):
    result = go(elsewhere(copied), str(copied / "run/checkpoints/step-000000002-0"))
    assert result["steps"] == 6 and [r["step"] for r in records(parse_config(elsewhere(copied)), "train")] == [1, 2, 3, 4, 5, 6]


def test_resume_auto_passes_over_damaged_checkpoints_and_says_so(copied):
    newest = copied / "run/checkpoints/step-000000004-0"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    config = parse_config(config_of(copied, train=LONG))
    assert go(config_of(copied, train=LONG))["steps"] == 6
    assert [r["step"] for r in records(config, "train")] == [1, 2, 3, 4, 3, 4, 5, 6]
    (note,) = records(config, "note")
    assert note["text"].startswith(f"checkpoint {newest} is damaged: {shard.name} has ")


def test_a_path_beside_the_runs_own_checkpoint_is_said_to_be_passed_over(copied):
    config = config_of(copied, train=LONG)
    go(config, str(copied / "run/checkpoints/step-000000002-0"))
    (note,) = records(parse_config(config), "note")
    assert note["text"] == (
        f"run.dir {copied}/run holds a checkpoint of its own, which goes before --resume {copied}/run/checkpoints/step-000000002-0"
    )


# ------------------------------------------------------------------------------------- unusual, and none the worse for it


def read_all(folder: Path, **sections):
    """Every batch of the data set, checked first."""
    config = parse_config(config_of(folder, **sections))
    dataset = open_dataset(config.data.train)
    check_dataset(dataset, config, "train")
    return list(Reader(dataset, Collator(config, locate=dataset.locate), 400, 8, 64, None, 0, 1, prefetch=1).batches(0, 1))


def ids_of(folder: Path, feature: str, **sections) -> list[int]:
    (batch,) = read_all(folder, **sections)
    assert batch.error is None, batch.error
    return batch.sparse[feature].values().tolist()


def column(name: str) -> pa.Array:
    return tiny.table(FILE_ROWS, seed=1)[name].combine_chunks()


UNUSUAL = {
    "int32 beside int64": ("item", lambda a: a.cast(pa.int32())),
    "uint64": ("item", lambda a: a.cast(pa.uint64())),
    "int8": ("item", lambda a: a.cast(pa.int8())),
    "dictionary of numbers": ("item", lambda a: a.dictionary_encode()),
    "dictionary of strings": ("city", lambda a: a.dictionary_encode()),
    "large strings": ("city", lambda a: a.cast(pa.large_string())),
    "large list": ("tags", lambda a: a.cast(pa.large_list(pa.int64()))),
    "list of int32": ("tags", lambda a: a.cast(pa.list_(pa.int32()))),
    "list of dictionary": (
        "tags", lambda a: pa.ListArray.from_arrays(a.offsets, pa.array(a.values).dictionary_encode()),
    ),
    "vector as a list": ("image", lambda a: a.cast(pa.list_(pa.float32()))),
    "vector of doubles": ("image", lambda a: a.cast(pa.list_(pa.float64(), 3))),
    "label as a boolean": ("click", lambda a: a.cast(pa.bool_())),
    "label as a double": ("click", lambda a: a.cast(pa.float64())),
    "label as a decimal": ("click", lambda a: a.cast(pa.decimal128(5, 2))),
    "number as float32": ("x", lambda a: a.cast(pa.float32())),
    "weight as a float16": ("w", lambda a: a.cast(pa.float16())),
    "group as int32": ("user", lambda a: a.cast(pa.int32())),
    "group as uint16": ("user", lambda a: a.cast(pa.uint16())),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_types_that_mean_the_same(folder, case):
    name, convert = UNUSUAL[case]
    (expected,) = read_all(folder)
    change(folder, name, convert(column(name)))
    (batch,) = read_all(folder)
    assert batch.error is None, batch.error
    for key in expected.sparse.keys():  # noqa: SIM118
        assert batch.sparse[key].values().tolist() == expected.sparse[key].values().tolist()
        assert batch.sparse[key].lengths().tolist() == expected.sparse[key].lengths().tolist()
    for field in ("dense", "labels", "weights", "groups"):
        assert np.allclose(getattr(batch, field).numpy(), getattr(expected, field).numpy(), atol=1e-3 if "w" in name else 1e-6)


@pytest.mark.parametrize("case", UNUSUAL)
def test_the_other_way_round(folder, case):
    """The unusual file comes first: its type must not rule the others."""
    name, convert = UNUSUAL[case]
    change(folder, name, convert(tiny.table(FILE_ROWS, seed=0)[name].combine_chunks()), "train/a")
    (batch,) = read_all(folder)
    assert batch.error is None, batch.error


def test_a_column_that_is_null_in_a_whole_file(folder):
    """pandas writes it without a type: a label that nobody knows yet, say."""
    names = ["item", "tags", "city", "x", "image", "conversion", "rating"]
    for file, other in (("train/a", "train/b"), ("train/b", "train/a")):
        whole = pq.read_table(folder / f"data/{file}.parquet")
        for name in names:
            change(folder, name, pa.nulls(FILE_ROWS), file)
        (batch,) = read_all(folder)
        assert batch.error is None, batch.error
        half = slice(0, FILE_ROWS) if file == "train/a" else slice(FILE_ROWS, 400)
        assert batch.weights[half, 1:].sum() == 0 and batch.dense[half].abs().sum() == 0
        assert all(batch.sparse[k].lengths()[half].sum() == 0 for k in ("item", "tags", "city"))
        assert batch.sparse["item"].values().tolist() == pq.read_table(folder / f"data/{other}.parquet")["item"].to_pylist()
        put(folder / f"data/{file}.parquet", whole)


def test_strings_as_ids_and_null_ids(folder):
    names = pa.array([None if i % 5 == 0 else f"item {i % 11}" for i in range(FILE_ROWS)])
    change(folder, "item", names, "train/a")
    change(folder, "item", names, "train/b")
    (batch,) = read_all(folder)
    lengths = batch.sparse["item"].lengths().numpy()
    assert lengths.reshape(8, 50)[:, ::5].sum() == 0 and lengths.sum() == 320
    assert len(set(batch.sparse["item"].values().tolist())) <= 11 and max(batch.sparse["item"].values().tolist()) < 50

    numbers = pa.array([None if i % 5 == 0 else i % 50 for i in range(FILE_ROWS)])
    for name in ("train/a", "train/b"):
        change(folder, "item", numbers, name)
    assert ids_of(folder, "item") == [i % 50 for i in range(FILE_ROWS) if i % 5] * 2
    for name in ("train/a", "train/b"):
        change(folder, "tags", {0: None}, name)
    assert read_all(folder)[0].sparse["tags"].lengths()[0] == 0


@pytest.mark.parametrize("policy", ["hash", "clip"])
def test_ids_outside_the_table_are_replaced_and_counted(folder, policy):
    raw = config_of(folder)
    raw["features"][1]["out_of_range"] = policy
    before = ids_of(folder, "item")
    outside = {3: 50, 4: -1, 5: 2**62, 6: 50}
    change(folder, "item", outside)
    features = raw["features"]
    (batch,) = read_all(folder, features=features)
    ids = batch.sparse["item"].values().tolist()
    assert batch.replaced_ids == 4
    assert {i for i, (a, b) in enumerate(zip(ids, before, strict=True)) if a != b} <= {FILE_ROWS + i for i in outside}
    replaced = [ids[FILE_ROWS + i] for i in outside]
    assert replaced[0] == replaced[3] and all(0 <= i < 50 for i in replaced)
    assert (replaced == [49] * 4) == (policy == "clip")

    ids = column("item").to_numpy().astype(np.uint64)
    ids[3] = 2**63 + 5
    change(folder, "item", pa.array(ids))
    (batch,) = read_all(folder, features=features)
    assert batch.replaced_ids == 1 and 0 <= batch.sparse["item"].values()[FILE_ROWS + 3] < 50


def test_whole_numbers_of_any_size(folder):
    """Timestamps and money are integers that float32 cannot hold exactly."""
    for name in ("train/a", "train/b"):
        change(folder, "x", pa.array(np.full(FILE_ROWS, 1_700_000_000_123_456_789)), name)
        change(folder, "rating", pa.array(np.full(FILE_ROWS, 2**24 + 1)), name)
        change(folder, "user", pa.array(np.full(FILE_ROWS, 2**63 + 7, dtype=np.uint64)), name)
    raw = config_of(folder)
    raw["features"][0]["out_of_range"] = "hash"
    (batch,) = read_all(folder, features=raw["features"])
    assert batch.error is None and batch.dense[:, 0].numpy() == pytest.approx(1.7e18, rel=1e-6)
    assert batch.labels[:, 2].numpy() == pytest.approx(2**24, rel=1e-6)
    assert len(set(batch.groups.tolist())) == 1


def test_an_empty_row_group_and_an_empty_file(folder):
    expected = ids_of(folder, "item")
    table = tiny.table(FILE_ROWS, seed=1)
    with pq.ParquetWriter(folder / "data/train/b.parquet", table.schema) as writer:
        for part in (table[:0], table[:70], table[:0], table[70:], table[:0]):
            writer.write_table(part)
    put(folder / "data/train/a0.parquet", table[:0])
    put(folder / "data/train/z.parquet", table[:0])
    assert ids_of(folder, "item") == expected
    (batch,) = read_all(folder)
    assert batch.rows.tolist() == list(range(400))
    dataset = open_dataset(str(folder / "data/train"))
    assert dataset.locate(200).endswith("b.parquet, row 0") and dataset.locate(399).endswith("b.parquet, row 199")


def test_columns_that_nobody_reads_may_be_anything(folder):
    path = folder / "data/train/b.parquet"
    table = pq.read_table(path)
    n = table.num_rows
    table = (
        table.append_column("struct", pa.array([{"item": 999, "user": -1}] * n))
        .append_column("blob", pa.array([b"\xff"] * n))
        .append_column("when", pa.array(np.full(n, "2024-01-01", dtype="datetime64[us]")))
        .append_column("map", pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())))
        .append_column("click.list.element", pa.array([7] * n))
        .append_column("item.x", pa.array([-7] * n))
        .append_column("nothing", pa.nulls(n))
        .append_column("broken", pa.array(np.random.default_rng(0).integers(0, 2**60, n)))
        .append_column("row", pa.array([0] * n))  # twice
        .append_column("tags ", pa.array([["x"]] * n))
    )
    put(path, table, compression="zstd")
    index = table.schema.names.index("broken")
    leaf = next(c for c in range(200) if pq.read_metadata(path).row_group(0).column(c).path_in_schema == "broken")
    with path.open("r+b") as file:
        for g in range(pq.read_metadata(path).num_row_groups):
            meta = pq.read_metadata(path).row_group(g).column(leaf)
            file.seek(meta.dictionary_page_offset or meta.data_page_offset)
            file.write(bytes(meta.total_compressed_size))
    assert index and ids_of(folder, "item")[FILE_ROWS:] == column("item").to_pylist()


def test_a_column_whose_name_holds_dots(folder):
    for name in ("train/a", "train/b"):
        path = folder / f"data/{name}.parquet"
        put(path, renamed(path, {"item": "item.id", "tags": "item.tags"}))
    raw = config_of(folder)
    raw["features"][1]["column"], raw["features"][2]["column"] = "item.id", "item.tags"
    assert ids_of(folder, "item", features=raw["features"])[FILE_ROWS:] == column("item").to_pylist()
    change(folder, "item.id", {190: 50})
    with pytest.raises(DistmtlError, match="feature 'item': id 50 in .*b.parquet, row group 3"):
        read_all(folder, features=raw["features"])


def test_two_features_of_one_column_are_both_checked(folder):
    raw = config_of(folder)
    wide = {"kind": "id", "name": "item2", "column": "item", "rows": 1000, "dim": 4}
    for features in ([*raw["features"], wide], [wide, *raw["features"]]):
        change(folder, "item", {190: 50})
        with pytest.raises(DistmtlError, match="feature 'item': id 50 in .*b.parquet, row group 3"):
            read_all(folder, features=features)
        change(folder, "item", {190: 49})
        assert len(ids_of(folder, "item2", features=features)) == 400


def test_labels_known_in_one_row_group_only(folder):
    change(folder, "conversion", pa.nulls(FILE_ROWS, pa.int8()), "train/a", write_statistics=False)
    change(folder, "conversion", pa.array([None] * 199 + [1], pa.int8()), write_statistics=False)
    (batch,) = read_all(folder)
    assert (batch.weights[:, 1] > 0).sum() == 1


def test_files_that_are_not_data_are_left_alone(folder):
    train_set = folder / "data/train"
    (train_set / "_SUCCESS").write_text("")
    (train_set / "notes.txt").write_text("not data")
    for hidden in ("_temporary", ".staging"):
        (train_set / hidden).mkdir()
        (train_set / hidden / "c.parquet").write_text("half-written")
    assert len(ids_of(folder, "item")) == 400


def test_a_row_number_leads_to_its_file(folder):
    dataset = open_dataset(str(folder / "data/train"))
    table = pq.read_table(folder / "data/train/b.parquet").append_column(ROW, pa.array(np.arange(200, 400)))
    table = table.set_column(table.schema.names.index("item"), "item", pa.array([60] * FILE_ROWS))
    with pytest.raises(DistmtlError, match="b.parquet, row 0 is outside"):
        Collator(parse_config(config_of(folder)), locate=dataset.locate)(table)


def test_the_config_command_shows_what_a_run_would_use(folder, capfd):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(folder)))
    assert main(["config", str(path), "train.epochs=3"]) == 0
    (folder / "shown.yaml").write_text(capfd.readouterr().out)
    assert load_config(folder / "shown.yaml") == load_config(path, ["train.epochs=3"])
    assert main(["config", str(path), "run.dir=null", "name=mine"]) == 0
    assert "\n  dir: runs/mine\n" in capfd.readouterr().out
    assert main(["config", str(path), "train.epoch=3"]) == 1
    assert capfd.readouterr().err.endswith("- train.epoch: unknown key; did you mean 'epochs'?\n")
