"""Public data sets: raw files that are not whole are refused by name, whole ones become the published splits."""

import bz2
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distmtl.config_file import load_config
from distmtl.data.prepare import census_income, movielens, prepare
from distmtl.data.prepare.raw import edges
from distmtl.errors import DistmtlError

DATA = Path(__file__).parents[2] / "shared/data"
SPLITS = ("train", "validation", "test")
HEADS = ("mmoe", "ple", "shared_bottom")


def _raw(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no raw files at {DATA / name}")
    return DATA / name


def _person(**columns: object) -> str:
    values: dict[str, object] = (
        dict.fromkeys(census_income.COLUMNS, "?") | dict.fromkeys(census_income.NUMERIC, 0) | {"income_50k": "- 50000."} | columns
    )
    return ", ".join(str(v) for v in values.values())


def _write_census(folder: Path, train: list[str], test: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "census-income.data").write_text("\n".join(train) + "\n")
    (folder / "census-income.test").write_text("\n".join(test) + "\n")
    return folder


def _refused(tmp_path: Path, match: str, name: str = "census-income", /, **options: object) -> None:
    with pytest.raises(DistmtlError, match=match) as e:
        prepare(name, tmp_path / "raw", tmp_path / "out", **options)
    assert len(str(e.value).splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"raw"}  # nothing half-written


# -------------------------------------------------------------------------------------------------------- hand-made files


@pytest.fixture
def tiny_census(tmp_path, monkeypatch) -> Path:
    """Six and four people, and a census-income that expects so many."""
    monkeypatch.setattr(census_income, "ROWS", {"data": 6, "test": 4})
    train = [_person(age=20 + i, sex=["Male", "Female", "NA"][i % 3], race="?", education="Bachelors") for i in range(5)]
    train.append(_person(marital_stat="Never married", income_50k="50000+."))
    return _write_census(tmp_path / "raw", train, [_person(sex="Other"), _person(sex="NA"), _person(race="?"), _person(sex="Male")])


def test_levels_are_numbered_by_the_train_split_and_strangers_are_0(tiny_census, tmp_path):
    prepare("census-income", tiny_census, tmp_path / "out")
    levels = json.loads((tmp_path / "out/categories.json").read_text())
    assert levels["sex"] == ["?", "Female", "Male", "NA"]
    rows = {s: pq.read_table(tmp_path / "out" / s).to_pandas() for s in SPLITS}
    assert rows["train"].sex.tolist() == [3, 2, 4, 3, 2, 1]
    assert sorted([*rows["validation"].sex, *rows["test"].sex]) == [0, 1, 3, 4]
    assert rows["train"].income.tolist() == rows["train"].never_married.tolist() == [0, 0, 0, 0, 0, 1]
    assert not any(table.isna().any(axis=None) for table in rows.values())


def test_protocols_differ_in_education_only(tiny_census, tmp_path):
    names = {}
    for protocol in ("P1", "P2"):
        prepare("census-income", tiny_census, tmp_path / protocol, protocol=protocol)
        names[protocol] = {f.source for f in load_config(tmp_path / protocol / "mmoe.yaml").features}
        assert names[protocol] <= set(pq.read_table(tmp_path / protocol / "train").column_names)
    assert names["P2"] - names["P1"] == {"education"}
    assert not names["P2"] & {"marital_stat", "instance_weight", "income_50k"}


def test_compressed_files_are_read(tiny_census, tmp_path):
    prepare("census-income", tiny_census, tmp_path / "plain")
    plain = tiny_census / "census-income.data"
    plain.with_suffix(".data.bz2").write_bytes(bz2.compress(plain.read_bytes()))
    plain.unlink()
    prepare("census-income", tiny_census, tmp_path / "packed")
    assert pq.read_table(tmp_path / "packed/train").equals(pq.read_table(tmp_path / "plain/train"))


def test_a_truncated_archive_is_refused(tiny_census, tmp_path):
    plain = tiny_census / "census-income.data"
    plain.with_suffix(".data.bz2").write_bytes(bz2.compress(plain.read_bytes())[:-20])
    plain.unlink()
    _refused(tmp_path, r"census-income\.data\.bz2")


def test_a_line_cut_short_is_refused(tiny_census, tmp_path):
    (tiny_census / "census-income.test").write_text(f"{_person()}\n{_person()}\n{_person()}\n{_person()[:60]}")
    _refused(tmp_path, r"census-income\.test cannot be read as 42 columns.*download it again")


def test_missing_rows_are_counted(tiny_census, tmp_path):
    (tiny_census / "census-income.data").write_text(f"{_person()}\n")
    _refused(tmp_path, r"census-income\.data has 1 rows, the published file has 6")


def test_a_number_that_is_none_is_refused(tiny_census, tmp_path):
    (tiny_census / "census-income.test").write_text("\n".join([_person(), _person(), _person(), _person(age="old")]))
    _refused(tmp_path, "column age holds something that is not a number.*old")


@pytest.mark.parametrize(("name", "file"), [("census-income", "census-income.data"), ("movielens-1m", "test_1m1.dat")])
def test_a_missing_file_says_what_to_download(tmp_path, name, file):
    (tmp_path / "raw").mkdir()
    _refused(tmp_path, rf"{file}.* is not in .*download (Census-Income|MovieLens)", name)


def test_unknown_names_options_and_folders_are_refused(tmp_path):
    _refused(tmp_path, "no such folder")
    (tmp_path / "raw").mkdir()
    _refused(tmp_path, "no data set 'mnist'; there are census-income, movielens-1m", "mnist")
    _refused(tmp_path, "census-income has no option fold; it has protocol", fold=1)
    _refused(tmp_path, "census-income has no option source, name; it has protocol", source="x", name="y")
    _refused(tmp_path, "protocol 'P3' is not one of P1, P2", protocol="P3")
    _refused(tmp_path, r"fold 6 is not in 1 … 5", "movielens-1m", fold=6)


def test_original_movielens_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "ROWS", 40)
    monkeypatch.setattr(movielens, "USERS", 4)
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ratings.dat").write_text("".join(f"{u}::{i}::{(u + i) % 5 + 1}::97830{u}\n" for u in range(1, 5) for i in range(1, 11)))
    (raw / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-12\n3::M::25::15::55117\n4::M::45::7::02460\n")
    (raw / "movies.dat").write_bytes(b"".join(f"{i}::Caf\xe9, {i} (19{60 + i})::Drama|War\n".encode("latin-1") for i in range(1, 11)))
    prepare("movielens-1m", raw, tmp_path / "out", fold="2")
    rows = {s: pq.read_table(tmp_path / "out" / s).to_pandas() for s in SPLITS}
    assert [len(rows[s]) for s in SPLITS] == [30, 2, 8]
    whole = np.concatenate([rows[s][["user_id", "item_id"]] for s in SPLITS])
    assert len(np.unique(whole, axis=0)) == 40
    first = rows["train"].iloc[0]
    assert first.year == 1960 + first.item_id
    assert first.rating == (first.user_id + first.item_id) % 5 + 1
    assert (first.like, first.love) == (first.rating >= 4, first.rating == 5)
    assert set(rows["train"].zip_prefix) <= {480, 700, 551, 24}


def test_edges_part_zero_from_the_rest():
    assert edges(np.array([0, 0, 0, 0, 5.0, 7.0]), 30) == [5.0, 7.0]
    assert edges(np.arange(101.0), 4) == [1.0, 25.0, 50.0, 75.0]
    assert edges(np.zeros(3), 4) == [1.0]


# ------------------------------------------------------------------------------------------------------- the real files


@pytest.fixture(scope="module")
def census(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("census") / "out"
    prepare("census-income", _raw("census_income"), out)
    return out


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("movielens") / "out"
    prepare("movielens-1m", _raw("movielens_1m"), out)
    return out


def test_census_has_the_published_rows_and_rates(census):
    rows = {s: pq.read_table(census / s).to_pandas() for s in SPLITS}
    assert [len(rows[s]) for s in SPLITS] == [199_523, 49_881, 49_881]
    assert rows["train"].income.sum() == 12_382
    assert rows["validation"].income.sum() + rows["test"].income.sum() == 6_186
    assert rows["train"].never_married.mean() == pytest.approx(0.4335, abs=1e-4)
    assert rows["train"].shape[1] == 38 + 2  # 31 categorical and 7 numeric inputs under P1, two labels


@pytest.mark.parametrize("head", HEADS)
def test_census_config_loads_and_fits(census, head):
    config = load_config(census / f"{head}.yaml")
    assert config.model.kind == head
    sources = {f.source for f in config.features}
    assert not sources & {"education", "marital_stat", "instance_weight"}
    assert len(sources) == 38
    rows = pq.read_table(census / "test").to_pandas()
    for feature in config.embedded:
        if feature.kind == "id":
            assert rows[feature.source].max() < feature.rows, feature.name


def test_movielens_has_the_published_folds(movies):
    rows = {s: pq.read_table(movies / s, columns=["user_id", "item_id", "rating", "like"]).to_pandas() for s in SPLITS}
    assert [len(rows[s]) for s in SPLITS] == [760_160, 40_008, 200_041]
    keys = np.concatenate([rows[s].user_id * 10_000 + rows[s].item_id for s in SPLITS])
    assert len(np.unique(keys)) == len(keys) == 1_000_209
    assert rows["train"].like.mean() == pytest.approx(0.575, abs=0.002)
    raw = np.loadtxt(_raw("movielens_1m") / "test_1m5.dat", delimiter=",", dtype=np.int64)
    assert set(raw[:, 0] * 10_000 + raw[:, 1]) == set(rows["test"].user_id * 10_000 + rows["test"].item_id)


@pytest.mark.parametrize("head", HEADS)
def test_movielens_config_loads_and_fits(movies, head):
    config = load_config(movies / f"{head}.yaml")
    assert [t.kind for t in config.tasks] == ["regression", "binary", "binary"]
    assert config.data.group == "user_id"
    rows = pq.read_table(movies / "train").to_pandas()
    for feature in config.embedded:
        if feature.kind == "id":
            ids = np.concatenate(rows[feature.source].to_list()) if feature.name == "genres" else rows[feature.source]
            assert 0 <= ids.min() <= ids.max() < feature.rows, feature.name
