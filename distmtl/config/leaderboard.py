"""A leaderboard: heads × weightings × seeds on one or several data sets, each a run of its own (docs/leaderboard.md)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from distmtl.config.base import Name, Strict, did_you_mean
from distmtl.config.weighting import StaticWeighting, WeightingConfig
from distmtl.config.whole import Config

OF_THE_BOARD = {"name", "data", "weighting", "run", "cluster"}  # sections that no head has a say in


class LeaderboardConfig(Strict):
    """Everything that a leaderboard depends on, beside the configs it starts from."""

    name: Name = Field(description="Name of the board; its folder, too.")
    out: str | None = Field(None, description="Folder of the runs and the table; default leaderboards/<name>.")
    data: dict[Name, str] = Field(min_length=1, description="Data set → the config (YAML) that its runs start from.")
    heads: dict[Name, dict[str, Any]] = Field(
        min_length=1, description="Head → sections merged into that config: `model`, and what else this head needs."
    )
    weightings: dict[Name, WeightingConfig] = Field({"static": StaticWeighting()}, min_length=1, description="Name → section `weighting`.")
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1, description="A list of run.seed, or how many: 0 … n-1.")
    select: str | None = Field(
        None,
        description="What is best on the validation split, of a run's checkpoints and of the board: LOSS, METRIC or TASK.METRIC "
        "(train.monitor, which is the default).",
    )
    metrics: dict[Name, str] = Field({}, description="Task → the test metric that its column shows; default: the first of its kind.")
    baseline: str | None = Field(None, description="HEAD/WEIGHTING that gains are over; default: the first of each.")
    overrides: tuple[str, ...] = Field((), description="section.key=value of every run.")
    parallel: PositiveInt | None = Field(None, description="Runs at a time; default: as many as there are CPUs (or GPUs) for.")

    @property
    def folder(self) -> str:
        return self.out or f"leaderboards/{self.name}"

    @property
    def base(self) -> tuple[str, str]:
        """Head and weighting of the baseline."""
        head, _, weighting = (self.baseline or f"{next(iter(self.heads))}/{next(iter(self.weightings))}").partition("/")
        return head, weighting

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _agree(self):
        mistakes = []
        for head, sections in self.heads.items():
            for section in sections:
                if section in OF_THE_BOARD:
                    mistakes.append(f"heads.{head}.{section}: {section} is not a head's; the leaderboard or the data's config gives it")
                elif section not in Config.model_fields:
                    known = Config.model_fields.keys() - OF_THE_BOARD
                    mistakes.append(f"heads.{head}.{section}: unknown section{did_you_mean(section, known)}")
        head, weighting = self.base
        for what, name, names in (("head", head, list(self.heads)), ("weighting", weighting, list(self.weightings))):
            if name not in names:
                mistakes.append(f"baseline {self.baseline!r}: no {what} {name!r}{did_you_mean(name, names)}; it is HEAD/WEIGHTING")
        if any(s < 0 for s in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            mistakes.append(f"seeds {list(self.seeds)}: they must differ, and be 0 or more")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
