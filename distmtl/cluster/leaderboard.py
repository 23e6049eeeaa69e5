"""run_leaderboard(): a board's runs on Ray actors, several at a time; what is finished is not run again."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from distmtl.cluster.places import places_for_one, worker_resources
from distmtl.cluster.supervision import last_line
from distmtl.cluster.trainer import refuse_fleeting, session, use_gpu, work
from distmtl.config import Workers
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config_file import in_a_line
from distmtl.errors import DistmtlError
from distmtl.leaderboard import Cell, Key, Table, make_cells
from distmtl.progress import duration
from distmtl.run_directory import continuation, finished
from distmtl.storage import is_remote, place
from distmtl.versions import git_commit, versions

Say = Callable[[str], None]
ATTEMPTS = 2  # of a run whose process dies


def run_leaderboard(board: LeaderboardConfig, say: Say = print) -> Table:
    """Train what is not finished, on actors of the cluster that RAY_ADDRESS or `ray start` offers, else of a local one. Writes the
    table after every run, and returns it.

    A cell that fails says why in the table; the others go on. Failing configs and data are found before anything is started.

    Raises:
        DistmtlError: a data set's own config cannot be read, or the cluster has no place for a single run.
    """
    refuse_fleeting(board.folder, "out")
    cells = make_cells(board)
    results, runs = _look(board, cells)
    folder = place(board.folder)

    def table(*more: str) -> Table:
        return Table(board, cells, results, [*_conditions(board, results), *more])

    for cell in cells:
        if cell.failure:
            say(f"{cell.key} fails: {cell.failure}")
    total = len(cells) * len(board.seeds)
    say(f"{board.name}: {len(cells)} cells × {len(board.seeds)} seeds in {folder}: {len(results)} runs are finished, {len(runs)} to train")
    if runs:
        cluster = max((c.runs[s].cluster for s, c in runs), key=lambda cluster: cluster.cpus_per_worker)
        with session(cluster.model_copy(update={"workers": Workers(min=1, max=board.parallel or 1)})):
            resources = worker_resources(cluster, use_gpu(cluster))
            room = places_for_one(resources)
            slots = min(board.parallel or room, room, len(runs))
            say(f"training {slots} at a time, {' and '.join(f'{n} {k}' for k, n in resources.items())} each")
            spent: list[float] = []
            for seed, cell, outcome in _train(runs, resources, slots):
                what = note(seed, cell, outcome, results)
                spent.append(outcome["seconds"])
                left = sum(not c.failure and (c.key, s) not in results for s, c in runs)
                eta = duration(sum(spent) / len(spent) * left / slots)
                say(f"[{total - left}/{total}] {cell.key} seed {seed}: {what}  ({outcome['seconds']:.0f} s, ETA {eta})")
                if results:
                    table().write(folder)
    final = table(f"disk: {_size(folder) / 2**20:,.0f} MB in {folder}, checkpoints included" if not is_remote(folder) else "")
    if results:  # else what is there, of another config, stays
        final.write(folder)
    return final


def note(seed: int, cell: Cell, outcome: dict[str, Any], results: dict[tuple[Key, int], dict[str, Any]]) -> str:
    """Put an outcome of `_train` into `results` or the cell's failure, and say it. A run that somebody stopped is still to train."""
    if "error" in outcome:
        cell.failure = f"seed {seed}: {in_a_line(DistmtlError(outcome['error']))}"
        return f"failed: {cell.failure}"
    result = outcome["result"]
    if result["stopped"]:
        return "stopped; the same command continues it"
    results[cell.key, seed] = result
    return f"validation {cell.runs[seed].train.monitor} {result['best_value']:.4f}"


def _look(board: LeaderboardConfig, cells: list[Cell]) -> tuple[dict[tuple[Key, int], dict[str, Any]], list[tuple[int, Cell]]]:
    """Results that are there, and runs to train, all cells of a seed before the next seed. Cells that cannot be trained get their
    failure."""
    from distmtl.data.splits import open_splits
    from distmtl.model.head import try_plugin

    results: dict[tuple[Key, int], dict[str, Any]] = {}
    seen: dict[tuple[str, str], Any] = {}  # by data and head: the weighting reads no data
    for cell in (c for c in cells if not c.failure):
        where = cell.key.data, cell.key.head
        try:
            for seed, config in cell.runs.items():
                if where not in seen:
                    try:
                        seen[where] = open_splits(config)
                        try_plugin(config)
                    except DistmtlError as e:
                        seen[where] = e
                if isinstance(seen[where], DistmtlError):
                    raise seen[where]
                continuation(config, "auto", seen[where]["train"])
                if result := finished(config, {split: data.digest for split, data in seen[where].items()}):
                    results[cell.key, seed] = result
        except DistmtlError as e:
            cell.failure = in_a_line(e)
            for seed in board.seeds:
                results.pop((cell.key, seed), None)
    return results, [(s, c) for s in board.seeds for c in cells if not c.failure and (c.key, s) not in results]


def _train(runs: list[tuple[int, Cell]], resources: dict[str, int], slots: int) -> Iterator[tuple[int, Cell, dict[str, Any]]]:
    """Seed, cell and outcome, {"result"} or {"error"}, of every run as they end. A cell that has failed by then is not run again.

    Raises:
        DistmtlError: an actor cannot be started.
    """
    waiting = deque((seed, cell, 1) for seed, cell in runs)
    actor = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(Slot)
    at_work: dict[Any, Any] = {}  # reference → actor, and its run: None while it starts

    def hire() -> None:
        handle = actor.remote()
        at_work[handle.ready.remote()] = handle, None

    for _ in range(slots):
        hire()
    while at_work:
        (reference,), _ = ray.wait(list(at_work))
        handle, run = at_work.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayError as e:  # the process died, or is in a state that nobody knows: another one goes on
            if run is None:
                raise DistmtlError(f"a process for the runs cannot be started: {last_line(e)}") from e
            handle, died = None, isinstance(e, RayActorError)
            outcome = {"error": "its process was killed" if died else last_line(e)}
            if died and run[2] < ATTEMPTS:
                waiting.appendleft((run[0], run[1], run[2] + 1))
                run = None
        if run:
            yield run[0], run[1], outcome | {"seconds": time.monotonic() - run[3]}
        while waiting and waiting[0][1].failure:
            waiting.popleft()
        if waiting and handle is None:
            hire()
        elif waiting:
            seed, cell, attempt = waiting.popleft()
            began = time.monotonic()
            at_work[handle.train.remote(cell.runs[seed].model_dump(mode="json"))] = handle, (seed, cell, attempt, began)


class Slot:
    """An actor: one run after another in one process, whose start and imports are paid once."""

    def ready(self) -> None:
        from distmtl.distributed.process import quieten

        quieten()
        from distmtl import loop  # noqa: F401

    def train(self, config: dict[str, Any]) -> dict[str, Any]:
        (place(config["run"]["dir"]) / "result.json").unlink(missing_ok=True)  # of a config that was another
        return work({"config": config, "resume": "auto", "policy": "strict"})


def _conditions(board: LeaderboardConfig, results: dict[tuple[Key, int], dict[str, Any]]) -> list[str]:
    """How the results were made: what all of them have in common, and what they have not."""
    made = list(results.values())
    commits = sorted({str(r["git"]) for r in made} or {str(git_commit())})
    packages = sorted({", ".join(f"{k} {v}" for k, v in of.items()) for of in [r["versions"] for r in made] or [versions()]})
    return [
        f"command: {shlex.join(['distmtl', *sys.argv[1:]])}",
        f"seeds: {', '.join(map(str, board.seeds))}; {' and '.join(board.overrides) or 'no'} overrides",
        f"commit: {' and '.join(commits)}" + ("; the runs were made by several" if len(commits) > 1 else ""),
        f"versions: {' | '.join(packages)}",
        f"machine: {os.cpu_count()} CPUs ({platform.machine()}); device {', '.join(sorted({r['device'] for r in made}) or ['–'])}; "
        "samples/s are of one run while others run beside it",
    ]


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
