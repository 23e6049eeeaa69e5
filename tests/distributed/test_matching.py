"""`--resume-policy matching`: a changed model takes over what fits, bit by bit; the rest is as a new run's; every difference is said."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from states import state_of
from worlds import records, run_world, saved_state, train_world

from distmtl.changes import changes
from distmtl.checkpoint import Checkpoint
from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.errors import DistmtlError
from distmtl.run_directory import open_run

TABLE, STATE = "tables/model.embeddings.embedding_bags.{}.weight", "tables_optimizer/model.embeddings.embedding_bags.{}.weight/{}.momentum1"
SAVED = 6
PEPNET = {"kind": "pepnet", "domain_features": ["domain"]}


def raw(data, run, sharding="row_wise", **sections):
    out = tiny.raw(data, run, optimizer={"tables": {"kind": "adagrad", "lr": 0.1}}, **sections)
    out["train"] = {"global_batch_size": 128, "steps": SAVED, "log_every": 1, "eval_every": 100, "save_every": 2, "keep": 9}
    out["features"][5:5] = [
        {"kind": "id", "name": "gone", "column": "item", "rows": 50, "dim": 8},
        {"kind": "id", "name": "short", "column": "item", "rows": 50, "dim": 8, "out_of_range": "clip"},
        {"kind": "id", "name": "kept", "column": "user", "rows": 200, "dim": 8},
    ]
    return out | {"tables": {f["name"]: {"sharding": [sharding]} for f in out["features"] if f["kind"] in ("id", "bucket")}}


def changed(data, run, sharding):
    """Tables grown, narrowed, shrunk, hashed otherwise, cut otherwise, gone, new, under another optimizer; tasks and a tower changed."""
    out = raw(data, run, sharding)
    features = {f["name"]: f for f in out["features"]}
    features["user"]["rows"] = 260
    features["item"]["dim"] = 4
    features["city"]["rows"] = 80
    features["x_bucket"]["boundaries"] = [-1, 0.5, 1]
    features["short"]["rows"] = 40
    del features["gone"], out["tables"]["gone"]
    features["new"] = {"kind": "id", "name": "new", "column": "item", "rows": 50, "dim": 16}
    out["features"] = list(features.values())
    out["tables"]["new"] = {"sharding": [sharding]}
    out["tables"]["tags"]["optimizer"] = {"kind": "rowwise_adagrad", "lr": 0.1}
    click, _, rating = out["tasks"]
    out["tasks"] = [rating, {**click, "tower": [12]}, {"kind": "binary", "name": "again", "label": "click", "tower": [8]}]
    return out


def start(config, policy):
    """What a run begins with, before and after it has looked for a checkpoint."""
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import on_first_rank, process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress

    with process_group(config) as process:
        splits = open_splits(config)
        found, notes = on_first_rank(process, lambda: open_run(config, "auto", splits["train"], policy))
        training = Training(config, process, splits, Progress(Path(config.run_dir), process.first, lambda record: None))
        before = state_of(training)
        training.start(found, notes, policy)
        return before, state_of(training), training.state


def train(config, policy, resume="auto"):
    from distmtl.loop import train

    return train(config, resume, lambda record: None, policy=policy)


@pytest.fixture(scope="module")
def saved(tiny_data, tmp_path_factory):
    """A run of 2 workers, tables row-wise, and all that its last checkpoint holds."""
    config = parse_config(raw(tiny_data, tmp_path_factory.mktemp("saved") / "run"))
    train_world(config, 2)
    return Path(config.run_dir), saved_state(config, SAVED)


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("workers", "sharding"), [(3, "table_wise"), (3, "row_wise"), (1, "table_wise")])
def test_what_fits_is_taken_over_and_the_rest_is_new(tiny_data, saved, copied, workers, sharding):
    config, old = parse_config(changed(tiny_data, copied, sharding)), saved[1]
    ranks = run_world(start, workers, config, "matching")
    before, after, state = ranks[0]
    expected = dict(before)
    for table, rows in (("user", 200), ("kept", 200), ("tags", 20)):
        expected[TABLE.format(table)][:rows] = old[TABLE.format(table)]
    for table, rows in (("user", 200), ("kept", 200)):
        expected[STATE.format(table, table)][:rows] = old[STATE.format(table, table)]
    loaded = {f"towers.0.{p}": f"towers.2.{p}" for p in ("hidden.0.weight", "hidden.0.bias", "output.weight", "output.bias")}  # rating's
    loaded |= {f"sharing.{p}": f"sharing.{p}" for p in ("experts.weights.1", "experts.biases.0", "experts.biases.1")}
    loaded |= {"towers.1.output.bias": "towers.0.output.bias", "sharing.gates.0.bias": "sharing.gates.2.bias"}
    loaded |= {"sharing.gates.1.bias": "sharing.gates.0.bias"}
    for now, then in loaded.items():
        expected[f"dense/model.head.{now}"] = old[f"dense/model.head.{then}"]
        expected |= {f"optimizer/model.head.{now}/{k}": old[f"optimizer/model.head.{then}/{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    assert expected.keys() == after.keys()
    assert [k for k in after if not torch.equal(after[k], expected[k])] == []
    assert all(torch.equal(r[1][k], after[k]) for r in ranks for k in after)
    assert (state.step, state.best_step) == (SAVED, None)

    notes = [r["text"] for r in records(config, "note")]
    path = f"{copied}/checkpoints/step-{SAVED:09d}-0"
    assert notes[0].startswith(f"checkpoint {path} was made with another config; what still fits is loaded\n")
    assert "\n  - features.user.rows: 200 there, 260 now" in notes[0]
    assert sorted(n for n in notes if n.startswith("table")) == [
        "table city starts anew: it is read by 'city', whose ids are hashed to other rows now",
        "table gone of the checkpoint is left behind: the config has none of that name",
        "table item starts anew: it was 50 x 8, is 50 x 4",
        "table new starts anew: it is not in the checkpoint",
        "table short starts anew: it was 50 x 8, is 40 x 8",
        "table tags: its optimizer's state starts anew: it was adagrad's, is rowwise_adagrad's",
        "table user: rows 200 to 259 are new",
        "table x_bucket starts anew: it is read by 'x_bucket', whose boundaries are others now",
    ]
    of_head = {n.partition(" ")[0]: n.removeprefix("model.head.") for n in notes if n.startswith("model.head.") and "starts anew" in n}
    assert of_head.keys() == {n.removeprefix("dense/") for n in after if n.startswith("dense/")} - {f"model.head.{n}" for n in loaded}
    assert "sharing.experts.weights.0 starts anew: it reads the features, which are others or in another order now" in of_head.values()
    assert "towers.1.output.weight starts anew: it was 1 x 8, is 1 x 12" in of_head.values()
    new_task = "starts anew: it is of the binary task 'again', which the checkpoint does not have"
    assert {f"{n} {new_task}" for n in ("towers.2.output.weight", "sharing.gates.2.bias")} <= set(of_head.values())
    left = {n.removeprefix("model.head.") for n in notes if n.startswith("model.head.") and "is left behind" in n}
    of_conversion = ("towers.1.hidden.0.weight", "towers.1.hidden.0.bias", "towers.1.output.weight", "towers.1.output.bias")
    assert left == {f"{n} of the checkpoint is left behind" for n in (*of_conversion, "sharing.gates.1.weight", "sharing.gates.1.bias")}
    assert len(notes) == 1 + 8 + len(of_head) + len(left)


def test_it_is_refused_unless_asked_for(tiny_data, copied):
    """By name; the hint only where it helps; also after a changed run was stopped before its first checkpoint."""
    data = open_dataset(f"{tiny_data}/train")
    config = parse_config(changed(tiny_data, copied, "row_wise"))
    refused = (
        rf"^run.dir {copied} was made with another config; use its values or another run.dir; --resume-policy matching loads what still"
    )
    with pytest.raises(DistmtlError, match=refused) as e:
        open_run(config, "auto", data)
    assert "\n  - features.item.dim: 8 there, 4 now\n" in str(e.value)
    seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    for policy in ("strict", "matching"):
        with pytest.raises(DistmtlError, match="made with another config; use its values or another run.dir\n") as e:
            open_run(seeded, "auto", data, policy)
        assert "run.seed: 0 there, 1 now" in str(e.value)
    assert open_run(config, "auto", data, "matching")[0].step == SAVED
    with pytest.raises(DistmtlError, match=rf"^checkpoint {copied}/checkpoints/step-000000006-0 was made with another config"):
        open_run(config, "auto", data)


def test_a_changed_run_goes_on(tiny_data, copied):
    """It trains, saves checkpoints of the new kind, and is continued from them without a word about matching."""
    whole = changed(tiny_data, copied, "row_wise")
    for steps, policy in ((8, "matching"), (10, "strict")):
        whole["train"]["steps"] = steps
        assert run_world(train, 2, parse_config(whole), policy)[0]["steps"] == steps
    assert [r["step"] for r in records(parse_config(whole), "start")] == [0, SAVED, 8]
    assert [r for r in records(parse_config(whole), "note") if r["step"] > SAVED] == []


def test_other_weights_to_start_from(tiny_data, saved, tmp_path):
    """A new run of the changed model from another one's weights: no optimizer state, step 0."""
    config = parse_config(changed(tiny_data, tmp_path / "new", "table_wise"))
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
    with pytest.raises(DistmtlError, match="--resume-policy matching loads what still fits"):
        open_run(config, str(saved[0]), open_dataset(f"{tiny_data}/train"))
    run_world(train, 1, config, "matching", str(saved[0]))
    after, old = saved_state(config, 1), saved[1]
    untouched = (after[TABLE.format("kept")] == old[TABLE.format("kept")]).all(1)
    assert 0 < untouched.sum() < 200, "one step touches some rows of what was loaded"
    assert (after[STATE.format("kept", "kept")][untouched] == 0).all()
    assert records(config, "start")[0]["step"] == 0


def test_weights_for_ids_out_of_range(tiny_data, saved, tmp_path):
    """What becomes of them may differ, unless it takes a row of the table."""
    whole = raw(tiny_data, tmp_path / "new")
    for policy, fits in (("clip", True), ("oov", False)):
        whole["features"][1]["out_of_range"] = policy
        with nullcontext() if fits else pytest.raises(DistmtlError, match=r"features.item.out_of_range: 'error' there, 'oov' now"):
            open_run(parse_config({**whole, "run": {"dir": str(tmp_path / policy)}}), str(saved[0]), open_dataset(f"{tiny_data}/train"))


def test_unchanged_it_is_strict(tiny_data, saved, tmp_path):
    """Bit for bit, without a note."""
    states = []
    for policy in ("strict", "matching"):
        shutil.copytree(saved[0], tmp_path / policy)
        whole = raw(tiny_data, tmp_path / policy)
        whole["train"]["steps"] = 9
        run_world(train, 2, parse_config(whole), policy)
        states.append(saved_state(parse_config(whole), 9))
        assert records(parse_config(whole), "note") == []
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


USER, CITY = {"kind": "id", "name": "user", "rows": 200, "dim": 8}, {"kind": "id", "name": "city", "rows": 60, "dim": 8}
BUCKET = {"kind": "bucket", "name": "x_bucket", "column": "x", "boundaries": [-1, 0, 1], "dim": 8}
HASHED, OOV, MISSING = {**USER, "out_of_range": "hash"}, {**USER, "out_of_range": "oov"}, {**USER, "missing": "row"}
ELSEWHERE = "is read by 'user', whose rows of oov or missing ids lie elsewhere now"


@pytest.mark.parametrize(
    ("then", "now", "why"),
    [
        (USER, {**USER, "rows": 300}, None),
        (USER, HASHED, None),
        (USER, {**HASHED, "rows": 300}, None),  # ids inside the old table were their own rows, and are
        (HASHED, {**HASHED, "rows": 300}, "is read by 'user', whose ids are hashed to other rows now"),
        ({**HASHED, "hashes": 2}, {**USER, "hashes": 2, "out_of_range": "quotient"}, "is read by 'user', whose ids read other rows now"),
        (HASHED, {**HASHED, "rows": 300, "name": "u2", "column": "user", "table": "user"}, "is read by 'u2', whose ids are hashed to"),
        (CITY, {**CITY, "rows": 61}, "is read by 'city', whose ids are hashed to other rows now"),  # a string, whatever out_of_range says
        (USER, OOV, None),
        (OOV, {**OOV, "missing": "row"}, None),
        (OOV, USER, None),  # fewer rows: their number says it
        (OOV, {**OOV, "rows": 300}, ELSEWHERE),
        (OOV, {**USER, "rows": 201}, ELSEWHERE),
        (OOV, MISSING, ELSEWHERE),
        (MISSING, {**OOV, "missing": "row"}, ELSEWHERE),
        (USER, {**OOV, "rows": 199}, ELSEWHERE),
        (BUCKET, {**BUCKET, "boundaries": [-1, 0, 2]}, "is read by 'x_bucket', whose boundaries are others now"),
        (BUCKET, {**BUCKET, "name": "b", "table": "x_bucket"}, None),
        (BUCKET, {**CITY, "table": "x_bucket", "rows": 5}, "was read by 'x_bucket', a bucket"),
        (CITY, {**BUCKET, "table": "city", "boundaries": list(range(58))}, "is read by 'x_bucket', whose boundaries are others now"),
    ],
)
def test_tables_whose_rows_mean_something_else(tiny_data, tmp_path, then, now, why):
    old, new = (tiny.config(tiny_data, tmp_path, features=[f]) for f in (then, now))
    found = changes(new, Checkpoint(tmp_path, {"config": old.model_dump(mode="json")}), open_dataset(new.data.train)).tables
    assert list(found) == ([then["name"]] if why else []) and found.get(then["name"], "").startswith(why or "")


def former(tiny_data, tmp_path, then, now, name, shape):
    old, new = (tiny.config(tiny_data, tmp_path, **c) for c in (then, now))
    return changes(new, Checkpoint(tmp_path, {"config": old.model_dump(mode="json")}), open_dataset(new.data.train)).former(
        f"model.head.{name}", torch.Size(shape)
    )


def test_dense_parameters_whose_shape_says_too_little(tiny_data, tmp_path):
    """Features swapped for others of the same width; experts dealt to tasks in another way."""
    swapped = {"features": [USER, CITY]}, {"features": [CITY, USER]}
    assert former(tiny_data, tmp_path, *swapped, "sharing.experts.weights.0", [3, 16, 16])[1].startswith("reads the features")
    assert former(tiny_data, tmp_path, *swapped, "sharing.experts.weights.1", [3, 8, 15]) == ("model.head.sharing.experts.weights.1", "")
    same = {"features": [USER, CITY]}, {"features": [USER, {**CITY, "rows": 70}]}
    assert former(tiny_data, tmp_path, *same, "sharing.experts.weights.0", [3, 16, 16])[1] == ""
    for cross, name, shape in (
        ({"kind": "dot"}, "sharing.experts.weights.0", [3, 16, 17]),
        ({"kind": "cross", "rank": 4}, "interaction.layers.0.1.weight", [16, 4]),
    ):
        then, now = ({**c, "interaction": cross} for c in swapped)
        assert former(tiny_data, tmp_path, then, now, name, shape)[1].startswith("reads the features")
        assert former(tiny_data, tmp_path, then, then, name, shape)[1] == ""
    crossed = {"features": [USER, CITY]}, {"features": [USER, CITY], "interaction": {"kind": "cross"}}
    assert former(tiny_data, tmp_path, *crossed, "sharing.experts.weights.0", [3, 16, 16])[1].startswith("reads the features")
    dealt = tuple({"model": {"kind": "cgc", "shared_experts": s, "task_experts": t}} for s, t in ((3, 1), (0, 2)))  # six experts each
    assert former(tiny_data, tmp_path, *dealt, "sharing.levels.0.experts.biases.0", [6, 256])[1].startswith("has its experts dealt")
    assert former(tiny_data, tmp_path, *dealt, "towers.1.output.bias", [1]) == ("model.head.towers.1.output.bias", "")


def test_heads_that_read_the_features_in_parts(tiny_data, tmp_path):
    """Weights that are not as wide as the feature vector mean something else all the same."""
    domain = {"kind": "id", "name": "domain", "rows": 3, "dim": 8}
    star, gates = {"kind": "star", "domain": "domain"}, ({**PEPNET, "gate_features": g} for g in (["user", "city"], ["city", "user"]))
    swapped = {"features": [USER, CITY, domain], "model": star}, {"features": [CITY, USER, domain], "model": star}
    assert former(tiny_data, tmp_path, *swapped, "sharing.bottom.0.weight", [256, 16])[1].startswith("reads the features")
    assert former(tiny_data, tmp_path, *swapped, "towers.1.output.bias", [1])[1] == ""
    features = {"features": [USER, CITY, domain]}
    then, now = ({**features, "model": model} for model in gates)
    assert former(tiny_data, tmp_path, then, now, "sharing.ppnet.first.weight", [64, 40])[1].startswith("reads the features")
    assert former(tiny_data, tmp_path, then, then, "sharing.ppnet.first.weight", [64, 40])[1] == ""


def test_what_belongs_to_tasks_by_their_place(tiny_data, tmp_path):
    """Columns of STEM's tables, and the imputations of ESCM²."""
    click, conversion, rating = tiny.raw(tiny_data, tmp_path)["tasks"]
    stem = {"model": {"kind": "stem"}, "features": [USER]}
    then, now = ({**stem, "tasks": tasks} for tasks in ([click, conversion, rating], [rating, click, conversion]))
    for other, expected in ((now, ["user"]), (then, [])):
        old, new = tiny.config(tiny_data, tmp_path, **then), tiny.config(tiny_data, tmp_path, **other)
        found = changes(new, Checkpoint(tmp_path, {"config": old.model_dump(mode="json")}), open_dataset(new.data.train))
        assert list(found.tables) == expected
    conversion, like = conversion | {"parents": ["click"]}, {"kind": "binary", "name": "like", "label": "x", "parents": ["click"]}
    then, now = (
        {"model": {"kind": "escm2", "method": "dr"}, "features": [USER], "tasks": t}
        for t in ([click, conversion], [click, like, conversion])
    )
    assert former(tiny_data, tmp_path, then, now, "imputation.0.output.bias", [1])[1].startswith("imputes the errors of tasks")
    assert former(tiny_data, tmp_path, then, then, "imputation.0.output.bias", [1])[1] == ""
