"""Run directories by URI: a run in memory, one in an object store that only has whole files; paths that cannot be opened."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import tiny
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem
from worlds import run_world, train_world

from distmtl.__main__ import main
from distmtl.checkpoint.writing import SummingFiles
from distmtl.config_file import dump_config, parse_config
from distmtl.errors import DistmtlError
from distmtl.progress import Progress
from distmtl.run_directory import find_checkpoint, is_own
from distmtl.storage import absolute, is_remote, place, remove_tree, sizes, write_whole

TRAIN = {"global_batch_size": 128, "log_every": 1, "save_every": 4, "eval_every": 100, "keep": 9}


class Store(LocalFileSystem):
    """An object store on a local disk: whole files that appear when they are closed, no folders, nothing renamed or appended to."""

    protocol = ("teststore",)

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        if "a" in mode or "+" in mode:
            raise NotImplementedError(f"cannot open {path} with mode {mode}")
        return super()._open(path, mode, **kwargs) if "r" in mode else Object(path)

    def mv(self, path1, path2, **kwargs):
        self.cp_file(path1, path2)
        self.rm_file(path1)

    mv_file = rename = mv

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    makedirs = mkdir


class Object(io.BytesIO):
    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    def close(self):
        if not self.closed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self.getvalue())
        super().close()


fsspec.register_implementation("teststore", Store)
pytestmark = pytest.mark.filterwarnings("ignore:UPath 'teststore' filesystem not explicitly implemented")


def config(data, run, **train):
    return parse_config({**tiny.raw(data, Path("unused"), train={**TRAIN, **train}), "run": {"dir": str(run)}})


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (place(str(folder)) / "metrics.jsonl").read_text().splitlines()]


def twice(data, where):
    """A run of 6 steps continued to 10: its metrics, what evaluate makes of them, its records and its files."""
    from distmtl.evaluation import evaluate
    from distmtl.loop import train

    for steps in (6, 10):
        result = train(config(data, where, steps=steps), report=lambda record: None)
    assert result["run_dir"] == where and is_own(find_checkpoint(where), config(data, where + "/"))
    with pytest.raises(DistmtlError, match="already holds a run"):
        train(config(data, where, steps=10), resume="never")
    said = [(r["kind"], r.get("step")) for r in log(where) if r["kind"] != "checkpoint"]
    files = sorted(p.name.split(".tfevents")[0] for p in place(where).iterdir())
    return result["metrics"], evaluate(where, split="validation"), said, files


def test_a_run_in_memory_is_a_run_on_disk(tiny_data, tmp_path):
    memory, disk = (run_world(twice, 1, tiny_data, where)[0] for where in ("memory://store/run", str(tmp_path / "run")))
    assert memory == disk
    assert [entry for entry in memory[2] if entry[0] == "start"] == [("start", 0), ("start", 6)]
    assert memory[0]["validation"].keys() == {"click", "conversion", "rating"} and "events.out" in memory[3]


def test_two_ranks_and_an_object_store(tiny_data, tmp_path):
    """A checkpoint without its manifest and a damaged one are passed over; what follows is bit-equal to an undisturbed run."""
    run, store = f"teststore://{tmp_path}/run", tmp_path / "run"
    train_world(config(tiny_data, run, steps=12), 2)
    assert sorted(p.name for p in (store / "checkpoints").iterdir()) == [f"step-{s:09d}-0" for s in (4, 8, 12)]
    undisturbed = {f: (store / f"checkpoints/step-000000012-0/{f}").read_bytes() for f in ("__0_0.distcp", "__1_0.distcp")}
    (store / "checkpoints/step-000000012-0/manifest.json").unlink()
    shard = store / "checkpoints/step-000000008-0/__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-7] + b"0123456")
    train_world(config(tiny_data, run, steps=12), 2)
    notes = " ".join(r["text"] for r in log(run) if r["kind"] == "note")
    assert f"checkpoint {run}/checkpoints/step-000000012-0 is incomplete" in notes
    assert f"checkpoint {run}/checkpoints/step-000000008-0 is damaged: __1_0.distcp has CRC-32" in notes
    assert [r["step"] for r in log(run) if r["kind"] == "start"] == [0, 4]
    assert sorted(p.name for p in (store / "checkpoints").iterdir()) == [f"step-{s:09d}-{a}" for s, a in ((4, 0), (8, 1), (12, 1))]
    again = {f: (store / f"checkpoints/step-000000012-1/{f}").read_bytes() for f in undisturbed}
    assert again == undisturbed


@pytest.mark.parametrize("path", ["teststore://{}", "{}"])
def test_both_kinds_of_folder(tmp_path, path):
    folder = place(path.format(tmp_path / "a"))
    assert is_remote(folder) == path.startswith("teststore") and not folder.exists()
    remove_tree(folder)
    folder.mkdir(parents=True)
    write_whole(folder / "x", "long")
    write_whole(folder / "x", "é")
    (folder / "b").mkdir()
    write_whole(folder / "b" / "y", "")
    assert sizes(folder) == {"x": 2} and sizes(folder / "b") == {"y": 0}
    assert absolute(str(folder)) == str(folder)
    remove_tree(folder)
    assert not folder.exists() and not (tmp_path / "a" / "x").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", "before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "before")]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_paths_that_are_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place("file:///a/b") == place("/a/b") == Path("/a/b")
    assert absolute("a") == str(tmp_path / "a") and absolute("file:///a") == "/a" and absolute("memory://a/b") == "memory://a/b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/run", "s3://bucket/run: the package that opens s3:// is not installed: pip install 'distmtl[s3]'"),
        ("gs://bucket/run", "gs://bucket/run: the package that opens gs:// is not installed: pip install 'distmtl[gcs]'"),
        ("nonsense://a/b", "nonsense://a/b: Unsupported filesystem: 'nonsense'; s3:// and gs:// are opened by the extras distmtl[s3] and"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tiny_data, tmp_path, capsys, monkeypatch, path, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if not installed
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "c.yaml").write_text(dump_config(config(tiny_data, path)))
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"distmtl train: {message}")


def test_progress_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    """Said once; what could be written is whole lines, and goes on when there is space again."""
    said = []
    progress = Progress(tmp_path, True, said.append)
    progress.say("note", text="one")
    with monkeypatch.context() as m:
        m.setattr("distmtl.tracking.log.append_whole", full)
        progress.say("note", text="two")
        progress.say("note", text="three")
    progress.say("note", text="four")
    progress.close()
    complaint = f"the progress of the run cannot be written to {tmp_path}: [Errno 28] No space left on device; it goes on"
    assert [r["text"] for r in said] == ["one", complaint, "two", "three", "four"]
    assert [r["text"] for r in log(tmp_path)] == ["one", "four"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond: what is written arrives in part, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_is_not_begun(tmp_path):
    progress = Progress(tmp_path, True, lambda record: None)
    progress.say("note", text="one")
    with files_up_to(100_000):
        progress.say("note", text="x" * 200_000)
    progress.say("note", text="two")
    progress.close()
    assert [r["text"] for r in log(tmp_path)] == ["one", "two"]


def test_the_cause_of_a_failed_write_is_told(tmp_path):
    """torch, asked to end its file after a failed write, says "unexpected pos 1024 vs 0" instead."""
    tensor = torch.zeros(100_000)
    with files_up_to(100_000), pytest.raises(OSError, match="File too large"):  # noqa: SIM117
        with SummingFiles(FileSystem()).create_stream(tmp_path / "x", "wb") as stream:
            torch.save(tensor, stream)


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start"}\n{"kind": "tra')
    progress = Progress(tmp_path, True, lambda record: None)
    progress.say("note", text="on")
    progress.close()
    assert [r["kind"] for r in log(tmp_path)] == ["start", "note"]


def test_a_store_that_does_not_answer_ends_no_run(tmp_path, monkeypatch):
    said = []
    progress = Progress(place(f"teststore://{tmp_path}/run"), True, said.append)
    with monkeypatch.context() as m:
        m.setattr(Object, "close", lambda self: full())
        progress.say("note", text="one")
    progress.say("note", text="two")
    progress.close()
    assert [r["text"] for r in log(f"teststore://{tmp_path}/run")] == ["one", "two"]
    assert "cannot be written to teststore://" in said[0]["text"] and not progress.folder.exists()
