"""A followed run: the weights of one process that trains partition after partition, whatever happens to it; nothing silently dropped."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import partitioned
import pyarrow.parquet as pq
import pytest
import recording
import tiny
import torch
import yaml
from partitioned import ROWS, assert_every_row_once, config_of, index_of
from states import state_of
from worlds import records, run_world, saved_state, train_world

from distmtl import following, loop, stopping
from distmtl.__main__ import main
from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate
from distmtl.following import Until, follow
from distmtl.progress import Progress

STEPS = 16  # of a partition: 1000 rows in steps of 64, 8 of each of the 8 streams


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(following, "POLL_S", 0.05)


def here(config, source, until=None, **options):
    """A followed run on one rank: result and notes."""
    return run_world(on_ranks, 1, config, source, until or Until(idle_s=0.0), options)[0]


def on_ranks(config, source, until, options):
    notes: list[str] = []

    def hear(record):
        if record["kind"] == "note":
            notes.append(record["text"])

    with process_group(config) as process:
        result = follow(config, str(source), loop.train, until, **{"report": hear, "process": process, **options})
        assert not [o for o in gc.get_objects() if type(o) is loop.Training], "the tables of a partition's run stay in memory"
        return result, notes


def measured(path, data):
    return run_world(evaluate, 1, str(path), str(data))[0]["data"]


def in_one_go(config, source, names):
    """The state after training partition after partition with one model, which is neither saved nor loaded, nor measured."""
    with process_group(config) as process:
        for index, name in enumerate(names):
            of = config_of(config, source, index, name)
            if index == 0:
                training = loop.Training(of, process, open_splits(of), Progress(None, False, print))
            reader = loop.train_reader(of, open_dataset(of.data.train), process)
            batches, pipeline = reader.batches(0, STEPS), loop.make_pipeline(training.model, training.optimizers, process.device)
            training.model.train()
            assert reader.steps_per_epoch == STEPS
            for step in range(STEPS):
                training.optimizers.set_step(step if index == 0 else 1000)  # the warm-up is over
                loop.seed_dropout(of.run.seed, step, process.rank)
                pipeline.progress(batches)
        return state_of(training)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_chain_of_runs_is_one_training(tmp_path, world_size):
    """Bit for bit, tables, dense and both optimizers' states, with dropout and warm-up, measured before every partition."""
    source, names = tmp_path / "log", [f"day={i}" for i in range(3)]
    for i in range(3):
        partitioned.write(source, i)
    config = parse_config(partitioned.raw(source, tmp_path / "run"))
    result, _ = run_world(on_ranks, world_size, config, source, Until(partitions=3), {})[0]
    last = config_of(config, source, 2, "day=2")
    assert_equal(saved_state(last, STEPS), run_world(in_one_go, world_size, config, source, names)[0])
    assert (result["partitions"], result["rows"], result["steps"], result["stopped"]) == (3, 3 * ROWS, 3 * STEPS, False)

    lines = index_of(config)
    assert [(x["name"], x["rows"], x["late"], x["changed"]) for x in lines] == [(n, ROWS, False, False) for n in names]
    assert [bool(x["checkpoint"]) for x in lines] == [False, True, True]  # of the last two
    assert lines[0]["metrics"] == {} and len({config_of(config, source, i, n).run.seed for i, n in enumerate(names)}) == 3
    assert result["metrics"] == {"unseen": lines[2]["metrics"]}
    for task, values in measured(lines[1]["checkpoint"], source / "day=2").items():  # before it was trained
        assert lines[2]["metrics"][task] == pytest.approx(values, abs=1e-6), task
    (seen,) = records(last, "evaluation")
    assert (seen["step"], seen["split"], seen["metrics"]) == (0, "unseen", lines[2]["metrics"])
    assert measured(tmp_path / "run", source / "day=2") == measured(lines[2]["checkpoint"], source / "day=2")  # RUN is its newest


def recorded(source: Path, folder: Path, log: Path):
    raw = recording.recorded(partitioned.raw(source, folder), log)
    return raw, parse_config(raw)


def test_killed_at_random_it_ends_as_if_undisturbed(tmp_path):
    """SIGKILL of the whole process, three times over five partitions: every row once, the same weights to the last bit."""
    draw, source, log, days = random.Random(1), tmp_path / "log", tmp_path / "rows", 5
    for i in range(days):
        partitioned.write(source, i)
    raw, config = recorded(source, tmp_path / "run", log)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    for left in (3, 2, 1, 0):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        arguments = ["train", str(tmp_path / "config.yaml"), "--follow", str(source), "--partitions", str(days)]
        process = subprocess.Popen(
            [sys.executable, "-m", "distmtl", *arguments],
            env={**os.environ, **rank, "PYTHONPATH": str(Path(recording.__file__).parent)},  # of the plug-in
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        steps, trained = draw.randrange(3, 30), log / str(process.pid)
        while left and process.poll() is None and not (trained.exists() and trained.read_bytes().count(b"\n") >= steps):
            time.sleep(0.002)
        if left:
            assert process.poll() is None, process.communicate()[0]
            process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out

    _, undisturbed = recorded(source, tmp_path / "undisturbed", tmp_path / "others")
    here(undisturbed, source)
    assert_equal(*(saved_state(config_of(c, source, days - 1, f"day={days - 1}"), STEPS) for c in (config, undisturbed)))
    assert_every_row_once(tmp_path / "run", log, ROWS)
    assert [{**x, **dict.fromkeys(OF_AN_ATTEMPT)} for x in index_of(config)] == [
        {**x, **dict.fromkeys(OF_AN_ATTEMPT)} for x in index_of(undisturbed)
    ]


OF_AN_ATTEMPT = ("restarts", "seconds", "samples_per_second", "began", "checkpoint")


def test_stopped_within_a_partition_it_goes_on(tmp_path, monkeypatch):
    """RUN/STOP reaches the run of the partition; the same call goes on at the next row."""
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    source, file = tmp_path / "log", tmp_path / "published"
    for i in range(2):
        partitioned.write(source, i)
    config, whole = (parse_config(partitioned.raw(source, tmp_path / n)) for n in ("run", "whole"))

    def ask(record):
        if record["kind"] == "train" and record["step"] == 4:
            (tmp_path / "run" / "STOP").touch()
            time.sleep(0.3)  # until it is passed on

    def publish(index, path):
        with file.open("a") as out:
            out.write(f"{index} {Path(path).parent.parent.name}\n")

    stopped, _ = here(config, source, report=ask, publish=publish)
    assert stopped["stopped"] and stopped["rows"] < ROWS and not (tmp_path / "run" / "STOP").exists()
    result, _ = here(config, source, publish=publish)
    assert (result["stopped"], result["rows"], result["restarts"]) == (False, 2 * ROWS, 1)
    here(whole, source)
    assert_equal(*(saved_state(config_of(c, source, 1, "day=1"), STEPS) for c in (config, whole)))
    assert file.read_text() == "0 000000-day=0\n1 000001-day=1\n"
    here(config, source, publish=publish)
    assert file.read_text() == "0 000000-day=0\n1 000001-day=1\n1 000001-day=1\n"  # once more: nothing tells whether it was


# ------------------------------------------------------------------------------------------------ what arrives, and how


def test_a_partition_is_taken_when_it_is_sealed(tmp_path):
    """Nested names, in order by their numbers; what is not sealed waits; what is sealed meanwhile is taken."""
    source = tmp_path / "log"
    for i, name in enumerate(("day=9/hour=2", "day=10/hour=1", "day=9/hour=11")):
        partitioned.write(source, i, name)
    waiting = partitioned.write(source, 3, "day=11/hour=0", sealed=False)
    (source / "_SUCCESS").touch()  # of the job that wrote them
    partitioned.write(source, 4, "archive")

    def hear(record):
        with (tmp_path / "told").open("a") as told:
            told.write(record.get("text", "") + "\n")
        if record.get("text", "").startswith("waiting for a partition"):
            assert len(index_of(config)) == 3
            (waiting / "_SUCCESS").touch()

    config = parse_config(partitioned.raw(source, tmp_path / "run"))
    here(config, source, Until(partitions=4), report=hear)
    assert [x["name"] for x in index_of(config)] == ["day=9/hour=2", "day=9/hour=11", "day=10/hour=1", "day=11/hour=0"]
    assert (tmp_path / "run/partitions/000003-day=11,hour=0/result.json").exists()
    assert f"{source}/archive is sealed but not named key=value" in (tmp_path / "told").read_text()


def test_late_and_changed_partitions_are_told(tmp_path):
    source = tmp_path / "log"
    for i in (0, 2):
        partitioned.write(source, i)
    config = parse_config(partitioned.raw(source, tmp_path / "run"))
    here(config, source)
    partitioned.write(source, 1)
    pq.write_table(tiny.table(50), source / "day=0/part-1.parquet")
    result, notes = here(config, source)
    assert any("partition day=1" in n and "it is late: day=2 was trained before it" in n for n in notes)
    assert any("partition day=0 has changed since it was trained: what is new in it is not trained" in n for n in notes)
    assert [(x["name"], x["late"], x["changed"]) for x in index_of(config)] == [
        ("day=0", False, True), ("day=2", False, False), ("day=1", True, False),
    ]  # fmt: skip
    assert result["rows"] == 3 * ROWS
    shutil.rmtree(source / "day=0")  # old data may go
    assert here(config, source)[0]["rows"] == 3 * ROWS


def bad_row(folder: Path) -> None:
    """An id that no footer shows and no sample meets, in the last rows of the partition."""
    table = tiny.table(5000, seed=7)
    users = table["user"].to_pylist()
    users[4990] = 100_000
    pq.write_table(table.set_column(1, "user", [users]), folder / "part-0.parquet", row_group_size=5000, write_statistics=False)


def corrupt(folder: Path) -> None:
    (folder / "part-0.parquet").write_bytes(b"PAR1 and no more")


def empty(folder: Path) -> None:
    (folder / "part-0.parquet").unlink()


@pytest.mark.parametrize(
    ("spoil", "words", "then"),
    [
        (bad_row, "feature 'user': id 100000", "mended"),
        (bad_row, "feature 'user': id 100000", "left out"),
        (corrupt, "not a whole Parquet file", "mended"),
        (empty, "no *.parquet files in it", "left out"),
    ],
)
def test_bad_data_stop_it_by_name_and_mended_it_goes_on(tmp_path, spoil, words, then):
    """As if they had never been bad, whatever was trained of them before it showed."""
    source = tmp_path / "log"
    for i in (0, 1, 2):
        partitioned.write(source, i)
    good = (source / "day=1/part-0.parquet").read_bytes()
    spoil(source / "day=1")
    config, whole = (parse_config(partitioned.raw(source, tmp_path / n, data={"shuffle": False})) for n in ("run", "whole"))
    with pytest.raises(DistmtlError) as error:
        here(config, source)
    assert str(error.value).startswith("partition day=1: ") and words in str(error.value) and f"{source}/day=1" in str(error.value)
    assert "the same command goes on" in str(error.value)
    assert len(index_of(config)) == 1
    if then == "mended":
        (source / "day=1/part-0.parquet").write_bytes(good)
    else:
        (source / "day=1/_SUCCESS").unlink()
    result, notes = here(config, source)
    here(whole, source)
    days = result["partitions"]
    assert days == (3 if then == "mended" else 2)
    if spoil is bad_row:
        assert any("trained anew from its start" in n or "what was trained of it undone" in n for n in notes)
    assert_equal(*(saved_state(config_of(c, source, days - 1, "day=2"), STEPS) for c in (config, whole)))


def test_partitions_within_partitions_are_refused(tmp_path):
    source = tmp_path / "log"
    partitioned.write(source, 0, "day=0/hour=1")
    (source / "day=0/_SUCCESS").touch()
    with pytest.raises(DistmtlError, match="partition day=0 of .* holds another one, day=0/hour=1: its rows would be trained twice"):
        here(parse_config(partitioned.raw(source, tmp_path / "run")), source)


def test_what_needs_an_end_is_refused(tmp_path):
    raw = partitioned.raw(tmp_path, tmp_path / "run")
    raw["data"]["validation"] = str(tmp_path)
    raw["optimizer"]["schedule"] = {"decay": "cosine"}
    raw["train"] |= {"epochs": 2, "steps": 5, "early_stopping": {"patience": 2}}
    with pytest.raises(DistmtlError) as error:
        here(parse_config(raw), tmp_path)
    for words in ("decay is cosine: it needs to know the last step", "train.epochs is 2", "train.steps is 5", "train.early_stopping"):
        assert words in str(error.value)


def test_ordinary_and_followed_runs_are_not_mixed(tmp_path, capsys):
    source = tmp_path / "log"
    partitioned.write(source, 0)
    config, ordinary = (parse_config(partitioned.raw(source, tmp_path / n)) for n in ("followed", "ordinary"))
    here(config, source)
    with pytest.raises(DistmtlError, match="holds a followed run; continue it with --follow"):
        run_world(loop.train, 1, config)
    with pytest.raises(DistmtlError, match="already holds a followed run"):
        here(config, source, resume="never")
    train_world(ordinary, 1)
    with pytest.raises(DistmtlError, match="holds a run that does not follow anything"):
        here(ordinary, source)
    with pytest.raises(DistmtlError, match="cannot be listed"):
        here(parse_config(partitioned.raw(source, tmp_path / "none")), tmp_path / "nowhere")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(partitioned.raw(source, tmp_path / "run")))
    assert main(["train", str(tmp_path / "c.yaml"), "--partitions", "3"]) == 1
    assert "end what --follow DIR begins" in capsys.readouterr().err


def test_another_config_is_refused_and_weights_may_begin_it(tmp_path):
    source = tmp_path / "log"
    for i in range(2):
        partitioned.write(source, i)
    config = parse_config(partitioned.raw(source, tmp_path / "run"))
    here(config, source, Until(partitions=1))
    raw = partitioned.raw(source, tmp_path / "run")
    raw["optimizer"]["dense"] = {"kind": "adamw", "lr": 0.5}
    with pytest.raises(DistmtlError, match=r"partition day=1: .* was made with another config(.|\n)*optimizer.dense.lr"):
        here(parse_config(raw), source)
    raw = partitioned.raw(source, tmp_path / "run")
    raw["tasks"][0]["tower"] = [4]
    result, notes = here(parse_config(raw), source, policy="matching")
    assert result["rows"] == 2 * ROWS and any("towers.0" in n and "starts anew" in n for n in notes)
    before, after = (saved_state(config_of(config, source, i, f"day={i}"), STEPS) for i in range(2))
    key = "tables_optimizer/model.embeddings.embedding_bags.user.weight/user.momentum1"
    assert (after[key] >= before[key]).all() and (after[key] > before[key]).any()  # Adagrad's sums went on

    other = parse_config({**raw, "run": {"dir": str(tmp_path / "other")}})
    here(other, source, Until(partitions=1), resume=str(tmp_path / "run"))
    (start,) = records(config_of(other, source, 0, "day=0"), "start")
    assert f"starting with the weights from {tmp_path}/run/partitions/000001-day=1" in start["text"]
