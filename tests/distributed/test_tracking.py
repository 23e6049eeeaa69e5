"""TensorBoard, MLflow and Weights & Biases hold the numbers of metrics.jsonl; what does not answer or is not there ends no run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from worlds import run_world, train_world

from distmtl.__main__ import main
from distmtl.config import MLflowConfig
from distmtl.config_file import dump_config
from distmtl.errors import DistmtlError
from distmtl.loop import train
from distmtl.progress import Progress
from distmtl.storage import place
from distmtl.tracking.log import LOG, LogReader, add_to_log, read_log
from distmtl.tracking.mlflow import MLflowRun
from distmtl.tracking.records import scalars
from distmtl.tracking.tracker import Sent, Tracker

TRAIN = {"global_batch_size": 128, "epochs": 2, "log_every": 5, "eval_every": 10}
KINDS = ("train", "evaluation", "checkpoint")


def config(folder: Path, run: Path, steps: int = 20, **tracking):
    return tiny.config(folder, run, train={**TRAIN, "steps": steps}, tracking=tracking)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def figures(records: list[dict]) -> Counter:
    """(name, step, value) of every figure of what a run measures."""
    return Counter((n, r["step"], v) for r in records if r["kind"] in KINDS for n, v in scalars(r))


def in_mlflow(uri: str, run_id: str) -> Counter:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    names = client.get_run(run_id).data.metrics
    return Counter(
        (n, m.step, m.value) for n in names if n.split("/")[0] in KINDS for m in client.get_metric_history(run_id, n)
    )  # fmt: skip


def test_figures_have_names_that_tell_splits_apart():
    record = {
        "kind": "evaluation",
        "time": 1.0,
        "step": 3,
        "split": "test",
        "loss": 0.5,
        "best": True,
        "metrics": {"a": {"auc": 0.7, "ne": None}},
    }
    assert dict(scalars(record)) == {"evaluation/test/loss": 0.5, "evaluation/test/metrics/a/auc": 0.7}


def test_tensorboard_holds_the_log(tiny_data, tmp_path):
    """Also of a run that went on from step 10 after it had been at 15: what was undone is not there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train_world(config(tiny_data, run), 2)
    lines = [r for r in log(run) if r["kind"] != "end"]
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    got = Counter((tag, e.step, e.value) for tag in board.Tags()["scalars"] if tag.split("/")[0] in KINDS for e in board.Scalars(tag))
    assert got == Counter({(n, step, float(np.float32(v))): c for (n, step, v), c in figures(lines).items()}) and len(got) > 100

    again = tmp_path / "again"
    again.mkdir()
    progress = Progress(again, True, lambda record: None)
    for attempt in (0, 10):
        progress.say("start", step=attempt, text="")
        for step in range(attempt + 5, 20, 5):
            progress.say("train", step=step, loss=float(attempt + step))
    progress.close()
    board = EventAccumulator(str(again)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(5, 5.0), (10, 10.0), (15, 25.0)]


def test_mlflow_holds_the_log_and_one_run_of_two_attempts(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra distmtl[mlflow] is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for this process; the run says it itself
    run, uri = tmp_path / "run", f"file://{tmp_path}/mlruns"
    tracked = config(tiny_data, run, mlflow={"uri": uri, "experiment": "e"})
    train_world(tracked, 2)
    (found,) = (client := MlflowClient(uri)).search_runs([client.get_experiment_by_name("e").experiment_id])
    assert in_mlflow(uri, found.info.run_id) == figures(log(run)) and len(figures(log(run))) > 100
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    params = found.data.params
    assert params["model.num_experts"] == "3" and params["features.user.rows"] == "200" and not any("tracking" in p for p in params)
    assert found.data.tags["run_dir"] == str(run) and "version.torch" in found.data.tags
    assert json.loads((run / "result.json").read_text()) == json.loads(text_of(client, found, "result.json"))
    assert text_of(client, found, "config.yaml") == dump_config(tracked)

    train_world(config(tiny_data, run, steps=30, mlflow={"uri": uri, "experiment": "e"}), 1)
    (found,) = client.search_runs([found.info.experiment_id])
    assert in_mlflow(uri, found.info.run_id) == figures(log(run)) and found.info.status == "FINISHED"
    assert "\n  steps: 30\n" in text_of(client, found, "config.yaml")

    train_world(config(tiny_data, run, steps=30, mlflow={"uri": uri, "experiment": "other"}), 1)
    (late,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert in_mlflow(uri, late.info.run_id) == figures(log(run)), "tracking that is asked for later is sent the whole log"


def test_a_killed_attempt_leaves_no_step_twice_and_none_out(tiny_data, tmp_path, monkeypatch):
    """Killed at step 25: the next attempt goes on from 20. What the first had not sent is sent; of step 25, which both made, the first
    value stays."""
    pytest.importorskip("mlflow", reason="the extra distmtl[mlflow] is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, uri = tmp_path / "run", f"file://{tmp_path}/mlruns"
    tracked = config(tiny_data, run, steps=40, mlflow={"uri": uri})
    with pytest.raises(RuntimeError, match="died"):
        run_world(train_until, 1, tracked, 25)
    train_world(tracked, 1)
    (found,) = (client := MlflowClient(uri)).search_runs([client.get_experiment_by_name("tiny").experiment_id])
    lines = log(run)
    starts = [r["step"] for r in lines if r["kind"] == "start"]
    assert starts in ([0, 20], [0, 10]), "whether the checkpoint of step 20 was complete is a matter of time"
    first: dict[tuple, float] = {}
    for r in (r for r in lines if r["kind"] in KINDS):
        for name, value in scalars(r):
            first.setdefault((name, r["step"]), value)
    assert in_mlflow(uri, found.info.run_id) == Counter({(n, step, v): 1 for (n, step), v in first.items()})
    assert sum(r["kind"] == "train" and r["step"] == 25 for r in lines) == 2


def test_a_run_in_an_object_store_is_one_run_too(tmp_path, monkeypatch):
    """Its state is kept in the store; every attempt has a local folder of its own."""
    pytest.importorskip("mlflow", reason="the extra distmtl[mlflow] is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    tracked = tiny.config(tmp_path, tmp_path / "run", tracking={"mlflow": {"uri": uri}})
    for attempt in (0, 5):
        progress = Progress(place("memory://tracked/run"), True, lambda record: None, tracked)
        progress.say("start", step=attempt, text="")
        for step in (attempt + 5, attempt + 10):
            progress.say("train", step=step, loss=float(attempt + step))
        progress.close()
    (found,) = (client := MlflowClient(uri)).search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert in_mlflow(uri, found.info.run_id) == Counter(
        {("train/loss", 5, 5.0): 1, ("train/loss", 10, 10.0): 1, ("train/loss", 15, 20.0): 1}
    )
    assert json.loads((place("memory://tracked/run") / "mlflow.json").read_text())["run"] == found.info.run_id


def train_until(tracked, step: int) -> None:
    train(tracked, report=lambda record: record["kind"] == "train" and record["step"] == step and os._exit(9))


def text_of(client, run, name: str) -> str:
    return Path(client.download_artifacts(run.info.run_id, name)).read_text()


def test_wandb_holds_the_log(tiny_data, tmp_path):
    pytest.importorskip("wandb", reason="the extra distmtl[wandb] is not installed")
    run = tmp_path / "run"
    for steps in (20, 30):
        train_world(config(tiny_data, run, steps=steps, wandb={"project": "p", "mode": "offline"}), 1)
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({f.name for f in files}) == 1, "two attempts, one run"
    rows = [row for file in files for row in wandb_history(file)]
    got = Counter((n, row["step"], v) for row in rows for n, v in row.items() if n.split("/")[0] in KINDS)
    assert got == figures(log(run)) and len(got) > 100


def wandb_history(file: Path) -> list[dict]:
    """The rows of an offline run: protobufs in LevelDB's log format, records of 7 bytes of header in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, whole, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = pb.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def test_what_a_failure_undid_is_sent_once():
    """The first value stays; what had not been said before is new; of a split of its own."""
    sent = Sent("here")
    one = [{"kind": "start", "step": 0}, *({"kind": "train", "step": s} for s in (5, 10, 15))]
    assert sent.add(one) == one
    two = [{"kind": "start", "step": 10}, {"kind": "train", "step": 15}, {"kind": "train", "step": 20}]
    two += [{"kind": "evaluation", "split": s, "step": 15} for s in ("test", "test")]
    assert sent.add(two) == [two[0], *two[2:]] and sent.status == "running"
    assert sent.add([{"kind": "start", "step": 10}, *two[1:]]) == [{"kind": "start", "step": 10}]
    sent.add([{"kind": "stopped", "step": 20, "text": "given up by the search"}])
    assert sent.status == "stopped"


class Service:
    """One that answers when it is told to."""

    name, where = "service", "here"

    def __init__(self):
        self.answers, self.got, self.status = True, [], None

    def load(self):
        pass

    def open(self, run):
        return run or "id"

    def send(self, records, status):
        if not self.answers:
            raise OSError("no route to host")
        self.got += records

    def close(self, status):
        self.status = status


def test_a_service_that_does_not_answer_is_told_once_and_sent_all_later(tmp_path, monkeypatch):
    monkeypatch.setattr("distmtl.tracking.tracker.PACE_S", 0.01)
    monkeypatch.setattr("distmtl.tracking.tracker.RETRY_S", 0.01)
    said, service = [], Service()
    progress = Progress(tmp_path, True, lambda record: None)
    tracker = Tracker(tmp_path / LOG, service, said.append)
    progress.trackers = [tracker]
    service.answers = False
    for step in range(1, 4):
        progress.say("train", step=step, loss=0.1)
        time.sleep(0.05)
    assert len(said) == 1 and "service at here does not take the run's figures: no route to host" in said[0]
    assert json.loads((tmp_path / "service.json").read_text())["run"] == "id", "the run is there; a killed process must not make another"
    service.answers = True
    progress.close()
    assert [r["step"] for r in service.got] == [1, 2, 3] and len(said) == 1 and service.status == "failed", "no end was said"

    service.answers, said[:] = False, []
    progress = Progress(tmp_path, True, lambda record: None)
    progress.trackers = [Tracker(tmp_path / LOG, service, said.append)]
    progress.say("train", step=4, loss=0.1)
    progress.close()
    assert "has not taken the last 1 record(s)" in said[-1] and len(said) == 2
    service.answers = True
    Tracker(tmp_path / LOG, service, said.append).close()
    assert [r["step"] for r in service.got if r["kind"] == "train"] == [1, 2, 3, 4], "another process sends what that one could not"


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_server_that_refuses_connections_ends_no_run(kind, tiny_data, tmp_path, monkeypatch):
    pytest.importorskip(kind, reason=f"the extra distmtl[{kind}] is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("distmtl.tracking.wandb.CLOSE_S", 2)
    monkeypatch.setattr("distmtl.tracking.tracker.CLOSE_S", 6)
    tracking = {"mlflow": {"uri": server}} if kind == "mlflow" else {"wandb": {"project": "p"}}
    began = time.monotonic()
    result = train_world(config(tiny_data, tmp_path / "run", **tracking), 1)
    assert result["steps"] == 20 and time.monotonic() - began < 60
    notes = [r["text"] for r in log(tmp_path / "run") if r["kind"] == "note"]
    assert sum("does not take the run's figures" in n for n in notes) == 1, notes
    assert "record(s), which metrics.jsonl has; the same command sends them" in notes[-1]


def test_a_package_that_is_missing_is_one_sentence_before_anything_starts(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distmtl.tracking.trackers.find_spec", lambda name: None)
    tracked = config(tiny_data, tmp_path / "run", mlflow={"uri": "file:///x"}, wandb={"project": "p"})
    (tmp_path / "c.yaml").write_text(dump_config(tracked))
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert capsys.readouterr().err == (
        "distmtl train: tracking.mlflow: the package is not installed; pip install 'distmtl[mlflow]', or leave tracking.mlflow out\n"
    )
    with pytest.raises(DistmtlError, match=r"pip install 'distmtl\[mlflow\]'"):
        train(tracked)
    assert not (tmp_path / "run").exists() and "ray" not in sys.modules.get("distmtl", sys).__dict__


@pytest.mark.parametrize(
    ("tracking", "mistake"),
    [
        ({"mlflow": {"uri": "mlruns"}}, "tracking.mlflow.uri: 'mlruns' is no URI"),
        ({"mlflow": {"uri": "file://mlruns"}}, "give file:///absolute/path"),
        ({"mlflow": {"uri": "https://me:secret@host"}}, "use MLFLOW_TRACKING_USERNAME"),
        ({"wandb": {"project": "p", "modus": "x"}}, "tracking.wandb.modus: unknown key; did you mean 'mode'?"),
        ({"wandb": {"project": "p", "mode": "x"}}, "tracking.wandb.mode"),
        ({"mlflo": {}}, "tracking.mlflo: unknown key; did you mean 'mlflow'?"),
    ],
)
def test_mistakes_of_the_config_are_named(tracking, mistake, tmp_path):
    with pytest.raises(DistmtlError) as e:
        tiny.config(tmp_path, tmp_path, tracking=tracking)
    assert mistake in str(e.value) and "secret" not in str(e.value)


def test_a_log_is_read_as_it_grows(tmp_path):
    file = tmp_path / LOG
    reader = LogReader(file)
    assert reader.read() == []
    file.write_text('{"a": 1}\n{"a": 2')
    assert reader.read() == [{"a": 1}] and reader.read() == []
    with file.open("a") as out:
        out.write('2}\n{"a": 3}\n')
    assert reader.read(1) == [{"a": 22}] and reader.read(1) == [{"a": 3}], "at least a line of whatever size"
    file.write_text('{"b": 1}\n')
    assert reader.read() == [{"b": 1}] and reader.another
    file.unlink()
    assert reader.read() == [] and reader.another, "another one may come, of whatever length"
    file.write_text('{"c": 1}\n{"c": 2}\n')
    assert reader.read() == [{"c": 1}, {"c": 2}] and not reader.another


@pytest.mark.parametrize("store", ["memory://last-word", ""])
def test_who_gave_the_run_up_has_the_last_word_in_its_log(store, tmp_path):
    log = (place(store) if store else tmp_path) / LOG
    add_to_log(log, {"kind": "failed"})
    assert not log.exists(), "a run that never began may begin anew"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b'{"kind": "start"}\n{"kind": "tra')
    add_to_log(log, {"kind": "failed"})
    assert read_log(log) == [{"kind": "start"}, {"kind": "failed"}]


def test_mlflow_makes_one_run_however_often_it_is_tried(tmp_path, monkeypatch):
    """The server goes away after the run is made, before all of it is told."""
    mlflow = pytest.importorskip("mlflow", reason="the extra distmtl[mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = {"uri": f"file://{tmp_path}/mlruns"}
    service = MLflowRun(MLflowConfig(**settings), tiny.config(tmp_path, tmp_path / "run", tracking={"mlflow": settings}))
    with monkeypatch.context() as gone:
        gone.setattr(mlflow.MlflowClient, "log_text", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.open(None)
    run = service.open(None)
    client = mlflow.MlflowClient(settings["uri"])
    (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert found.info.run_id == run and found.data.params["model.num_experts"] == "3"
