"""A search's trials, one per point of its space, and what came out of them.

    base = make_base(load_tuning("configs/tuning/census.yaml"))
    trials = make_trials(base)                           # trial 0 is the config as it is; every config is validated
    …                                                    # train trial.config, note the outcome (cluster/tuning.py)
    search = Search(base, trials, tests, conditions)
    print(search.text()); search.write(folder)           # tune.md, tune.json, best.yaml

Points are those of a scrambled Sobol sequence (Owen 1998), which cover the space more evenly than independent ones do, the more so
for few trials (Bousquet et al. 2017); the first n of them do not depend on how many there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scipy.stats import qmc

from distmtl.config import Config
from distmtl.config.tuning import TuningConfig, domain, domains
from distmtl.config_file import dump_mapping, find, in_a_line, merge, parse_file, read_as, read_mapping, resolve
from distmtl.errors import DistmtlError
from distmtl.metrics import COLUMNS, better, higher_is_better
from distmtl.model.loss import Terms
from distmtl.run_directory import write_json
from distmtl.storage import absolute, place, write_whole
from distmtl.tabulate import aligned, piped
from distmtl.tracking.log import LOG, read_log

DIGITS = 3  # of a drawn number
HEADS = ("single_task", "shared_bottom", "omoe", "mmoe", "cgc", "ple", "dbmtl", "stem", "home")  # that any other of them may replace
OF_THE_SEARCH = ("config", "space", "metric", "scheduler", "seed", "overrides")  # what a search cannot change and go on

Point = dict[str, Any]  # key of the space → the value laid over the config there


def load_tuning(path: str | Path, overrides: Sequence[str] = ()) -> TuningConfig:
    """Read a search's YAML. The path `config` is relative to it, `out` to the working directory.

    Raises:
        DistmtlError: file missing or not YAML, or the list of every mistake in it.
    """
    tuning = read_as(TuningConfig, path, overrides)
    return tuning.model_copy(update={"config": resolve(tuning.config, Path(path).parent)})


def make_base(tuning: TuningConfig) -> Base:
    """Read the config.

    Raises:
        DistmtlError: it cannot be read, or has no validation split.
    """
    raw = read_mapping(tuning.config, [*tuning.overrides, *([f"train.monitor={tuning.metric}"] if tuning.metric else [])])
    whole = parse_file(raw, Path(tuning.config))
    if not whole.data.validation:
        raise DistmtlError(f"config {tuning.config}: data.validation is missing: trials are compared by it")
    return Base(tuning, raw, whole)


@dataclass(frozen=True)
class Base:
    """The config that is tuned: as its file has it, with the search's overrides, and whole."""

    tuning: TuningConfig
    raw: dict[str, Any]
    whole: Config

    @property
    def monitor(self) -> str:
        return self.whole.train.monitor

    @property
    def space(self) -> dict[str, Any]:
        return self.tuning.space or default_space(self.whole)

    def at(self, point: Point) -> dict[str, Any]:
        """The file's mapping with a point laid over it, whole sections before keys inside them."""
        raw, full = deepcopy(self.raw), self.whole.model_dump(mode="json")
        for key in sorted(point, key=lambda key: key.count(".")):
            section = key.partition(".")[0]
            if isinstance(full[section], dict):
                raw[section] = merge(full[section], raw.get(section) or {})  # a key inside wants the kinds around it said
            node, leaf = find(raw, key, f"space.{key}")
            there = node[leaf] if isinstance(node, list) else node.get(leaf)
            node[leaf] = merge(there, deepcopy(point[key]))
        return raw

    def config(self, point: Point) -> Config:
        return parse_file(self.at(point), Path(self.tuning.config))

    def trial(self, number: int, point: Point) -> Config:
        """Trained on one process, on its own; the test split is not for it to see."""
        config = self.config(point)
        train = config.train if "keep" in self.raw.get("train", {}) else config.train.model_copy(update={"keep": 1})
        cluster = config.cluster.model_copy(update={"workers": type(config.cluster.workers)(min=1, max=1)})
        run = config.run.model_copy(update={"dir": f"{absolute(self.tuning.folder)}/trials/{number:03d}"})
        data = config.data.model_copy(update={"test": None})
        name = f"{self.tuning.name}_{number:03d}"
        return config.model_copy(update={"name": name, "train": train, "cluster": cluster, "run": run, "data": data})

    def best(self, point: Point) -> dict[str, Any]:
        """The mapping of a config to train, wherever its file lies: the file's own with the point, its data by absolute paths."""
        data = self.config(point).data
        raw = self.at(point)
        raw["data"] |= {k: getattr(data, k) for k in ("train", "validation", "test") if getattr(data, k)}
        run = {k: v for k, v in raw.get("run", {}).items() if k != "dir"}
        raw = {k: v for k, v in raw.items() if k not in ("name", "run")} | ({"run": run} if run else {})
        return {"name": f"{self.tuning.name}_best", **raw}


# --------------------------------------------------------------------------------------------------------------- space


def default_space(config: Config) -> dict[str, Any]:
    """Heads and their widths, where the config's own is one that others may replace; learning rates; weightings."""
    wide = {"choice": [[64], [128], [128, 64], [256, 128]]}
    dropout = {"choice": [0.0, 0.1, 0.3, 0.5]}
    few = {"int": [1, 4]}
    dense, tables = config.optimizer.dense.lr, config.optimizer.tables.lr
    space: dict[str, Any] = {}
    if config.model.kind in HEADS and len(config.tasks) > 1:
        heads: list[dict[str, Any]] = [
            {"kind": "shared_bottom", "bottom": {"choice": [[128], [128, 64], [256, 128], [512, 256]]}, "dropout": dropout},
            {"kind": "mmoe", "num_experts": {"choice": [2, 4, 8]}, "expert": wide, "dropout": dropout},
            {"kind": "ple", "num_levels": {"int": [1, 2]}, "shared_experts": few, "task_experts": few, "expert": wide, "dropout": dropout},
            {"kind": "home", "experts": few, "expert": wide, "feature_rank": {"choice": [4, 8, 16]}},
        ]
        space["model"] = {"choice": heads}
    space["optimizer.dense.lr"] = {"loguniform": [dense / 4, dense * 4]}
    space["optimizer.tables.lr"] = {"loguniform": [tables / 4, tables * 4]}
    if sum(t.weight > 0 for t in config.tasks) > 1:
        space["weighting"] = {"choice": [{"kind": "static"}, {"kind": "uncertainty"}]}
    return space


def sample(space: Mapping[str, Any], seed: int, count: int) -> list[Point]:
    """The first `count` points that differ, or all there are of a small space. Each domain, also one inside a choice's options, is a
    dimension of its own."""
    tree = dict(space)
    dimensions = [place for place, _, _ in domains(tree)]
    sobol = qmc.Sobol(len(dimensions), scramble=True, seed=seed)
    points: dict[str, Point] = {}
    for u in sobol.random_base2(math.ceil(math.log2(count)) + 4) if count else ():
        point = _at(tree, dict(zip(dimensions, u.tolist(), strict=True)))
        points.setdefault(json.dumps(point), point)
    return list(points.values())[:count]


def _at(value: Any, u: Mapping[str, float], key: str = "") -> Any:
    """The value with every domain replaced by what lies at u ∈ [0, 1) of it."""

    def inside(part: Any, inner: Any) -> Any:
        return _at(inner, u, f"{key}.{part}" if key else str(part))

    if found := domain(value):
        kind, options = found
        if kind == "choice":
            i = int(u[key] * len(options))
            return inside(i, options[i])
        low, high = options
        if kind == "int":
            return low + int(u[key] * (high - low + 1))
        x = low + u[key] * (high - low) if kind == "uniform" else low * (high / low) ** u[key]
        return float(f"{x:.{DIGITS}g}")
    if isinstance(value, dict):
        return {k: inside(k, v) for k, v in value.items()}
    return [inside(i, v) for i, v in enumerate(value)] if isinstance(value, list) else value


def extremes(value: Any) -> Iterator[Any]:
    """Values that show every option of a choice and both ends of every range at least once, the others being at their first."""
    if found := domain(value):
        kind, options = found
        for option in options:
            yield from extremes(option) if kind == "choice" else (option,)
    elif isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        first = {k: next(extremes(value[k])) for k in keys}
        yield from (_like(value, whole) for whole in [first, *({**first, k: x} for k in keys for x in list(extremes(value[k]))[1:])])
    else:
        yield value


def _like(value: Any, items: dict[Any, Any]) -> Any:
    return items if isinstance(value, dict) else list(items.values())


# -------------------------------------------------------------------------------------------------------------- trials

State = Literal["waiting", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """A point, its config, and how far it came. Those that are waiting are trained."""

    number: int
    point: Point
    config: Config
    state: State = "waiting"
    why: str = ""  # it failed
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0  # of the trial, over all attempts

    @property
    def steps(self) -> int:
        return self.evaluations[-1].step if self.evaluations else 0

    @property
    def value(self) -> float | None:
        return self.evaluations[-1].best if self.evaluations else None

    def look(self, result: dict[str, Any] | None) -> None:
        """Take from the run's log how far it came, and from its result, if it has one, how it ended."""
        self.evaluations, self.seconds = read_evaluations(place(self.config.run_dir), self.config.train.monitor)
        if result:
            self.state = "finished"

    @property
    def ended(self) -> str:
        last = self.evaluations[-1] if self.evaluations else None
        match self.state:
            case "failed":
                return f"failed: {self.why}"
            case "stopped":
                return f"stopped by asha at step {last.step} of {last.of}" if last else "stopped by asha"
            case "finished":
                return f"early stopping at step {last.step} of {last.of}" if last and last.step < last.of else "finished"
        return f"at step {last.step} of {last.of}" if last else "not begun"


@dataclass(frozen=True)
class Evaluation:
    time: float
    step: int
    of: int
    best: float  # of the monitored metric, in all evaluations so far: a run is worth its best checkpoint


def read_evaluations(folder: Path, monitor: str) -> tuple[list[Evaluation], float]:
    """Evaluations of the validation split that a run's log holds, in order, and the seconds that the run was at work. A step that was
    evaluated again, after a restart, counts once."""
    evaluations: list[Evaluation] = []
    seconds, began, now = 0.0, 0.0, 0.0
    for record in read_log(folder / LOG):
        if record["kind"] == "start":
            seconds, began = seconds + now - began, record["time"]
        now = record["time"]
        if "monitored" in record and (not evaluations or record["step"] > evaluations[-1].step):
            best, value = evaluations[-1].best if evaluations else None, record["monitored"]
            evaluations.append(Evaluation(now, record["step"], record["of"], value if better(value, best, monitor) else best))  # type: ignore[arg-type]
    return evaluations, seconds + now - began


def make_trials(base: Base) -> list[Trial]:
    """Every trial with its config. All of the space is validated, also what no trial shows.

    Raises:
        DistmtlError: points of the space that are no configs, each with its mistake.
    """
    tuning, space = base.tuning, base.space
    points: list[Point] = [{}, *sample(space, tuning.seed, tuning.trials - 1)]
    mistakes: dict[str, Point] = {}
    for point in [*points, *extremes(space)]:
        try:
            base.config(point)
        except DistmtlError as e:
            mistakes.setdefault(in_a_line(e), point)
    if mistakes:
        lines = [f"  - {mistake}, with {describe(point)}" for mistake, point in mistakes.items()]
        raise DistmtlError("\n".join([f"tune {tuning.name}: not every point of the space is a config", *lines[:20]]))
    trials = [Trial(i, point, base.trial(i, point)) for i, point in enumerate(points)]
    if base.whole.train.eval_every and len({t.config.train.global_batch_size for t in trials}) > 1:
        raise DistmtlError(
            f"tune {tuning.name}: with train.eval_every, in steps, trials of other batch sizes have seen other numbers of rows at the same "
            "evaluation; leave it out, or train.global_batch_size out of the space"
        )
    if base.monitor == "loss" and len({str(_terms(t.config)) for t in trials}) > 1:
        raise DistmtlError(
            f"tune {tuning.name}: the loss has not the same terms in all trials and cannot compare them; set metric, to auc for example"
        )
    return trials


def _terms(config: Config) -> list[Any]:
    terms = Terms(config)
    return [terms.names, terms.coefficients, *({k: getattr(t, k, None) for k in ("focal", "pos_weight")} for t in config.tasks)]


def former(tuning: TuningConfig) -> dict[str, Any]:
    """tune.json of the search that this one goes on with; {} where none has begun.

    Raises:
        DistmtlError: the folder is another search's, or holds something else.
    """
    folder = place(tuning.folder)
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    if not (folder / "tune.json").exists():
        raise DistmtlError(f"out {folder} is not empty and no tune (no tune.json); choose another out, or empty it")
    found: dict[str, Any] = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    now = tuning.model_dump(mode="json")
    if differing := [k for k in OF_THE_SEARCH if found["tuning"].get(k) != now[k]]:
        raise DistmtlError(f"out {folder} is of another tune ({', '.join(differing)}); delete it, or choose another out")
    return found


# --------------------------------------------------------------------------------------------------------------- table


class Search:
    """What the trials show, complete or not.

    Args:
        base: the config that is tuned.
        tests: trial → its metrics on the test split, of the trials that were the best of all at the end of a command.
        conditions: what else there is to say about how it was made, line by line.
    """

    def __init__(self, base: Base, trials: Sequence[Trial], tests: Mapping[int, dict[str, Any]], conditions: Sequence[str] = ()):
        self.base, self.trials, self.tests, self.conditions = base, trials, tests, list(conditions)
        self.tuning, self.monitor = base.tuning, base.monitor

    @property
    def ranked(self) -> list[Trial]:
        """The best first, those without a value last."""
        sign = -1 if higher_is_better(self.monitor) else 1
        return sorted(self.trials, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number))

    @property
    def best(self) -> Trial | None:
        """Of those that came to their end. A stopped one was behind another at that time, and values only rise."""
        return next((t for t in self.ranked if t.state == "finished"), None)

    def text(self) -> str:
        """For a terminal."""
        return "\n\n".join(["\n".join([self._table(aligned), self.verdict]), "\n".join(self.conditions)])

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.tuning.name}", self._table(piped), self.verdict, "\n".join(f"- {c}" for c in self.conditions)]) + "\n"

    def _table(self, layout: Any) -> str:
        keys = list(dict.fromkeys(k for t in self.trials for k in t.point))
        title = ["trial", *keys, f"validation {self.monitor}", "steps", "seconds", "ended"]
        lines = []
        for t in self.ranked:
            cells = [_show(t.point[k] if k in t.point else _at_key(t.config, k)) for k in keys]
            value = "–" if t.value is None else f"{t.value:.5f}"
            lines.append([f"{t.number}{'*' if t is self.best else ''}", *cells, value, f"{t.steps:,}", f"{t.seconds:,.0f}", t.ended])
        return str(layout(title, lines, left=(*range(1, len(keys) + 1), len(title) - 1)))

    @property
    def verdict(self) -> str:
        """The best, beside the config as it was."""
        if (best := self.best) is None:
            return "no trial came to its end"
        base, as_it_was = self.trials[0], "trial 0, the config as it was"
        if base.value is not None:
            as_it_was += f": {base.value:.5f}" + {"stopped": " when it was stopped", "waiting": " so far"}.get(base.state, "")
        lines = [f"best by validation {self.monitor}: trial {best.number}, {best.value:.5f} ({as_it_was})"]
        if best.point:
            lines.append(describe(best.point))
        if best.number in self.tests:
            lines.append(f"test, looked at after the choice: {headline(self.tests[best.number])}")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        return {
            "name": self.tuning.name,
            "tuning": self.tuning.model_dump(mode="json"),
            "metric": self.monitor,
            "best": self.best.number if self.best else None,
            "tests": {str(n): metrics for n, metrics in self.tests.items()},
            "trials": [
                {
                    "trial": t.number,
                    "point": t.point,
                    "state": t.state,
                    "ended": t.ended,
                    "validation": t.value,
                    "evaluations": len(t.evaluations),
                    "steps": t.steps,
                    "seconds": round(t.seconds, 1),
                }
                for t in self.trials
            ],
            "conditions": self.conditions,
        }

    def write(self, folder: Path) -> None:
        """tune.md, tune.json, and best.yaml where there is a best."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tune.json", self.json())
        write_whole(folder / "tune.md", self.markdown())
        if self.best:
            ended = sum(t.state == "finished" for t in self.trials)
            about = [f"Of tune {self.tuning.name}, {ended} of whose {len(self.trials)} trials were trained to their end."]
            comment = "".join(f"# {line}\n" for line in [*about, *self.verdict.splitlines(), *self.conditions, "  distmtl train best.yaml"])
            write_whole(folder / "best.yaml", f"{comment}\n{dump_mapping(self.base.best(self.best.point))}")


def headline(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Task → metrics, the first of each that is known."""
    shown = {task: next(((m, of[m]) for m in COLUMNS if of.get(m) is not None), None) for task, of in metrics.items()}
    return ", ".join(f"{task} {COLUMNS[found[0]][0]} {found[1]:{COLUMNS[found[0]][1]}}" for task, found in shown.items() if found)


def describe(point: Point) -> str:
    """A point in a line."""
    return "  ".join(f"{key}={_show(value)}" for key, value in point.items()) or "the config as it is"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        kind, rest = value.get("kind", ""), {k: v for k, v in value.items() if k != "kind"}
        inner = " ".join(f"{k}={_show(v)}" for k, v in rest.items())
        return f"{kind}({inner})" if inner else str(kind)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_show, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at_key(config: Config, key: str) -> Any:
    """What a config has at a key of the space; – where its kind has none."""
    try:
        node, leaf = find(config.model_dump(mode="json"), key, key)
        return node[leaf]
    except (DistmtlError, KeyError):
        return "–"
