"""A search: one config, what of it may vary and how, how many trials, and when a trial is given up (docs/tune.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from distmtl.config.base import Name, Strict, did_you_mean
from distmtl.config.whole import Config

DOMAINS = ("choice", "uniform", "loguniform", "int")
OF_A_TASK = ("tower", "weight", "focal", "pos_weight")
TUNED = ("features", "tables", "interaction", "model", "weighting", "optimizer")  # sections that may vary as they like
HOW_IT_IS_RUN = "it says how a trial is run, not what it learns; leave it to the config"
WHAT_COMPARES = "trials are compared by it, so it must be the same for all; set it in the config or in overrides"
REFUSED = {
    "name": HOW_IT_IS_RUN,
    "cluster": HOW_IT_IS_RUN,
    "sharding": HOW_IT_IS_RUN,
    "run": "the best of several seeds is luck; trials share the config's run.seed",
    "data": WHAT_COMPARES,
    "evaluation": WHAT_COMPARES,
    "tasks": f"{WHAT_COMPARES}; of a task only {', '.join(OF_A_TASK)} are tuned (tasks.NAME.tower)",
    "train": f"{WHAT_COMPARES}; of train only global_batch_size is tuned",
}


class AshaConfig(Strict):
    """Li et al. 2020, ASHA: after grace, grace·reduction, grace·reduction², … evaluations a trial is stopped that is not among the best
    1/reduction of those that came as far before it."""

    kind: Literal["asha"] = "asha"
    reduction: Annotated[float, Field(gt=1.0)] = Field(3.0, description="One in so many trials goes on at every rung.")
    grace: PositiveInt = Field(1, description="Evaluations that every trial is given.")


class TuningConfig(Strict):
    """Everything that a search depends on, beside the config it starts from."""

    name: Name = Field(description="Name of the search, and of its folder tunes/<name>; default: the file's.")
    config: str = Field(description="The config (YAML) that is tuned: trial 0 is this very one, the others differ from it by the space.")
    out: str | None = Field(None, description="Folder of the trials and of what was found; default tunes/<name>.")
    space: dict[str, Any] | None = Field(
        None,
        min_length=1,
        description="section.key, or a section → {choice: […]}, {uniform: [a, b]}, {loguniform: [a, b]} or {int: [a, b]}, or a section "
        "with such values inside; default: heads, their widths, learning rates and weightings.",
    )
    trials: PositiveInt = Field(20, description="Configs that are tried, the one it starts from included.")
    parallel: PositiveInt | None = Field(None, description="Trials at a time; default: as many as there are CPUs (or GPUs) for.")
    metric: str | None = Field(
        None, description="What is best on the validation split: LOSS, METRIC or TASK.METRIC (train.monitor, which is the default)."
    )
    scheduler: AshaConfig | None = Field(AshaConfig(), description="null: every trial is trained to its end.")
    seed: NonNegativeInt = Field(0, lt=2**31, description="Of the points that are tried; the trials' own is the config's run.seed.")
    overrides: tuple[str, ...] = Field((), description="section.key=value of the config, before anything varies.")

    @property
    def folder(self) -> str:
        return self.out or f"tunes/{self.name}"

    @model_validator(mode="after")
    def _sound(self):
        mistakes = [mistake for key, value in (self.space or {}).items() for mistake in _mistakes(key, value)]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def domain(value: Any) -> tuple[str, Any] | None:
    """Kind and options of {choice: […]} and the like; None for any other value."""
    if isinstance(value, dict) and len(value) == 1 and (kind := next(iter(value))) in DOMAINS:
        return kind, value[kind]
    return None


def domains(value: Any, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Place, kind and options of every domain in a value, in order; those inside the options of a choice too."""
    if found := domain(value):
        yield key, *found
        value = found[1] if found[0] == "choice" and isinstance(found[1], list) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in items:
        yield from domains(inner, f"{key}.{part}" if key else str(part))


def _mistakes(key: str, value: Any) -> list[str]:
    section, *rest = key.split(".")
    free = section in TUNED or key == "train.global_batch_size" or (section == "tasks" and len(rest) > 1 and rest[1] in OF_A_TASK)
    if section not in Config.model_fields:
        return [f"space.{key}: unknown section {section!r}{did_you_mean(section, Config.model_fields)}"]
    if not free:
        return [f"space.{key} cannot be tuned: {REFUSED[section]}"]
    found = list(domains(value, f"space.{key}"))
    if not found:
        near = did_you_mean(next(iter(value)), DOMAINS) if isinstance(value, dict) and value else ""
        return [f"space.{key}: nothing varies in {value!r:.80}; write {{choice: […]}}, {{uniform: [a, b]}}, {{loguniform: [a, b]}} or "
                f"{{int: [a, b]}}, or put it into overrides{near}"]  # fmt: skip
    return [f"{place}.{kind}: {why}" for place, kind, options in found if (why := _wrong(kind, options))]


def _wrong(kind: str, options: Any) -> str:
    if kind == "choice":
        return "" if isinstance(options, list) and options else f"must be a list of one value or more, got {options!r:.80}"
    numbers = isinstance(options, list) and len(options) == 2 and all(_is_number(x, whole=kind == "int") for x in options)
    if not numbers or options[0] >= options[1]:
        return f"must be [low, high] with low < high, {'whole ' if kind == 'int' else ''}numbers, got {options!r:.80}"
    return f"low must be above 0, got {options[0]}" if kind == "loguniform" and options[0] <= 0 else ""


def _is_number(x: Any, whole: bool) -> bool:
    return isinstance(x, int if whole else int | float) and not isinstance(x, bool) and math.isfinite(x)
