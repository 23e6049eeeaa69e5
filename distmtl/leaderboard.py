"""A leaderboard's cells, one per data set × head × weighting, and the table that their runs' results make.

    board = load_leaderboard("configs/leaderboards/synthetic.yaml")
    cells = make_cells(board)                     # cells whose config is wrong carry the reason
    table = Table(board, cells, results, conditions)      # results: (cell, seed) → result.json's object
    print(table.text())

A cell's figures are means over its seeds; ± is half of the 95 % interval of the mean by Student's t. A task's gain is over the
baseline with the same seed, Δ = ±(M - M₀)/|M₀|, + where more is better; Δm is the mean over tasks (Maninis et al. 2019, eq. 4).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from distmtl.config import Config, did_you_mean
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config_file import in_a_line, merge, override, parse_file, read_as, read_mapping, resolve
from distmtl.errors import DistmtlError
from distmtl.metrics import COLUMNS, called, higher_is_better
from distmtl.run_directory import write_json
from distmtl.storage import absolute, write_whole
from distmtl.tabulate import aligned, piped

CONFIDENCE = 0.95


def load_leaderboard(path: str | Path, overrides: Sequence[str] = ()) -> LeaderboardConfig:
    """Read a leaderboard's YAML. Paths under `data` are relative to it, `out` to the working directory.

    Raises:
        DistmtlError: file missing or not YAML, or the list of every mistake in it.
    """
    board = read_as(LeaderboardConfig, path, overrides)
    return board.model_copy(update={"data": {name: resolve(p, Path(path).parent) for name, p in board.data.items()}})


# ---------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Key:
    data: str
    head: str
    weighting: str

    def __str__(self) -> str:
        return f"{self.data}/{self.head}/{self.weighting}"


@dataclass
class Cell:
    """Configs of its runs by seed, or why there are none."""

    key: Key
    runs: dict[int, Config] = field(default_factory=dict)
    failure: str | None = None


def make_cells(board: LeaderboardConfig) -> list[Cell]:
    """Every cell, in the order of the board.

    Raises:
        DistmtlError: a data set's own config cannot be read.
    """
    bases = {name: read_mapping(path) for name, path in board.data.items()}
    lists = [tasks for base in bases.values() if isinstance(tasks := base.get("tasks"), list)]
    of_any = [t.get("name") for tasks in lists for t in tasks if isinstance(t, dict)]
    return [
        _cell(board, Key(data, head, weighting), bases[data], of_any)
        for data in bases
        for head in board.heads
        for weighting in board.weightings
    ]


def _cell(board: LeaderboardConfig, key: Key, base: dict[str, Any], of_any: list[Any]) -> Cell:
    """
    Args:
        of_any: tasks of all data sets; `metrics` may name one that this data set does not have.
    """
    folder = f"{absolute(board.folder)}/{key}"
    weighting = board.weightings[key.weighting].model_dump(mode="json")
    try:
        raw = deepcopy(merge(merge({"train": {"keep": 1}}, base), board.heads[key.head]))
        raw |= {"weighting": weighting, "name": f"{board.name}_{key.head}_{key.weighting}"}
        for item in (*board.overrides, "cluster.workers=1", *([f"train.monitor={board.select}"] if board.select else [])):
            override(raw, item)
        config = parse_file(raw, Path(board.data[key.data]))
        _refuse(board, config, of_any)
    except DistmtlError as e:
        return Cell(key, failure=in_a_line(e))
    runs = {s: config.run.model_copy(update={"seed": s, "dir": f"{folder}/seed-{s}"}) for s in board.seeds}
    return Cell(key, {s: config.model_copy(update={"run": run}) for s, run in runs.items()})


def _refuse(board: LeaderboardConfig, config: Config, of_any: list[Any]) -> None:
    for split, why in (("validation", "the best is chosen by it"), ("test", "the table reports it")):
        if not getattr(config.data, split):
            raise DistmtlError(f"data.{split} is missing: {why}")
    tasks = {t.name: t for t in config.tasks}
    for task, metric in board.metrics.items():
        if task not in tasks and task not in of_any:
            raise DistmtlError(f"metrics.{task}: no task {task!r}{did_you_mean(task, tasks)}")
        if task in tasks and metric not in tasks[task].metrics:
            raise DistmtlError(f"metrics.{task}: {metric!r} is not one of {', '.join(tasks[task].metrics)}")


# ---------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Mean:
    """Mean of n values, and half of its 95 % interval, where two or more are known."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean | None:
        """None where a value is missing: a mean over some of the seeds would flatter."""
        if not values or any(v is None for v in values):
            return None
        x, n = np.array(values, dtype=float), len(values)
        half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        return cls(float(x.mean()), half, n)

    def text(self, digits: str = ".4f", scale: float = 1.0) -> str:
        half = "" if self.half is None else f" ±{format(scale * self.half, digits.lstrip('+'))}"
        return format(scale * self.mean, digits) + half


Results = Mapping[tuple[Key, int], dict[str, Any]]


@dataclass
class Row:
    """A cell's figures. `gains` are shares, + is better; `worse` counts tasks whose gain lies below 0 with its whole interval."""

    cell: Cell
    seeds: list[int] = field(default_factory=list)
    tests: dict[str, Mean | None] = field(default_factory=dict)  # by task
    gains: dict[str, Mean | None] = field(default_factory=dict)
    gain: Mean | None = None  # Δm
    worse: int | None = None
    selected: Mean | None = None  # the validation value
    behind: Mean | None = None  # paired: how much the chosen one is better
    speed: float | None = None
    seconds: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    rank: int | None = None


class Table:
    """What the runs of a board show; complete or not.

    Args:
        results: (cell, seed) → result.json's object, of the runs that are finished.
        conditions: what else there is to say about how it was made, line by line.
    """

    def __init__(self, board: LeaderboardConfig, cells: Sequence[Cell], results: Results, conditions: Sequence[str] = ()):
        self.board, self.cells, self.results, self.conditions = board, cells, results, list(conditions)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Data set → its rows, the best first, cells without a figure last."""
        return {data: self._ranked([self._row(c) for c in self.cells if c.key.data == data]) for data in self.board.data}

    def chosen(self, data: str) -> Row | None:
        first = self.rows[data][0]
        return first if first.rank else None

    def tasks(self, data: str) -> dict[str, str]:
        """Task → its headline metric."""
        configs = [next(iter(c.runs.values())) for c in self.cells if c.key.data == data and c.runs]
        return {t.name: self.board.metrics.get(t.name, t.metrics[0]) for c in configs for t in c.tasks}

    def monitor(self, data: str) -> str:
        configs = [next(iter(c.runs.values())) for c in self.cells if c.key.data == data and c.runs]
        return self.board.select or next((c.train.monitor for c in configs), "loss")

    def _row(self, cell: Cell) -> Row:
        key, tasks = cell.key, self.tasks(cell.key.data)
        of = {s: self.results[key, s] for s in self.board.seeds if (key, s) in self.results}
        if not of:
            return Row(cell)
        base = Key(key.data, *self.board.base)
        first = next(iter(of.values()))
        gains: dict[str, list[float | None]] = {
            t: [_gain(_test(r, t, m), _test(self.results[base, s], t, m), m) for s, r in of.items() if (base, s) in self.results]
            for t, m in tasks.items()
        }
        row = Row(
            cell,
            seeds=list(of),
            tests={t: Mean.of([_test(r, t, m) for r in of.values()]) for t, m in tasks.items()},
            gains={t: Mean.of(g) for t, g in gains.items()},
            gain=Mean.of([None if None in of_seed else sum(of_seed) / len(of_seed) for of_seed in zip(*gains.values())]),
            selected=Mean.of([r["best_value"] for r in of.values()]),
            speed=_mean([r["samples_per_second"] for r in of.values()]),
            seconds=_mean([r["seconds"] for r in of.values()]),
            parameters=first["parameters"],
        )
        known = [g for g in row.gains.values() if g and g.half is not None]
        if len(known) == len(tasks):
            row.worse = sum(g.mean + g.half < 0 for g in known if g.half is not None)
        return row

    def _ranked(self, rows: list[Row]) -> list[Row]:
        up = higher_is_better(self.monitor(rows[0].cell.key.data))
        ranked = sorted(
            (r for r in rows if r.selected and not r.cell.failure), key=lambda r: r.selected.mean * (-1 if up else 1) if r.selected else 0.0
        )
        for i, row in enumerate(ranked):
            row.rank = i + 1
            if i:
                best, mine = ({s: self.results[r.cell.key, s]["best_value"] for s in r.seeds} for r in (ranked[0], row))
                row.behind = Mean.of([(best[s] - mine[s]) * (1 if up else -1) for s in mine if s in best])
        return ranked + [r for r in rows if r.rank is None]

    # ------------------------------------------------------------------------------------------------------ as text

    def text(self) -> str:
        """For a terminal: every data set's table, aligned, its failed cells, the chosen one; then the conditions."""
        return "\n\n".join([*(self._section(data, aligned) for data in self.board.data), "\n".join(self.conditions)])

    def markdown(self) -> str:
        sections = [f"## {data}\n\n{self._section(data, piped)}" for data in self.board.data]
        return "\n\n".join([f"# {self.board.name}", *sections, "\n".join(f"- {c}" for c in self.conditions)]) + "\n"

    def _section(self, data: str, layout: Any) -> str:
        tasks, monitor = self.tasks(data), self.monitor(data)
        head, weighting = self.board.base
        in_full = layout is piped  # a terminal is too narrow for every task's gain
        title = ["", "head", "weighting", f"validation {monitor}"]
        for t, m in tasks.items():
            title += [f"{t} {called(m)}", *([f"Δ {t} %"] if in_full else [])]
        title += ["Δm %", "worse", "samples/s", "tables", "dense", "train s", "seeds"]
        lines, failed = [], []
        for row in self.rows[data]:
            key = row.cell.key
            if row.cell.failure:
                failed.append(f"{key.head}/{key.weighting} failed: {row.cell.failure}")
            if row.rank is None:
                continue
            near = row.behind is not None and row.behind.half is not None and row.behind.mean <= row.behind.half
            is_base = (key.head, key.weighting) == (head, weighting)
            line = [f"{row.rank}{'*' if row.rank == 1 else '≈' if near else ''}", key.head, key.weighting, _show(row.selected)]
            for t, m in tasks.items():
                line.append(_show(row.tests[t], COLUMNS[m][1]))
                if in_full:
                    line.append("–" if is_base else _show(row.gains[t], "+.2f", 100))
            line += [
                "baseline" if is_base else _show(row.gain, "+.2f", 100),
                "–" if is_base or row.worse is None else f"{row.worse}/{len(tasks)}",
                "–" if row.speed is None else f"{row.speed:,.0f}",
                *(f"{row.parameters[of]:,}" for of in ("tables", "dense")),
                "–" if row.seconds is None else f"{row.seconds:,.1f}",
                f"{len(row.seeds)}/{len(self.board.seeds)}",
            ]
            lines.append(line)
        out = [layout(title, lines, left=(1, 2))] if lines else ["no run is finished"]
        if lines:
            out.append(
                f"* chosen by validation {monitor}; ≈ not told apart from it there (95 %, paired by seed). Test metrics: mean ± 95 % "
                f"interval over seeds. Δm: mean over tasks of the gain over {head}/{weighting}, paired by seed; worse: tasks whose whole "
                "interval is a loss."
            )
        out += failed
        if chosen := self.chosen(data):
            out.append(self._choice(chosen, tasks, monitor))
        return "\n\n".join(out) if in_full else "\n".join(out)

    def _choice(self, row: Row, tasks: dict[str, str], monitor: str) -> str:
        shown = ", ".join(f"{t} {called(m)} {_show(row.tests[t], COLUMNS[m][1])}" for t, m in tasks.items())
        is_base = (row.cell.key.head, row.cell.key.weighting) == self.board.base
        gain = (
            "the baseline itself"
            if is_base
            else f"Δm {_show(row.gain, '+.2f', 100)} %, {row.worse if row.worse is not None else '?'} task(s) worse"
        )
        so_far = "" if all(len(r.seeds) == len(self.board.seeds) or r.cell.failure for r in self.rows[row.cell.key.data]) else "so far "
        return f"{so_far}chosen by validation {monitor} ({_show(row.selected)}): {row.cell.key}; test: {shown}; {gain}"

    # ------------------------------------------------------------------------------------------------------ as data

    def json(self) -> dict[str, Any]:
        return {
            "name": self.board.name,
            "baseline": "/".join(self.board.base),
            "seeds": list(self.board.seeds),
            "conditions": self.conditions,
            "data": {
                data: {
                    "select": self.monitor(data),
                    "metrics": self.tasks(data),
                    "chosen": str(chosen.cell.key) if (chosen := self.chosen(data)) else None,
                    "cells": [_plain(row, self.chosen(data) is row) for row in rows],
                }
                for data, rows in self.rows.items()
            },
        }

    def csv(self) -> str:
        """A line per cell: TASK.METRIC of the test split, its ±, the gain in per cent, and so on."""
        tasks = {t: m for data in self.board.data for t, m in self.tasks(data).items()}
        out = io.StringIO()
        lines = csv.writer(out, lineterminator="\n")
        title = ["data", "head", "weighting", "rank", "chosen", "select", "validation", "validation_ci95"]
        for t, m in tasks.items():
            title += [f"{t}.{m}", f"{t}.{m}_ci95", f"{t}.gain_percent", f"{t}.gain_percent_ci95"]
        lines.writerow([*title, "gain_percent", "gain_percent_ci95", "worse", "samples_per_second", "table_parameters", "dense_parameters",
                        "train_seconds", "seeds", "failure"])  # fmt: skip
        for data, rows in self.rows.items():
            for row in rows:
                key = row.cell.key
                line: list[Any] = [data, key.head, key.weighting, row.rank, int(row.rank == 1), self.monitor(data), *_pair(row.selected)]
                for t in tasks:
                    line += [*_pair(row.tests.get(t)), *_pair(row.gains.get(t), 100)]
                line += [*_pair(row.gain, 100), row.worse, row.speed, row.parameters.get("tables"), row.parameters.get("dense")]
                lines.writerow([*line, row.seconds, len(row.seeds), row.cell.failure])
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """leaderboard.md, .json and .csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "leaderboard.md", self.markdown())
        write_json(folder / "leaderboard.json", self.json())
        write_whole(folder / "leaderboard.csv", self.csv())


def _test(result: dict[str, Any], task: str, metric: str) -> float | None:
    return result["metrics"]["test"].get(task, {}).get(metric)


def _gain(value: float | None, base: float | None, metric: str) -> float | None:
    if value is None or not base:
        return None
    return (value - base) / abs(base) * (1 if higher_is_better(metric) else -1)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 3) if known else None


def _show(mean: Mean | None, digits: str = ".4f", scale: float = 1.0) -> str:
    return mean.text(digits, scale) if mean else "–"


def _pair(mean: Mean | None, scale: float = 1.0) -> tuple[float | None, float | None]:
    return (None, None) if mean is None else (scale * mean.mean, None if mean.half is None else scale * mean.half)


def _plain(row: Row, chosen: bool) -> dict[str, Any]:
    def plain(mean: Mean | None) -> dict[str, Any] | None:
        return None if mean is None else {"mean": mean.mean, "ci95": mean.half, "n": mean.n}

    return {
        "head": row.cell.key.head,
        "weighting": row.cell.key.weighting,
        "rank": row.rank,
        "chosen": chosen,
        "failure": row.cell.failure,
        "seeds": row.seeds,
        "validation": plain(row.selected),
        "behind": plain(row.behind),
        "test": {t: plain(m) for t, m in row.tests.items()},
        "gains": {t: plain(m) for t, m in row.gains.items()},
        "gain": plain(row.gain),
        "worse": row.worse,
        "samples_per_second": row.speed,
        "train_seconds": row.seconds,
        "parameters": row.parameters,
    }
