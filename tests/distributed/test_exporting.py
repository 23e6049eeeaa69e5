"""What is exported predicts what the checkpoint does: every head, kind of task and feature; deltas; damage is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import every_task
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_head_contract
import test_sequence_tables
import tiny
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from worlds import run_world, train_world

from distmtl import Predictor
from distmtl import export as write_export
from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.errors import DistmtlError
from distmtl.exporting import program, publishing
from distmtl.exporting.manifest import MANIFEST, MODEL, Manifest, RowFormat, complete
from distmtl.exporting.publishing import published
from distmtl.exporting.row_formats import pack, unpack
from distmtl.exporting.table_rows import stored_tables
from distmtl.exporting.writer import _new_folder, export_delta
from distmtl.run_directory import find_checkpoint
from distmtl.serving.batch import in_this_process, open_job, predict
from distmtl.serving.comparison import Comparison, checkpoint_predictions, compare, first_rows, refuse_apart
from distmtl.serving.following import Model
from distmtl.serving.openapi import example
from distmtl.serving.request import Limits, parse_rows

quiet = lambda text: None  # noqa: E731


def export(path: str, out: Path | str, row_format: RowFormat = "fp32") -> Manifest:
    """In a process of its own, as every test that trains wants it: torch.export leaves threads behind, and ranks are forked."""
    return run_world(_export, 1, path, str(out), row_format)[0]


def _export(path: str, out: str, row_format: RowFormat) -> Manifest:
    return write_export(path, out, row_format, say=quiet)


def publish(checkpoint: str, folder: Path, full_every: int) -> Manifest:
    return run_world(_publish, 1, checkpoint, folder, full_every)[0]


def _publish(checkpoint: str, folder: Path, full_every: int) -> Manifest:
    return publishing.publish(checkpoint, folder, full_every=full_every, say=quiet)


def _compare(path: str, out: str) -> list[Comparison]:
    return compare(path, out, rows=300)


def trained(config: Config, steps: int = 3, workers: int = 1) -> Config:
    limits = {"steps": steps, "epochs": 1, "eval_every": steps, "save_every": steps}
    config = config.model_copy(update={"train": config.train.model_copy(update=limits)})
    train_world(config, workers)
    return config


def apart(config: Config, out: Path) -> float:
    """The largest difference of a prediction."""
    export(config.run_dir, out)
    found = run_world(_compare, 1, config.run_dir, str(out))[0]
    refuse_apart(found)
    assert [c.task for c in found] == [t.name for t in config.tasks]
    answers_its_example(out)
    return max(c.difference for c in found)


def answers_its_example(out: Path) -> None:
    """The request that OpenAPI and `distmtl serve` show is one that the model answers."""
    model = Model.load(out, Limits())
    body = example(model.predictor.manifest, model.predictor.config, model.columns, model.limits)
    for scores in model.predictor(parse_rows(body, model.columns, model.fusion, model.limits).table).values():
        assert len(scores) == 2 and np.isfinite(scores).all()


@pytest.mark.parametrize("head", test_head_contract.HEADS)
def test_every_head(tiny_data, tmp_path, head):
    assert apart(trained(test_head_contract.config_for(head, tiny_data, tmp_path / "run")), tmp_path / "out") <= 1e-5


def test_a_domain_that_was_never_trained_on(tiny_data, tmp_path):
    raw = test_head_contract.config_for("star", tiny_data, tmp_path / "run").model_dump(mode="json")
    next(f for f in raw["features"] if f["name"] == "domain")["rows"] = 4
    config = trained(parse_config(raw))
    export(config.run_dir, tmp_path / "out")
    predictor, table = Predictor(tmp_path / "out"), rows_of(config, 3)
    assert predictor.manifest.domains == [0, 1, 2]
    with pytest.raises(DistmtlError, match="domain 3 of row 1 was never seen in training"):
        predictor(unseen := table.set_column(table.schema.names.index("domain"), "domain", [[0, 3, 1]]))
    pq.write_table(unseen, tmp_path / "unseen.parquet")
    job = open_job(str(tmp_path / "out"), str(tmp_path / "unseen.parquet"), str(tmp_path / "predictions"), max_rejected=1)
    assert predict(job, in_this_process, say=quiet)["rejected"] == 1  # that row alone
    assert pq.read_table(tmp_path / "predictions/part-000000.parquet")["row"].to_pylist() == [0, 2]


SHARDED = [("row_wise", "sgd", 2), ("column_wise", "adagrad", 2), ("table_wise", "sgd", 1)]


@pytest.mark.parametrize(("sharding", "optimizer", "workers"), SHARDED)
def test_sequences_and_every_way_to_shard(tiny_data, tmp_path, sharding, optimizer, workers):
    config = test_sequence_tables.config_for(tiny_data, tmp_path / "run", sharding=sharding, optimizer=optimizer)
    assert apart(trained(config, workers=workers), tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("interaction", [{"kind": "dot"}, {"kind": "cross", "layers": 2}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interactions_and_precisions(tiny_data, tmp_path, interaction, precision):
    raw = tiny.raw(tiny_data, tmp_path / "run", interaction=interaction)
    raw["features"] = [{**f, **({"dim": 8} if "dim" in f else {})} for f in raw["features"]]
    raw["features"][-1]["project"] = 2
    raw["train"]["precision"] = precision
    assert apart(trained(parse_config(raw)), tmp_path / "out") <= 1e-5


def test_every_kind_of_task_calibrated_by_slices(tmp_path):
    """Each predicts what `prediction` says; the click is calibrated by domain."""
    for split, rows in (("train", 1501), ("validation", 700)):
        (tmp_path / split).mkdir()
        pq.write_table(every_task.table(rows, len(split)), tmp_path / split / "a.parquet")
    tasks = [{"tower": [8], **task} for task, _ in every_task.TASKS]
    tasks[0]["calibration"] = {"kind": "platt", "slices": "domain", "min_rows": 50}
    raw = tiny.raw(tmp_path, tmp_path / "run", model={"kind": "esmm"}, tasks=tasks)
    raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
    config = trained(parse_config(raw))
    assert apart(config, tmp_path / "out") <= 1e-5
    predictor = Predictor(tmp_path / "out")
    assert list(predictor.manifest.calibrations) == ["click"] and "length" in predictor.schema.names
    got = predictor(pq.read_table(tmp_path / "validation").slice(0, 50))
    assert got["genre"].shape == (50, 4) and got["genre"].sum(1) == pytest.approx(np.ones(50), abs=1e-5)
    assert (got["click"] >= 0).all() and (got["click"] <= 1).all() and got["spent"].min() >= 0


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Config:
    """Six steps, with a checkpoint after three."""
    config = tiny.config(tiny_data, tmp_path_factory.mktemp("run"), train={"steps": 6, "save_every": 3, "eval_every": 3, "keep": 9})
    train_world(config, 1)
    return config


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export(run.run_dir, out)
    return out


def rows_of(config: Config, n: int = 64):
    return pq.read_table(config.data.validation).slice(0, n)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64])
def test_any_number_of_rows(run, exported, n):
    table = rows_of(run, 128)
    few, all_ = Predictor(exported)(table.slice(5, n)), Predictor(exported)(table)
    for task, values in few.items():
        assert values.shape == (n,) and np.abs(values - all_[task][5 : 5 + n]).max(initial=0) <= 1e-6


def test_other_columns_than_in_training(run, exported):
    """A string would be hashed where an integer was a row of the table: another row's embedding, without a word."""
    predictor, table = Predictor(exported), rows_of(run, 2)
    for name, values, words in (
        ("user", ["1", "2"], "holds strings"),
        ("city", [1.0, 2.0], "trained on strings"),
        ("x", ["", ""], "trained on numbers"),
    ):
        table = table.set_column(table.schema.names.index(name), name, pa.array(values))
        with pytest.raises(DistmtlError, match=words):
            predictor(table)
    with pytest.raises(DistmtlError, match="4 mistakes") as refused:  # all of them at once
        predictor(table.drop_columns(["item"]))
    assert "column 'item' is missing in the table" in str(refused.value)


def test_ids_may_be_floats_that_are_whole(run, exported):
    """pandas makes them of integers where one is null; NaN is null too."""
    predictor, table = Predictor(exported), rows_of(run, 3)
    given = lambda values: table.set_column(table.schema.names.index("user"), "user", values)  # noqa: E731
    expected = predictor(given(pa.array([7, None, 9])))
    for values in (pa.array([7.0, None, 9.0]), pa.array(np.array([7, np.nan, 9], np.float32))):
        for task, predicted in predictor(given(values)).items():
            np.testing.assert_array_equal(predicted, expected[task])
    for value, words in ((2.5, "2.5 at row 1 is not whole"), (np.inf, "inf at row 1"), (2.0**53, "beyond the integers that a double")):
        with pytest.raises(DistmtlError, match=f"column 'user': .*{words}"):
            predictor(given(pa.array([7.0, value, 9.0])))


def test_files_that_mix_types(tmp_path):
    """As training reads them."""
    for i, columns in enumerate(
        ([pa.array([1, 2], pa.int32()), pa.array(["a", "b"]).dictionary_encode()], [pa.array([3], pa.uint64()), ["c"]])
    ):
        pq.write_table(pa.table(columns, names=["id", "city"]), tmp_path / f"{i}.parquet")
    dataset = open_dataset(str(tmp_path))
    assert first_rows(dataset, ["city", "id"], 9).to_pydict() == {"city": ["a", "b", "c"], "id": [1, 2, 3]}
    assert first_rows(dataset, ["id"], 1).to_pydict() == {"id": [1]}


def test_rows_without_any_id(tiny_data, tmp_path):
    """Lists that are all empty, one row: less than a program has ever seen."""
    config = trained(test_sequence_tables.config_for(tiny_data, tmp_path / "run"))
    export(config.run_dir, tmp_path / "out")
    table = rows_of(config, 200)
    lengths = np.array([len(tags) for tags in table["tags"].to_pylist()])
    empty, first = table.take(np.flatnonzero(lengths == 0)[:1]), table.slice(0, 1)
    predictor = Predictor(tmp_path / "out")
    for some in (empty, first):
        expected, got = run_world(checkpoint_predictions, 1, config.run_dir, some)[0], predictor(some)
        assert all(np.abs(expected[t] - got[t]).max() <= 1e-6 for t in expected)


def test_quantised_rows(tiny_data, tmp_path):
    """int8 lies within half a step of the row's range, and ranks as well; fp16 within its rounding."""
    rows = torch.randn(100, 16)
    step = (rows.amax(1) - rows.amin(1)) / 255
    assert ((unpack(pack(rows, "int8")) - rows).abs() <= 0.5 * step[:, None] + 5e-3).all()  # 5e-3: scale and bias are float16
    assert (unpack(pack(rows, "fp16")) - rows).abs().max() <= 2e-3
    config = tiny.config(tiny_data, tmp_path / "run", train={"epochs": 3})
    train_world(config, 1)
    table = pq.read_table(config.data.validation)
    known, scores = table["click"].to_numpy(), {}
    for row_format in ("fp32", "fp16", "int8"):
        export(config.run_dir, tmp_path / row_format, row_format)
        scores[row_format] = Predictor(tmp_path / row_format)(table)["click"]
    auc = {name: roc_auc_score(known, s) for name, s in scores.items()}
    assert abs(auc["int8"] - auc["fp32"]) <= 1e-3 and abs(auc["fp16"] - auc["fp32"]) <= 1e-3
    assert 0 < np.abs(scores["fp16"] - scores["fp32"]).max() < np.abs(scores["int8"] - scores["fp32"]).max() < 0.02
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("tables/*/*")) for name in scores}
    assert size["int8"] < size["fp16"] < size["fp32"]


def test_tables_are_read_in_blocks_of_any_size(run, monkeypatch):
    """What torch itself loads, from a file that holds many tensors."""
    found = find_checkpoint(run.run_dir)
    name = "tables/model.embeddings.embedding_bags.user.weight"
    expected = {name: torch.zeros(200, 8)}
    torch.distributed.checkpoint.load(expected, checkpoint_id=found.path)
    table = stored_tables(found)["user"]
    for rows in (1, 7, 200, 1000):
        monkeypatch.setattr("distmtl.exporting.table_rows.BLOCK_BYTES", 4 * 8 * rows)
        table.__dict__.pop("block_rows", None)
        assert torch.equal(torch.cat([b for _, b in table.blocks()]), expected[name])


def test_deltas_make_the_newer_export_of_the_older(run, tmp_path):
    """The bytes are the same as a full export's, only changed rows are in it; retention keeps what serving needs."""
    old, new = (str(p) for p in sorted((Path(run.run_dir) / "checkpoints").iterdir()))
    folder = tmp_path / "published"
    first = publish(old, folder, 3)
    second = publish(new, folder, 3)
    assert publish(new, folder, 3) == second  # a restart publishes nothing twice
    found = published(folder)
    assert found is not None and found.newest == second and second.base == first.digest and (first.sequence, second.sequence) == (0, 1)
    export(new, tmp_path / "new")
    updated, whole = Predictor(found.full), Predictor(tmp_path / "new")
    for delta in found.deltas:
        updated.apply(delta)
    for table, weights in whole.lookup.weights.items():
        assert torch.equal(updated.lookup.weights[table], weights), table
    a, b = updated(rows_of(run)), whole(rows_of(run))
    assert all(np.array_equal(a[task], b[task]) for task in a)
    changed = load_file(found.deltas[0] / "tables/user/changed.safetensors")
    assert 0 < len(changed["rows"]) < 200  # six steps of 128 rows do not touch every user
    with pytest.raises(DistmtlError, match="is a delta"):
        Predictor(found.deltas[0])
    with pytest.raises(DistmtlError, match="apply those between first"):
        whole.apply(found.deltas[0])
    publish(old, folder, 3)
    publish(new, folder, 3)
    assert [p.name for p in sorted(folder.iterdir())] == ["000000-full", "000001-delta", "000002-delta", "000003-full"]
    for checkpoint in (old, new, old):
        publish(checkpoint, folder, 1)
    assert [p.name for p in sorted(folder.iterdir())] == ["000005-full", "000006-full"]


def test_a_changed_model_is_published_whole(run, tiny_data, tmp_path):
    """Its delta's rows and program would be read by the config of the export before it: one task's prediction under another's name."""
    raw = tiny.raw(tiny_data, Path(run.run_dir).with_name("changed"))
    raw["tasks"] = raw["tasks"][::-1]
    changed, folder = trained(parse_config(raw)), tmp_path / "published"
    before, after = (str(find_checkpoint(c.run_dir).path) for c in (run, changed))
    publish(before, folder, 9)
    assert not publish(after, folder, 9).is_delta
    base = Predictor(folder / "000000-full").manifest
    run_world(_delta, 1, after, str(changed.run_dir), base, str(tmp_path / "delta"))
    with pytest.raises(DistmtlError, match="is of another model"):
        Predictor(folder / "000000-full").prepare(tmp_path / "delta")


@pytest.mark.parametrize("tables", [{}, {"user": {"memory": "cached", "cache": 0.1, "sharding": ["row_wise"]}}])
def test_where_tables_lie_in_training_is_nothing_to_serving(exported, tables):
    """Nor do manifests that are older than an option differ by it; another table does."""
    manifest = Predictor(exported).manifest
    assert manifest.serves_like({**manifest.config, "tables": tables}, manifest.columns)
    assert not manifest.serves_like({**manifest.config, "features": manifest.config["features"][1:]}, manifest.columns)


def test_a_run_that_was_begun_anew_is_another(tiny_data, tmp_path):
    """Of the same names, but a delta since its checkpoint is none since what was published, which would be served half changed."""
    config, folder = (
        tiny.config(tiny_data, tmp_path / "run", train={"steps": 4, "save_every": 2, "eval_every": 2, "keep": 9}),
        tmp_path / "all",
    )
    train_world(config, 1)
    publish(str(sorted((tmp_path / "run/checkpoints").iterdir())[0]), folder, 9)
    shutil.rmtree(tmp_path / "run")
    train_world(config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})}), 1)
    anew, later = (str(c) for c in sorted((tmp_path / "run/checkpoints").iterdir()))
    assert not publish(later, folder, 9).is_delta
    assert publish(anew, folder, 9).sequence == 2


def _delta(checkpoint: str, since: str, base: Manifest, out: str) -> None:
    export_delta(checkpoint, since, base, out, say=quiet)


def test_after_a_damaged_export_the_next_is_full(run, tmp_path):
    old, new = (str(p) for p in sorted((Path(run.run_dir) / "checkpoints").iterdir()))
    publish(old, tmp_path, 9)
    (tmp_path / "000000-full" / MODEL).write_bytes(b"")
    assert not publish(new, tmp_path, 9).is_delta
    found = published(tmp_path)
    assert found is not None and found.full.name == "000001-full"


@pytest.mark.parametrize("spoil", [{"rows": torch.tensor([200])}, {"rows": torch.tensor([-1])}, {"weight": torch.zeros(1, 4)}])
def test_rows_that_a_table_does_not_have(exported, tmp_path, spoil):
    """They would be written beyond the kernel's memory, or over other rows: refused before anything is taken in."""
    predictor, delta = Predictor(exported), damaged(exported, tmp_path)
    shutil.rmtree(delta / "tables")
    (delta / "tables/user").mkdir(parents=True)
    save_file({"rows": torch.tensor([0]), "weight": torch.zeros(1, 8)} | spoil, delta / "tables/user/changed.safetensors")
    complete(delta, predictor.manifest.model_copy(update={"base": predictor.manifest.digest, "sequence": 1}))
    with pytest.raises(DistmtlError, match="does not have"):
        predictor.prepare(delta)
    (delta / "tables/user/changed.safetensors").unlink()
    complete(delta, predictor.manifest)
    with pytest.raises(DistmtlError, match=r"0 of 200 rows of table 'user'"):
        Predictor(delta)


def damaged(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_damage_is_named(exported, tmp_path):
    copy = damaged(exported, tmp_path)
    table = next(copy.glob("tables/user/*"))
    content = table.read_bytes()
    table.write_bytes(content[:-8] + bytes([255 - b for b in content[-8:]]))
    with pytest.raises(DistmtlError, match=r"damaged: tables/user/000000000.safetensors has other bytes"):
        Predictor(copy)
    table.write_bytes(content[:-1])
    with pytest.raises(DistmtlError, match=r"is missing or cut short"):
        Predictor(copy)
    table.write_bytes(content)
    manifest = json.loads((copy / MANIFEST).read_text())
    for change, words in (({"format": 99}, "format 99"), ({"hash_version": 0}, "hashes strings"), ({"columns": 3}, "damaged")):
        (copy / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(DistmtlError, match=words):
            Predictor(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(DistmtlError, match="is no export"):
        Predictor(copy)


RUN = "__import__('os').system('touch pwned')"  # torch.export.load evaluates sizes, and calls what operators are named


def _with(parts: dict[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file


def test_no_pickle_is_loaded_and_no_code(exported, tmp_path, monkeypatch):
    """Whatever an archive claims: torch would unpickle, import, evaluate and call it."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(exported / MODEL) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights, sample, graph = (
        f"archive/{n}" for n in ("data/weights/model_weights_config.json", "data/sample_inputs/model.pt", "models/model.json")
    )
    payload, model = json.loads(parts[weights]), parts[graph].decode()
    payload["config"][next(iter(payload["config"]))]["use_pickle"] = True
    pickled, size = b"cos\nsystem\n(S'touch pwned'\ntR.", re.search(r'"expr_str": *("[^"]*")', model).group(1)
    old = {"version": b"8.14", "serialized_exported_program.json": parts[graph], "serialized_state_dict.pt": pickled}
    spoilt = [
        parts | {weights: json.dumps(payload).encode()},
        parts | {sample: pickled},
        parts | {"archive/data/aotinductor/model/a.so": b""},
        parts | {graph: model.replace(size, json.dumps(RUN)).encode()},
        parts | {graph: model.replace("torch.ops.aten.linear.default", "torch.os.system").encode()},
        parts | {graph: model.replace("builtins.tuple", "collections.defaultdict").encode()},
        old,
    ]
    for content in spoilt:
        with pytest.raises(DistmtlError, match="never loaded"):
            program.load(_with(content), "the program")
    guarded = json.dumps(json.loads(model) | {"guards_code": [RUN]}).encode()
    program.load(_with(parts | {graph: guarded}), "the program")(*_inputs(exported))
    assert not (tmp_path / "pwned").exists()


def _inputs(exported):
    """Of two rows without an id."""
    config = Predictor(exported).config
    made = program.Program(config)
    lists = [torch.zeros(2, f.dim) for f in config.embedded if f.name in made.lists]
    return (
        torch.zeros(2, sum(made.widths)),
        lists,
        torch.ones(len(made.keys), 2).int(),
        torch.zeros(2, sum(f.width for f in config.dense)),
        None,
    )


def test_where_it_goes_must_be_empty(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DistmtlError, match="is not empty"):
        export(run.run_dir, tmp_path)
    with pytest.raises(DistmtlError, match="no such folder"):
        export(str(tmp_path / "nothing"), tmp_path / "out")
    with pytest.raises(DistmtlError, match="object store"):
        export(run.run_dir, "memory://out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_one_at_a_time_and_what_a_killed_one_left_is_replaced(tmp_path):
    """Two that wrote into one folder would name each other's half-written files in the manifest."""
    stale = tmp_path / ".out.partial" / "tables"
    stale.mkdir(parents=True)
    with _new_folder(tmp_path / "out") as folder:
        assert not any(folder.iterdir())
        (folder / "first").touch()
        with pytest.raises(DistmtlError, match="written by another process"), _new_folder(tmp_path / "out"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in (tmp_path / "out").iterdir()] == ["first"]
