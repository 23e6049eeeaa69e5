"""From a CSV or Parquet log to a first config that explains itself, and splits that it trains on.

draft = init("logs.csv", ["click", "purchase"], Path("data/logs"))
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from distmtl.config import did_you_mean
from distmtl.config_file import load_config, name_of
from distmtl.data.check import check_dataset
from distmtl.data.dataset import open_dataset
from distmtl.data.init.csv_log import header, to_parquet
from distmtl.data.init.guess import ID, Guess, guess, share_tables
from distmtl.data.init.labels import comes_before, gives_away, parents_of, task_of
from distmtl.data.init.page import Page
from distmtl.data.init.sample import Column, read_sample, schema_of
from distmtl.data.init.splits import Split, is_time, ready_splits, split_by, write_splits
from distmtl.data.output import new_folder
from distmtl.errors import DistmtlError

RARE = 100  # rows of a class
COPIED_ROWS = 20_000_000  # larger logs stay where they are, and a person splits them
CSV = (".csv", ".tsv")
PACKED = ("", ".gz", ".bz2", ".zst")
TIME = "a time: the splits may follow it, but a model that knew it could not rank later rows; derive an hour or an age from it"
OUTCOME = re.compile(
    r"(is_|has_)?(click|like|dislike|buy|bought|purchase|order|conver[ts]|conversion|share|forward|follow|favou?rite|comment|read_comment|cart|"
    r"add_to_cart|pay|paid|play|stay|dwell|watch|install|skip|finish|click_avatar)(e?d|_time|_seconds|_duration)?",
    re.IGNORECASE,
)
GROUP = ("user", "member", "customer", "account", "visitor", "device", "session", "query", "search", "request", "uid")


@dataclass(frozen=True)
class Asked:
    """Columns that the user named."""

    labels: Sequence[str]
    group: str | None = None
    time: str | None = None
    weight: str | None = None
    left_out: Collection[str] = ()

    def check(self, columns: list[str]) -> None:
        """Refuse what is not there.

        Raises:
            DistmtlError: no such column, or one in two roles.
        """
        options = {"--labels": self.labels, "--leave-out": self.left_out}
        options |= {f"--{o}": [c] if c else [] for o, c in (("group", self.group), ("time", self.time), ("weight", self.weight))}
        for option, names in options.items():
            for name in names:
                if name not in columns:
                    close = did_you_mean(name, columns) or f"; there are {', '.join(columns[:12])}{' …' if len(columns) > 12 else ''}"
                    raise DistmtlError(f"{option}: no column {name!r}{close}")
                if option != "--labels" and name in self.labels:
                    raise DistmtlError(f"{option}: column {name!r} is a label already; choose one")
        if twice := [name for name in self.labels if list(self.labels).count(name) > 1]:
            raise DistmtlError(f"--labels: {twice[0]!r} is named twice")


@dataclass(frozen=True)
class Draft:
    """What was written: the config, rows of every split, the reason for every column, and what a person should look at."""

    config: Path
    rows: dict[str, int]
    columns: list[tuple[str, str, str, str]]  # name, what it holds, what it becomes, why
    notices: list[str]


def init(data: str, asked: Asked, out: Path | None = None) -> Draft:
    """Read a log, guess a config and write it, with splits to train on, to a new folder, whole or not at all.

    CSV becomes Parquet. A log of at most COPIED_ROWS rows is copied into train, validation and test; a larger one, and a folder in
    which there is a folder train, stay where they are.

    Raises:
        DistmtlError: data that cannot be read, columns that are not there, labels with nothing to learn from, no features, a full `out`.
    """
    name = _name(data)
    out = out or Path(f"{name}-distmtl")
    with new_folder(out) as folder:
        ready = ready_splits(data)
        log = folder / "log.parquet"
        if files := [] if ready else csv_files(data):
            asked.check(header(files[0])[0])
            to_parquet(files, log, asked.left_out)
        dataset = open_dataset(str(log) if files else ready.get("train", absolute(data)))
        copied = not ready and (bool(files) or dataset.rows <= COPIED_ROWS)
        schema = schema_of(dataset)
        asked.check(schema.names)
        columns, whole = _with_whole_ids(read_sample(dataset, schema), copied)
        labels = {label: columns[label] for label in asked.labels}
        tasks, notices = _tasks(labels)
        features, more = _features(columns, labels, asked, copied)
        notices += more

        if copied:
            split = _split(columns, asked)
            rows = write_splits(folder, dataset, schema, split, whole)
            log.unlink(missing_ok=True)
            lines = [(s, s, f"{n:,} rows: {split.why(s)}") for s, n in rows.items()]
            if split.column is None:
                notices.append(
                    "no column is a time, so the splits are random rows, which flatters the metrics: a model is used on later rows; "
                    "name a time with --time"
                )
        elif ready:
            rows = {s: open_dataset(path).rows for s, path in ready.items()}
            lines = [(s, path, f"{rows[s]:,} rows, where they were") for s, path in ready.items()]
        else:
            rows = {"train": dataset.rows}
            lines = [("train", absolute(data), f"{dataset.rows:,} rows: too many to copy, so nothing is held out")]
            notices.append(
                f"{dataset.rows:,} rows were not copied: move the last files to a folder of their own and name it as data.validation"
            )
        if group := _group(columns, asked, labels):
            lines.append(("group", *group))
        if asked.weight:
            lines.append(("weight", asked.weight, "as asked: a factor on every loss"))
        seen = next(iter(columns.values())).rows
        part = "all its" if seen == dataset.rows else f"a sample of {seen:,} of its"
        page = Page(
            name,
            f"A first config of {data}, from {part} {dataset.rows:,} rows.",
            lines,
            features,
            tasks,
            rows["train"],
            "validation" in rows,
        )
        file = folder / page.file_name
        file.write_text(page.text(), encoding="utf-8")
        config = load_config(file)
        for s in rows:
            check_dataset(open_dataset(str(getattr(config.data, s))), config, s)
    becomes = {task.get("label", task["name"]): (task["kind"], why) for task, why in tasks}
    becomes |= {g.column: (_called(g), g.why) for g in features}
    if asked.weight:
        becomes[asked.weight] = ("weight", "as asked")
    return Draft(out / page.file_name, rows, [(n, c.holds, *becomes[n]) for n, c in columns.items()], notices)


def _split(columns: dict[str, Column], asked: Asked) -> Split:
    others = {*asked.labels, *asked.left_out, asked.weight} - {asked.time}
    return split_by([c for c in columns.values() if c.name not in others], asked.time)


def _called(g: Guess) -> str:
    """A guess in a few words."""
    if not g.feature:
        return "left out"
    f = g.feature
    size = {"id": "rows", "sequence": "rows", "vector": "width"}.get(f["kind"])
    return f["kind"] + (f", {size} {f[size]:,}" if size else ", log" if f.get("log") else "")


def _tasks(labels: dict[str, Column]) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    names = _names(list(labels))
    guessed = {label: task_of(column, names[label]) for label, column in labels.items()}
    parents, out, notices = parents_of(labels), [], []
    for label, (task, why) in guessed.items():
        if task["kind"] == "binary" and (rare := int(labels[label].counts.min())) < RARE:
            notices.append(f"label {label}: {rare:,} rows of one class are few to learn from, and to measure by")
        if parent := parents.get(label):
            task["parents"] = [names[parent]]
            why += f"; 1 only where {parent} is, so P({label} | {parent}) is learnt there (docs/models.md: funnels)"
            notices.append(f"{label} happens only after {parent}: it is trained where {parent} is 1; kind esmm: on all impressions")
        out.append((task, why))
    return out, notices


def _features(columns: dict[str, Column], labels: dict[str, Column], asked: Asked, copied: bool) -> tuple[list[Guess], list[str]]:
    """A guess for every column that is no label and no weight."""
    rest = {name: c for name, c in columns.items() if name not in labels and name != asked.weight}
    names, guesses, notices = _names(list(columns)), dict[str, Guess](), list[str]()
    for name, column in rest.items():
        if name in asked.left_out:
            guesses[name] = Guess(name, None, "as asked")
            continue
        if is_time(column) or name == asked.time:
            guesses[name] = Guess(name, None, TIME)
            continue
        guesses[name] = guess(column, names[name])
        if guesses[name].feature and column.not_finite:
            odd = f"{column.not_finite:,} values of the sample are NaN or infinite"
            guesses[name] = (
                replace(guesses[name], why=f"{guesses[name].why}; {odd}, null in the copy") if copied else Guess(name, None, odd)
            )
        if leak := next((why for label in labels.values() if (why := gives_away(column, label))), None):
            if guesses[name].feature:
                guesses[name] = Guess(name, None, leak)
                notices.append(f"{name} is left out: {leak}")
        elif guesses[name].feature:
            after = [f"is 1 wherever label {label} is" for label, y in labels.items() if comes_before(column, y)]
            if after or OUTCOME.fullmatch(name):
                what = after[0] if after else "is called like something that people do"
                notices.append(f"{name} {what}: if it is known only after the impression, name it in --labels or --leave-out")
    if not any(g.feature for g in guesses.values()):
        reasons = "; ".join(f"{g.column}: {g.why}" for g in list(guesses.values())[:5])
        raise DistmtlError(f"no column is left that could be a feature ({reasons or 'there are labels only'}); give the log more columns")
    share_tables(guesses, rest)
    return list(guesses.values()), notices


def _group(columns: dict[str, Column], asked: Asked, labels: dict[str, Column]) -> tuple[str, str] | None:
    """The column of GAUC's groups, and why: the one asked for, or the first that is called like a user or a session."""
    if asked.group:
        if columns[asked.group].holds not in ("integer", "string"):
            raise DistmtlError(f"--group {asked.group}: it holds {columns[asked.group].holds}s; name a column of integers or strings")
        return asked.group, "as asked: GAUC ranks within its groups"
    possible = [
        c
        for c in columns.values()
        if c.holds in ("integer", "string") and c.name not in {*labels, *asked.left_out} and c.distinct > 1 and not c.unique
    ]
    for word in GROUP:
        if found := next((c for c in possible if re.fullmatch(rf"{word}s?_?(id|key|hash|uuid|no)?", c.name, re.IGNORECASE)), None):
            return found.name, f"by its name: GAUC ranks within every {word}"
    return None


def _with_whole_ids(columns: list[Column], copied: bool) -> tuple[dict[str, Column], set[str]]:
    """Ids that are floats because some are null, which is how pandas has them, as integers in the copies; and their names."""
    out, whole = {c.name: c for c in columns}, set()
    for c in columns:
        if (
            copied
            and c.holds == "number"
            and ID.search(c.name)
            and len(c.known)
            and (np.abs(x := c.numbers) < 2**53).all()
            and (x == np.floor(x)).all()
        ):
            out[c.name] = replace(c, holds="integer", values=c.values.cast(pa.int64()), low=int(x.min()), high=int(x.max()))
            whole.add(c.name)
    return out, whole


def _names(columns: list[str]) -> dict[str, str]:
    """Column → a name that a config can have, each once."""
    out: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", column)
        name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
        while name in out.values():
            name += "_"
        out[column] = name
    return out


def _name(data: str) -> str:
    """Of the run: the last part of the path that is no glob and not train, without its endings."""
    parts = [p for p in PurePosixPath(data).parts if not any(c in p for c in "*?[") and p not in ("/", ".", "..", "train")]
    return name_of(Path(parts[-1].split(".")[0] or "log")) if parts else "log"


def absolute(data: str) -> str:
    return data if "://" in data else str(Path(data).expanduser().absolute())


def csv_files(data: str) -> list[Path]:
    """The CSV files of a path, in name order; none where it is of Parquet.

    Raises:
        DistmtlError: a folder or glob of both.
    """
    if "://" in data:
        return []
    place = Path(data).expanduser()
    found = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [Path(p) for p in glob.glob(str(place), recursive=True)]
    files = sorted(p for p in found if p.name.lower().endswith(tuple(f"{kind}{end}" for kind in CSV for end in PACKED)))
    if files and (other := next((p for p in found if p.suffix in (".parquet", ".pq")), None)):
        raise DistmtlError(f"{data} holds CSV ({files[0].name}) and Parquet ({other.name}); name those of one format, such as {data}/*.csv")
    if not files and place.is_file() and place.suffix not in (".parquet", ".pq"):
        raise DistmtlError(f"{data} is neither CSV nor Parquet by its name; name a file that ends in {', '.join(CSV)} or .parquet")
    return files
