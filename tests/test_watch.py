"""distmtl watch: a run that grows, is half-written, restarted, ends; as a page for the terminal, as lines, over HTTP."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch
from pages import Page

from distmtl.__main__ import main
from distmtl.config_file import dump_config
from distmtl.meter import Meter
from distmtl.progress import describe
from distmtl.reporting.gathering import RunLog, read_run
from distmtl.storage import place
from distmtl.watching import browser, terminal
from distmtl.watching.outcome import outcome
from distmtl.watching.page import page


class Written:
    """A run's directory that a test writes."""

    def __init__(self, folder: Path, config: str):
        folder.mkdir(parents=True)
        self.folder, self.log = folder, folder / "metrics.jsonl"
        (folder / "config.yaml").write_text(config)
        self.start(0)

    def say(self, kind: str, **values) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")

    def start(self, step: int) -> None:
        self.say("start", step=step, text="tiny: mmoe on 1 worker(s)\nmore", world_size=1, workers=[], restarts=0, rows=128 * step)

    def train(self, step: int, loss: float = 0.5) -> None:
        losses = {"click": loss, "conversion": 0.25, "rating": 0.125}
        self.say(
            "train", step=step, of=40, epoch=1, rows=128 * step, loss=loss, losses=losses, health={"lambda": dict.fromkeys(losses, 1.0)},
            samples_per_second=12_345.6, data_wait=0.031, lr=0.1, replaced_ids=0, contradictions=0, memory_mb=456, eta_s=75.0,
        )  # fmt: skip

    def evaluate(self, step: int) -> None:
        metrics = {"click": {"auc": 0.75, "logloss": 0.5}, "conversion": {"auc": None}, "rating": {"rmse": 0.3}}
        self.say("evaluation", step=step, of=40, split="validation", loss=0.6, metrics=metrics, best=True)

    def end(self, stopped: bool = False, moves: bool = False) -> None:
        self.say("end", step=40, result={"stopped": stopped}, moves=moves)


@pytest.fixture
def written(tiny_data, tmp_path) -> Written:
    return Written(tmp_path / "run", dump_config(tiny.config(tiny_data, tmp_path / "run")))


@pytest.fixture
def looked(monkeypatch) -> threading.Event:
    """Set when the watcher has read how the run stands, however long that took."""
    event = threading.Event()
    monkeypatch.setattr(terminal, "EVERY_S", 0.02)
    monkeypatch.setattr(terminal, "page", lambda *arguments: (page(*arguments), event.set())[0])
    return event


def test_the_page_says_how_a_run_stands(written):
    for step in (5, 10, 15):
        written.train(step, loss=1 - step / 20)
    written.evaluate(10)
    written.say("checkpoint", step=10, path="x", stall=0.01, seconds=0.2, mb=3.0)
    written.say("note", step=12, text="an expert starves")
    text = page(log := RunLog(str(written.folder)), time.time())
    assert f"{written.folder}: training\n" in text and "step 15 of 40, epoch 1, 1.92k rows   ETA 1m15s" in text
    assert re.search(r"█{15}░{25} +38%", text) and re.search(r"click +0.2500   █▅▁\n", text)
    assert "validation at step 10: loss 0.6000 (best so far)" in text and re.search(r"click +AUC 0.7500 logloss 0.5000", text)
    assert "12,346 samples/s   3.1% waiting for data   456 MiB on rank 0   checkpoint of step 10, written in 0.2 s" in text
    assert "no restart\n  step 12: an expert starves" in text and outcome(log) is None
    assert page(log, time.time() + 120).endswith("nothing was logged for 2m00s")

    written.start(10)
    written.train(15, loss=0.4)
    log.refresh()
    text = page(log, time.time())
    assert "1 restart(s), the last from step 10" in text and re.search(r"click +0.4000   █▃▁\n", text), "what was undone is left out"
    assert log.records == read_run(str(written.folder), "x").records
    written.say("failed", step=15, text="step 15: the loss of click is not finite")
    log.refresh()
    assert page(log, time.time()).startswith(f"{written.folder}: failed: step 15: the loss of click is not finite")
    assert main(["watch", str(written.folder), "--once"]) == 1


def test_a_growing_log_is_read_once_and_whole_lines_only(written):
    """A thread appends in pieces, as a file system may show them; every record arrives, in order, once."""
    log, got = RunLog(str(written.folder)), []
    lines = [json.dumps({"kind": "train", "time": 0, "step": s, "x": "y" * 50}).encode() + b"\n" for s in range(200)]

    def append() -> None:
        with written.log.open("ab", buffering=0) as file:
            text = b"".join(lines)
            for at in range(0, len(text), 97):
                file.write(text[at : at + 97])
                time.sleep(0.0005)

    thread = threading.Thread(target=append)
    thread.start()
    while thread.is_alive():
        before = log.reader.position
        got += log.refresh()
        assert log.reader.position >= before
    thread.join()
    got += log.refresh()
    assert [r["step"] for r in got] == list(range(200)) and log.reader.position == written.log.stat().st_size


def test_without_a_terminal_it_prints_lines_until_the_end(written, looked, capsys):
    written.train(5)

    def go_on() -> None:
        looked.wait()
        for step in (10, 40):
            written.train(step)
            time.sleep(0.1)
        written.end()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert main(["watch", str(written.folder)]) == 0
    thread.join()
    out = capsys.readouterr().out
    first, lines = out[: out.index("step     10/40")], out.splitlines()
    assert "step 5 of 40" in first and lines[-1] == f"{written.folder}: complete"
    assert [line.split()[1] for line in lines if re.match("step .*samples/s", line)] == ["10/40", "40/40"]


def test_a_failure_is_printed_once(written, looked, capsys):
    def fail() -> None:
        looked.wait()
        written.say("failed", step=5, text="the loss of click is not finite")

    threading.Thread(target=fail).start()
    assert main(["watch", str(written.folder)]) == 1
    assert capsys.readouterr().out.endswith(f"\n{written.folder}: failed: the loss of click is not finite\n")
    assert main(["watch", str(written.folder)]) == 1
    assert capsys.readouterr().out.count("the loss of click is not finite") == 1, "it had failed before"
    assert describe({"kind": "failed", "text": "said by who meets the error"}) is None


def test_what_is_an_end_and_what_is_not(written):
    """A run that moves to other workers goes on; one that a search gives up does not, and has not failed."""
    log = RunLog(str(written.folder))
    written.end(stopped=True, moves=True)
    log.refresh()
    assert outcome(log) is None
    written.start(40)
    written.end(stopped=True)
    log.refresh()
    assert outcome(log) == "stopped"
    written.start(40)
    written.say("stopped", step=50, text="given up by the search")
    log.refresh()
    assert outcome(log) == "stopped" and log.events[-1]["kind"] == "stopped"


def test_another_run_in_its_place_is_begun_with(written):
    """However long its log is by the time that one looks."""
    log = RunLog(str(written.folder))
    written.log.unlink()
    assert log.refresh() == [] and log.records == []
    written.start(0)
    for step in range(5, 40, 5):
        written.train(step)
    log.refresh()
    assert [r.get("step") for r in log.records] == list(range(0, 40, 5))


def test_a_followed_run_is_one(written, tiny_data, tmp_path):
    """Partitions end to end; one that is undone is gone; it ends with a result.json that is newer than its start."""
    run = tmp_path / "followed"
    config = dump_config(tiny.config(tiny_data, run))
    run.mkdir()
    (run / "config.yaml").write_text(config)
    one = Written(run / "partitions" / "000000-day=0", config)
    one.train(40)
    one.end()
    log = RunLog(str(run))
    assert outcome(log) is None
    two = Written(run / "partitions" / "000001-day=1", config)
    two.train(10)
    log.refresh()
    assert [r["step"] for r in log.records if r["kind"] == "train"] == [40, 50]
    text = page(log, time.time())
    assert "training, partition 000001-day=1" in text and "step 10 of 40" in text and "no restart" in text
    (two.log).unlink()
    (two.folder / "config.yaml").unlink()
    two.folder.rmdir()
    log.refresh()
    assert [r["step"] for r in log.records if r["kind"] == "train"] == [40]
    (run / "result.json").write_text('{"stopped": false}')
    assert outcome(log) == "complete"


def test_a_run_in_an_object_store(written):
    for name in ("config.yaml", "metrics.jsonl"):
        to = place("memory://watched") / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((written.folder / name).read_bytes())
    log = RunLog("memory://watched")
    written.train(5)
    (place("memory://watched") / "metrics.jsonl").write_bytes(written.log.read_bytes())
    assert [r["kind"] for r in log.refresh()] == ["train"] and log.refresh() == []


def test_a_page_that_loads_itself_again(written, monkeypatch):
    monkeypatch.setattr(browser, "EVERY_S", 0.05)
    written.train(5)
    said, ends = [], []
    thread = threading.Thread(target=lambda: ends.append(browser.browse(str(written.folder), 0, said.append, redraw_s=0.5)))
    thread.start()
    while not said:
        time.sleep(0.02)
    address = said[0].split()[0]
    html = urllib.request.urlopen(address, timeout=5).read().decode()
    assert 'http-equiv="refresh"' in html and "step 5 of 40" in html and Page(html).columns("losses")["step"] == ["5"]
    assert "127.0.0.1" in address
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(address + "etc/passwd", timeout=5)
    written.train(10)
    while Page(html).columns("losses")["step"] != ["5", "10"]:
        time.sleep(0.1)
        html = urllib.request.urlopen(address, timeout=5).read().decode()
    written.end()
    while 'http-equiv="refresh"' in html:
        time.sleep(0.1)
        html = urllib.request.urlopen(address, timeout=5).read().decode()
    thread.join(20)
    assert ends == ["complete"] and not thread.is_alive(), "the last page was fetched"


def test_the_slowest_run_has_a_speed():
    meter = Meter(1, torch.device("cpu"))
    meter.rows, meter.seconds = 8, 1000.0
    assert meter.samples_per_second() == 0.008, "what is left is divided by it"


def test_what_cannot_be_watched_is_one_sentence(written, tmp_path, capsys):
    assert main(["watch", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err == f"distmtl watch: {tmp_path / 'no'} is no run: it has no metrics.jsonl\n"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["watch", str(written.folder), "--browser", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another with --port" in capsys.readouterr().err
    assert main(["watch", str(written.folder), "--browser", "--port", "99999"]) == 1
    assert main(["watch", str(written.folder), "--port", "0"]) == 1
    assert "--port is where --browser serves" in capsys.readouterr().err
