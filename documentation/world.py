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
from pathlib import Path

import pyarrow.parquet as pq

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

SEARCH = """\
name: search
config: my.yaml
trials: 2
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
        (folder / ".curlrc").write_text("fail\n")  # an answer of 4xx is a failure
        self.need("data/synthetic")
        self.pristine = {*os.listdir(folder), ".made", *(f"data/{name}" for name in LOGS)}

    def new_page(self) -> None:
        """What the pages before have left is not there for the reader of this one."""
        for child in (*self.folder.iterdir(), *(self.folder / "data").iterdir()):
            if str(child.relative_to(self.folder)) not in self.pristine:
                remove(child)

    @contextmanager
    def ready_for(self, command: str) -> Iterator[None]:
        """Make what the command reads and nobody has made; logs that it writes are cut short afterwards."""
        written = writes(command)
        if "distmtl synth" in command:
            for path in written:
                remove(self.folder / path)
        for pattern, _ in RECIPES:
            for path in mentioned(pattern, command):
                if path not in written:
                    self.need(path)
        yield
        cut(self.folder / "data")

    def need(self, path: str) -> None:
        """Make a path by its recipe, if it is not there."""
        if not (self.folder / path).exists():
            next(make for pattern, make in RECIPES if re.fullmatch(pattern, path))(self, path)

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


def mentioned(pattern: str, text: str) -> list[str]:
    """Paths of a pattern that a text names, or names something in."""
    return [found[0] for found in re.finditer(rf"(?<![\w./-])(?:{pattern})(?![\w.-])", text)]


def writes(command: str) -> list[str]:
    """Where a command says, or is known, to write."""
    paths = [path.rstrip("/") for path in re.findall(r"(?:--out[ =]|--publish[ =]|run\.dir=|cat > )(\S+)", command)]
    if (found := re.search(r"distmtl init (\S+)", command)) and "--out" not in command:
        paths.append(f"{Path(found[1]).stem}-distmtl")
    if (found := re.search(r"distmtl train (\S+)\.yaml", command)) and "run.dir=" not in command:
        name = re.search(r" name=(\S+)", command)
        paths.append(f"runs/{name[1] if name else Path(found[1]).name}")
    if found := re.search(r"python make_(\w+)\.py", command):
        paths.append(f"data/{found[1]}")
    return paths


def cut(folder: Path) -> None:
    """Leave of every folder of Parquet files what trains in seconds."""
    for place in {file.parent for file in folder.rglob("*.parquet")}:
        files, most = sorted(place.glob("*.parquet")), ROWS if place.name == "train" else ROWS // 8
        if sum(pq.read_metadata(file).num_rows for file in files) > most:
            rows = pq.read_table(place).slice(0, most)
            for file in files:
                file.unlink()
            pq.write_table(rows, files[0], row_group_size=ROWS // 16)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _search(world: World, path: str) -> None:
    world.need("my.yaml")
    (world.folder / path).write_text(SEARCH)


LOGS = {"synthetic": "", "domains": "--domains 3", "conflict": "--conflict", "drift": "--drift --partitions 14", "wide": "--wide"}
RECIPES: tuple[tuple[str, Callable[[World, str], None]], ...] = (
    *((f"data/{name}", _synth(f"--rows {ROWS} {options}")) for name, options in LOGS.items()),
    (r"my\.yaml", _my_config),
    (r"board\.yaml", _board),
    (r"search\.yaml", _search),
    (r"logs(\.csv)?", _logs),
    (r"day=\d+", _day),
    (r"runs/(my|quickstart|synthetic|a|b)", _run),
    (r"exports/(my|quickstart|synthetic|a|b)", _export),
    (r"data/logs|logs-distmtl", _init),
)
