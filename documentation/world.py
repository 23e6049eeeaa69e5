"""A checkout in which the paths of the documentation exist, at small sizes, so that its commands take seconds.

A command finds the world as it would be had the reader done before what the page takes for granted: data/synthetic is there, with fewer
rows, and so are a config my.yaml, a log logs.csv, partitions day=7/, runs and exports. They are made when the first command names them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from documentation.blocks import ROOT

LEFT_OUT = {".git", ".venv", "build", "data", "runs", "exports", "leaderboards"}  # of the checkout itself
ROWS = 24_000
MY_CONFIG = """\
from pathlib import Path
text = Path("configs/synthetic.yaml").read_text().replace("../data", "data").replace("name: synthetic", "name: my")
Path("my.yaml").write_text(text.replace(", decay: cosine", ""))
"""
CSV = """\
import pyarrow.parquet as pq
log = pq.read_table("data/synthetic/train").slice(0, 8000).to_pandas().rename(columns={"conversion": "purchase"})
log["purchase"] = log["purchase"].fillna(0).astype(int)
log[["user_id", "item_id", "category", "brand", "device", "hour", "price", "click", "purchase"]].to_csv("logs.csv", index=False)
"""
PARTITIONS = """\
from pathlib import Path
import pyarrow.parquet as pq
log = pq.read_table("data/synthetic/train")
for day in range(3):
    folder = Path(f"logs/day={day}")
    folder.mkdir(parents=True)
    pq.write_table(log.slice(day * 6000, 6000), folder / "part-0.parquet")
    (folder / "_SUCCESS").touch()
"""
TRAINED = "from distmtl import load_config, train; train(load_config('my.yaml', ['run.dir=.made/run']))"
BOARD = """\
name: board
data: {mine: my.yaml}
heads: {mmoe: {model: {kind: mmoe}}, ple: {model: {kind: ple}}}
seeds: 1
overrides: [train.steps=4]
"""


class World:
    """A folder that looks like a checkout after `make install`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, ignore=lambda at, names: LEFT_OUT if Path(at) == ROOT else ())
        venv = folder / ".venv"
        venv.mkdir()
        for part in Path(sys.prefix).iterdir():
            (venv / part.name).symlink_to(part)
        for asked in ("pyproject.toml", "constraints.txt"):
            os.utime(folder / asked, (0, 0))  # make: what is installed is newer
        for stamp in (".installed", ".installed-dev", ".installed-docs"):
            (venv / stamp).unlink(missing_ok=True)
            (venv / stamp).touch()
        self.environment = {
            **os.environ,
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "local"),  # never a cluster that happens to run here
            "RAY_USAGE_STATS_ENABLED": "0",
            "CURL_HOME": str(folder),
        }
        (folder / ".curlrc").write_text("fail-with-body\n")  # an answer of 4xx is a failure
        self.need("data/synthetic")
        self.pristine = {*os.listdir(folder), ".made"}

    def new_page(self) -> None:
        """What the pages before have left is not there for the reader of this one."""
        for child in self.folder.iterdir():
            if child.name not in self.pristine:
                remove(child)
        for child in (self.folder / "data").iterdir():
            if f"data/{child.name}" not in LOGS:
                remove(child)

    @contextmanager
    def ready_for(self, command: str) -> Iterator[None]:
        """Make what the command reads and nobody has made; where it writes a log of its size, a small one is put back."""
        written = [*self.writes(command)]
        logs = [path for path in written if path in LOGS]
        for path in logs:
            remove(self.folder / path)
        for path in self.paths(command):
            if not any(path == w or path.startswith(f"{w}/") for w in written):
                self.need(path)
        yield
        for path in logs:
            remove(self.folder / path)
            self.need(path)

    def need(self, path: str) -> None:
        """Make a path, or what it lies in, if there is a recipe for it and it is not there."""
        for pattern, make in RECIPES:
            if (found := re.match(rf"{pattern}(?=/|$)", path)) and not (self.folder / found[0]).exists():
                make(self, found[0])

    def paths(self, command: str) -> Iterator[str]:
        for word in _words(command):
            yield word.removeprefix("./").partition("=")[2] if re.match(r"[a-z_.]+=\w+/", word) and not word.startswith("day=") else word

    def writes(self, command: str) -> Iterator[str]:
        words = _words(command)
        for option, value in pairwise(words):
            if option in ("--out", "--publish"):
                yield value.rstrip("/")
        if "init" in words and "--out" not in words:
            yield f"{Path(words[words.index('init') + 1]).stem}-distmtl"

    def python(self, code: str) -> None:
        self.run(sys.executable, "-c", code)

    def distmtl(self, arguments: str) -> None:
        self.run(sys.executable, "-m", "distmtl", *shlex.split(arguments))

    def run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the world could not be made: {shlex.join(command)}\n{done.stdout}{done.stderr}")

    def copy(self, source: str, target: str) -> None:
        shutil.copytree(self.folder / source, self.folder / target)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def _synth(options: str) -> Callable[[World, str], None]:
    return lambda world, path: world.distmtl(f"synth --out {path} {options}")


def _my_config(world: World, path: str) -> None:
    world.python(MY_CONFIG)


def _logs(world: World, path: str) -> None:
    world.python(CSV if path.endswith(".csv") else PARTITIONS)


def _day(world: World, path: str) -> None:
    world.copy("data/synthetic/test", path)


def _run(world: World, path: str) -> None:
    world.need("my.yaml")
    if not (world.folder / ".made/run").exists():
        world.python(TRAINED)
    world.copy(".made/run", path)


def _export(world: World, path: str) -> None:
    if not (world.folder / ".made/export").exists():
        world.need("runs/quickstart")
        world.distmtl("export runs/quickstart --out .made/export")
    world.copy(".made/export", path)


def _init(world: World, path: str) -> None:
    world.need("logs.csv")
    world.distmtl(f"init logs.csv --labels click,purchase --out {path}")


def _board(world: World, path: str) -> None:
    world.need("my.yaml")
    (world.folder / path).write_text(BOARD)


LOGS = ("data/synthetic", "data/domains", "data/conflict", "data/drift", "data/wide")
RECIPES: tuple[tuple[str, Callable[[World, str], None]], ...] = (
    (r"data/synthetic", _synth(f"--rows {ROWS}")),
    (r"data/domains", _synth(f"--rows {ROWS} --domains 3")),
    (r"data/conflict", _synth(f"--rows {ROWS} --conflict")),
    (r"data/drift", _synth(f"--rows {ROWS} --drift --partitions 14")),
    (r"data/wide", _synth(f"--rows {ROWS} --wide")),
    (r"my\.yaml", _my_config),
    (r"board\.yaml", _board),
    (r"logs(\.csv)?", _logs),
    (r"day=\d+", _day),
    (r"runs/\w+", _run),
    (r"exports/\w+", _export),
    (r"data/logs|logs-distmtl", _init),
)
