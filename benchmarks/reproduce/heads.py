"""Heads on a prepared data set: the ready config, with another model or fewer tasks."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distmtl.config_file import load_config
from distmtl.data.prepare import prepare
from distmtl.loop import train


def prepared(name: str, source: Path | None, out: Path, **options: str) -> Path:
    """The data set's ready MMoE config; prepares the data where they are missing."""
    config = out / "mmoe.yaml"
    if not config.exists():
        if source is None:
            raise SystemExit(f"{out} has no prepared {name}: give its raw files with --source DIR")
        prepare(name, source, out, **options)
    return config


def train_and_test(config: str, seed: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Of the best checkpoint on the validation split: task → metric → value on the test split."""
    with TemporaryDirectory() as folder:
        overrides = [f"{name}={json.dumps(value)}" for name, value in sections.items()]
        run = load_config(config, [*overrides, f"run.seed={seed}", f"run.dir={folder}/run", "train.keep=1"])
        return train(run, report=lambda record: None)["metrics"]["test"]
