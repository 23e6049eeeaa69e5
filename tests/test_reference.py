"""docs/reference/ says everything that the code knows, and is what the code says today."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from distmtl import config
from distmtl.config import Config, Strict
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config.tuning import TuningConfig
from distmtl.serving.fusion import AnyFusion
from documentation import reference


def models(annotation: Any) -> Iterator[type[Strict]]:
    """Every model that a config may hold, found by its annotations."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(annotation):
        yield from models(part)


ALL = sorted({*models(Config), *models(LeaderboardConfig), *models(TuningConfig), *models(AnyFusion)}, key=lambda m: m.__name__)


def leaves(model: type[Strict]) -> Iterator[type[Strict]]:
    if not model.__subclasses__() and model.__module__.startswith("distmtl.config."):
        yield model
    for kind in model.__subclasses__():
        yield from leaves(kind)


def test_every_kind_of_config_is_known_here():
    for module in pkgutil.iter_modules(config.__path__, "distmtl.config."):
        importlib.import_module(module.name)
    assert {*leaves(Strict)} <= {*ALL}, "say it in documentation/reference.py, config_page"


def test_every_field_is_described():
    assert len(ALL) > 60
    missing = [f"{m.__name__}.{name}" for m in ALL for name, f in m.model_fields.items() if name != "kind" and not f.description]
    assert not missing, "give these a Field(description=…): users read it in docs/reference/config.md"
    assert not [m.__name__ for m in ALL if not m.__doc__]


def test_every_field_is_in_the_page():
    tables = [t.split("\n\n")[0] for t in reference.config_page().split("|---|---|---|---|\n")[1:]]
    described = [[row.split("`")[1] for row in table.splitlines()] for table in tables]
    for model in ALL:
        names = [name for name in model.model_fields if name != "kind"]
        assert names in described or not names, model.__name__


@pytest.mark.parametrize("name", ["config.md", "commands.md"])
def test_the_pages_are_of_today(name):
    assert (reference.FOLDER / name).read_text() == reference.pages()[name], "`make docs` writes docs/reference anew"
