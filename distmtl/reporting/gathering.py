"""What a run's directory says about it: its log, plan, result and config; of a followed run those of all its partitions, end to end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from distmtl.config import Config
from distmtl.config_file import flat
from distmtl.errors import DistmtlError
from distmtl.health_page import History, history_of
from distmtl.run_directory import config_of, partition_runs, read_json
from distmtl.storage import place
from distmtl.tracking.log import LOG, LogReader, counted, read_log
from distmtl.tracking.records import Record

SAID = ("start", "note", "failed", "stopped", "end")  # kinds of records that tell what happened


@dataclass(frozen=True)
class Run:
    """A run up to now. Steps of a followed run count through its partitions."""

    name: str  # no other run of the report has it
    path: str
    config: Config
    records: list[Record]  # of its log, without what failures undid
    events: list[Record]  # what happened, with what was undone
    history: History | None  # of its health
    plan: Record | None
    result: Record | None
    partitions: list[Record]  # follow.jsonl's lines; none where nothing is followed

    def of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind]

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Split → task → metric → value: the result's, before there is one the last that the log has."""
        if self.result:
            return self.result["metrics"]
        return {r["split"]: r["metrics"] for r in self.of_kind("evaluation")}

    @property
    def attempts(self) -> list[Record]:
        return [e for e in self.events if e["kind"] == "start"]

    @property
    def restarts(self) -> list[int]:
        """Steps that a later attempt of the same run, or partition, went on from."""
        return [e["step"] for e in restarts_of(self.events)]


def restarts_of(events: Sequence[Record]) -> list[Record]:
    """Starts of a run, or partition, that had been started before."""
    starts = [e for e in events if e["kind"] == "start"]
    return [e for before, e in pairwise(starts) if before.get("partition") == e.get("partition")]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """
    Raises:
        DistmtlError: a path that is no run.
    """
    return [read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)]


def names_of(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them are in."""
    whole = [os.path.normpath(p) if "://" not in p else p.rstrip("/") for p in paths]
    parts = [p.split("/") for p in whole]
    alike = 0
    while all(len(p) > alike + 1 for p in parts) and len({tuple(p[: alike + 1]) for p in parts}) == 1:
        alike += 1
    names = ["/".join(p[alike:]) for p in parts]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def read_run(path: str, name: str) -> Run:
    """
    Raises:
        DistmtlError: no run there.
    """
    return run_of(RunLog(path), name)


class RunLog:
    """The records of a run up to the last `refresh`, also of one in progress; nothing is read twice.

    Attributes:
        records: of its log, without what failures undid.
        events: what happened, with what was undone.

    Raises:
        DistmtlError: no run there.
    """

    def __init__(self, path: str):
        self.path, self.folder = path, place(path)
        self._begin()
        if not self.refresh() or not (self.folder / "config.yaml").exists():
            if not self.logs and (self.folder / "config.yaml").exists():
                raise DistmtlError(f"{path} has said nothing yet: its training is still starting, or ended before it did; try again soon")
            raise DistmtlError(f"{path} is no run: it has no {'config.yaml' if self.logs else LOG}")

    def _begin(self) -> None:
        self.records: list[Record] = []
        self.events: list[Record] = []
        self.logs: list[Path] = []  # folders of those that were found; of a followed run only the last one grows
        self.first = self.offset = 0  # of the last one: its first record, the steps before it

    def refresh(self) -> list[Record]:
        """Read what is new, and return it."""
        chain, new = partition_runs(self.folder), []
        folders = chain or [self.folder]
        if self.logs and self.logs[-1] not in folders:  # what was trained of the newest partition was undone
            self._begin()
        for folder in folders[folders.index(self.logs[-1]) if self.logs else 0 :]:
            if not self.logs or folder != self.logs[-1]:
                if not (folder / LOG).exists():
                    continue
                self.logs.append(folder)
                self.first, self.offset = len(self.records), max([0, *(r["step"] for r in self.records if "step" in r)])
                self.reader = LogReader(folder / LOG)
            read = [moved(r, self.offset, folder.name if chain else None) for r in self.reader.read()]
            if self.reader.another:  # the run was begun anew
                self._begin()
                return self.refresh()
            self.records[self.first :] = counted(read, self.records[self.first :])
            self.events += [r for r in read if r["kind"] in SAID]
            new += read
        return new


def run_of(log: RunLog, name: str) -> Run:
    """What is known of a run beside its log, too."""
    folder = log.folder
    try:
        history = history_of(log.path, log.records)
    except DistmtlError:
        history = None
    return Run(
        name,
        log.path,
        config_of(folder),
        log.records,
        log.events,
        history,
        read_json(log.logs[-1] / "plan.json"),
        read_json(folder / "result.json"),
        read_log(folder / "follow.jsonl") if (folder / "follow.jsonl").exists() else [],
    )


def moved(record: Record, offset: int, partition: str | None) -> Record:
    """As one of a longer log."""
    out = {**record, "step": record["step"] + offset} if "step" in record else dict(record)
    return out if partition is None else {**out, "partition": partition}


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key → its value in every run, None where it has none; of keys that are not the same in all."""
    trees = [flat(run.config.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(k for tree in trees for k in tree))
    values = {k: [tree.get(k) for tree in trees] for k in keys}
    return {k: v for k, v in values.items() if any(other != v[0] for other in v)}
