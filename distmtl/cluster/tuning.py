"""run_tuning(): a search's trials under Ray Tune, each the loop itself in a run directory of its own; what has ended is not run again.

Ray Tune starts trials, several at a time, and its ASHA stops them. What it could restore of its own state is not used: the scheduler's
is not part of it (TuneController leaves it out), and a trial's truth is its run directory. A search that goes on gives a new ASHA all
evaluations of the runs' logs, in the order in which they were made, and Ray Tune the trials that have not ended.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from distmtl.cluster.places import places_for_one, worker_resources
from distmtl.cluster.supervision import last_line
from distmtl.cluster.trainer import refuse_fleeting, session, storage, use_gpu
from distmtl.config import Workers
from distmtl.config.tuning import AshaConfig, TuningConfig
from distmtl.config_file import in_a_line, parse_config
from distmtl.errors import DistmtlError
from distmtl.metrics import higher_is_better
from distmtl.progress import duration
from distmtl.run_directory import continuation, finished, read_json
from distmtl.stopping import GivenUp
from distmtl.storage import place, remove_tree
from distmtl.tuning import Base, Search, Trial, describe, former, make_base, make_trials, read_evaluations
from distmtl.versions import git_commit, versions

Say = Callable[[str], None]
ATTEMPTS = 2  # of a trial whose process dies
LONG = 10**6  # evaluations; more than any trial has
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every run has its own log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command's
    "RAY_AIR_NEW_OUTPUT": "0",  # its new one prints tables at any verbosity
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_tuning(tuning: TuningConfig, say: Say = print) -> Search:
    """Train what has not ended, on the cluster that RAY_ADDRESS or `ray start` offers, else on a local one. Writes tune.json, tune.md
    and best.yaml after every trial, and returns what they show. The best trial alone is measured on the test split, when all have ended.

    A trial that fails is noted with its reason, and the others go on. A space or data that do not fit are found before anything is started.

    Raises:
        DistmtlError: the space holds points that are no configs, `out` is another search's, or the cluster has no place for a trial.
    """
    refuse_fleeting(tuning.folder, "out")
    found = former(tuning)
    base = make_base(tuning)
    trials = make_trials(base)
    _look(base, trials, found)
    scheduler = Asha(tuning.scheduler, trials) if tuning.scheduler else FIFOScheduler()
    folder, tests = place(tuning.folder), {int(n): metrics for n, metrics in found.get("tests", {}).items()}

    def search() -> Search:
        return Search(base, trials, tests, _conditions(base))

    search().write(folder)
    waiting = [t for t in trials if t.state == "waiting"]
    for line in _introduction(tuning, trials, waiting):
        say(line)
    untested = base.whole.data.test
    if waiting or (untested and (best := search().best) and best.number not in tests):
        cluster = max((t.config.cluster for t in waiting or trials), key=lambda c: c.cpus_per_worker)
        with session(cluster.model_copy(update={"workers": Workers(min=1, max=tuning.parallel or 1)})):
            resources = worker_resources(cluster, use_gpu(cluster))
            slots = min(places_for_one(resources), tuning.parallel or len(trials), max(len(waiting), 1))
            if waiting:
                say(f"training {slots} at a time, {' and '.join(f'{n} {k}' for k, n in resources.items())} each")
                _train(waiting, resources, slots, scheduler, folder, Watch(search, slots, say))
            if untested and (best := search().best) and best.number not in tests:
                tests[best.number] = _test(best, untested, resources)
    search().write(folder)
    return search()


def _look(base: Base, trials: Sequence[Trial], found: dict[str, Any]) -> None:
    """Check the data against every trial's config, and take from the runs and from tune.json how far the trials came.

    Raises:
        DistmtlError: data or a run that do not fit.
    """
    from distmtl.data.splits import open_splits
    from distmtl.model.head import try_plugin

    splits = open_splits(base.whole)
    digests = {split: data.digest for split, data in splits.items() if split != "test"}
    seen, states = [trials[0].config.features], {t["trial"]: t["state"] for t in found.get("trials", [])}
    for trial in trials:
        config = trial.config
        if config.features not in seen:
            open_splits(config)
            seen.append(config.features)
        try_plugin(config)
        trial.look(finished(config, digests))
        continuation(config, "auto", splits["train"])
        if trial.state == "waiting" and states.get(trial.number) == "stopped":  # those that failed are tried again
            trial.state = "stopped"


def _introduction(tuning: TuningConfig, trials: Sequence[Trial], waiting: Sequence[Trial]) -> list[str]:
    has = {state: sum(t.state == state for t in trials) for state in ("finished", "stopped")}
    begun = sum(bool(t.evaluations) for t in waiting)
    lines = [
        f"{tuning.name}: {len(trials)} trials in {place(tuning.folder)}: {has['finished']} are finished, {has['stopped']} were stopped, "
        f"{len(waiting)} to train" + (f", {begun} of them from a checkpoint" if begun else "")
    ]
    if len(trials) < tuning.trials:
        lines.append(f"the space has no more than {len(trials)} points, the config as it is included")
    train = trials[0].config.train
    if tuning.scheduler and train.eval_every is None and train.epochs <= tuning.scheduler.grace:
        lines.append(
            "no trial can be stopped early: its evaluations, one an epoch, are not more than scheduler.grace; set train.eval_every"
        )
    return lines


def _train(waiting: Sequence[Trial], resources: dict[str, int], slots: int, scheduler: FIFOScheduler, folder: Path, watch: Watch) -> None:
    """Under Ray Tune, in order, those that have begun first.

    Raises:
        DistmtlError: Ray Tune, or the cluster, ended.
    """
    order = sorted(waiting, key=lambda t: (not t.evaluations, t.number))
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    scratch = folder / "ray"  # Ray Tune's own little state
    if scratch.exists():
        remove_tree(scratch)
    space = {"trial": tune.grid_search([{"number": t.number, "config": t.config.model_dump(mode="json")} for t in order])}
    try:
        tune.Tuner(
            tune.with_resources(train_trial, {k.lower(): n for k, n in resources.items()}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="best",
                mode="max" if watch.up else "min",
                scheduler=scheduler,
                max_concurrent_trials=slots,
                reuse_actors=True,  # imports are paid once
                trial_dirname_creator=lambda t: f"{t.config['trial']['number']:03d}",
            ),
            run_config=tune.RunConfig(
                name="tune", **storage(scratch), verbose=0, callbacks=[watch], failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1)
            ),
        ).fit()
    except (TuneError, RayError) as e:
        raise DistmtlError(f"Ray Tune ended before the search did: {last_line(e)}; the same command continues it") from e
    finally:
        remove_tree(scratch)


def train_trial(settings: dict[str, Any]) -> dict[str, Any]:
    """What a trial's process runs: the loop, and of every evaluation but the last a word to Ray Tune, which may end the trial there.

    An error that a retry cannot mend is returned, not raised: Ray Tune would try again.
    """
    from distmtl.distributed.process import quieten

    quieten()
    from distmtl.loop import train

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"  # a trial that is stopped completes its last checkpoint
    config = parse_config(settings["trial"]["config"])
    folder, monitor = place(config.run_dir), config.train.monitor
    (folder / "result.json").unlink(missing_ok=True)  # of a config that was another

    def told() -> dict[str, Any]:
        evaluations, _ = read_evaluations(folder, monitor)
        return {"evaluations": len(evaluations), "best": evaluations[-1].best if evaluations else float("nan")}

    def report(record: dict[str, Any]) -> None:
        if "monitored" in record and record["step"] < record["of"]:
            try:
                tune.report(told())
            except SystemExit as e:  # Ray Tune ends this thread; the loop is to complete the checkpoint on its way first
                raise GivenUp("given up by the search: others were better by then") from e

    try:
        train(config, report=report, checked=True)
    except GivenUp:
        raise SystemExit(0) from None
    except DistmtlError as e:
        return told() | {"error": str(e)}
    return told()


class Asha(ASHAScheduler):
    """Ray Tune's, which begins with what was evaluated before, and knows trials by their number: Ray Tune's ids change with a restart.

    Args:
        trials: those that it would have stopped by what their logs hold, and that have not ended, are taken for stopped.
    """

    def __init__(self, settings: AshaConfig, trials: Sequence[Trial]):
        super().__init__(time_attr="evaluations", max_t=LONG, grace_period=settings.grace, reduction_factor=settings.reduction)
        up = higher_is_better(trials[0].config.train.monitor)
        self.set_search_properties("best", "max" if up else "min")
        past = sorted(((e, i + 1, t) for t in trials for i, e in enumerate(t.evaluations)), key=lambda x: x[0].time)
        for trial in trials:
            super().on_trial_add(None, _known(trial.number))
        for evaluation, i, trial in past:
            if evaluation.step < evaluation.of:
                decision = super().on_trial_result(None, _known(trial.number), {"evaluations": i, "best": evaluation.best})
                if decision == self.STOP and trial.state == "waiting":
                    trial.state = "stopped"

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return super().set_search_properties(metric, mode, **spec) if self._metric is None else True

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """All are known from the beginning."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(controller, _known(_number(trial)), result))

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its last evaluation decides nothing any more."""

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        pass


def _known(number: int) -> Any:
    return SimpleNamespace(trial_id=str(number))


def _number(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


class Watch(tune.Callback):
    """Notes how trials end, says so, and has the tables written."""

    def __init__(self, search: Callable[[], Search], slots: int, say: Say):
        self.search, self.slots, self.say = search, slots, say
        self.up = higher_is_better(search().monitor)
        self.spent: list[float] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(_number(trial), trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        self._note(_number(trial), f"its process died {ATTEMPTS} times: {last_line(error)}")

    def _note(self, number: int, error: str | None) -> None:
        search = self.search()
        trial = search.trials[number]
        before = trial.seconds
        result = read_json(place(trial.config.run_dir) / "result.json")
        trial.look(None if error or (result and result["stopped"]) else result)
        if error:
            trial.state, trial.why = "failed", in_a_line(DistmtlError(error))
        elif trial.state == "waiting":
            trial.state = "stopped"
        self.spent.append(trial.seconds - before)
        left = sum(t.state == "waiting" for t in search.trials)
        eta = duration(sum(self.spent) / len(self.spent) * left / self.slots)
        value = "" if trial.value is None else f", validation {search.monitor} {trial.value:.5f}"
        best = f" (best: {search.best.value:.5f} of trial {search.best.number})" if search.best and search.best is not trial else ""
        done = len(search.trials) - left
        self.say(f"[{done}/{len(search.trials)}] trial {number}: {trial.ended}{value}{best}  ({trial.seconds:.0f} s, ETA {eta})")
        self.say(f"    {describe(trial.point)}")
        search.write(place(search.tuning.folder))


def _test(best: Trial, data: str, resources: dict[str, int]) -> dict[str, Any]:
    """Metrics of the best trial's best checkpoint on the test split.

    Raises:
        DistmtlError: it cannot be measured.
    """
    measure = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_evaluate)
    try:
        return dict(ray.get(measure.remote(best.config.run_dir, data)))
    except RayError as e:
        raise DistmtlError(f"trial {best.number} cannot be measured on the test split: {last_line(e)}; the same command tries again") from e


def _evaluate(run: str, data: str) -> dict[str, Any]:
    from distmtl.distributed.process import quieten

    quieten()
    from distmtl.evaluation import evaluate

    return evaluate(run, data)["data"]


def _conditions(base: Base) -> list[str]:
    """How it was made."""
    return [
        f"command: {shlex.join(['distmtl', *sys.argv[1:]])}",
        f"config: {'/'.join(Path(base.tuning.config).parts[-2:])}; {' and '.join(base.tuning.overrides) or 'no'} overrides",
        f"seeds: {base.tuning.seed} of the points, {base.whole.run.seed} of every trial",
        f"commit: {git_commit()}",
        f"versions: {', '.join(f'{k} {v}' for k, v in versions().items())}",
        f"machine: {os.cpu_count()} CPUs ({platform.machine()})",
    ]
