"""A run in Weights & Biases: its config is ours, its history the figures of records, its artifact config.yaml and result.json."""

from __future__ import annotations

import json
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from distmtl.config import Config, WandbConfig
from distmtl.config_file import dump_config
from distmtl.tracking.facts import parameters, tags
from distmtl.tracking.records import Record, scalars
from distmtl.tracking.tracker import CLOSE_S, Status


class WandbRun:
    """
    Args:
        folder: its own files go to a folder `wandb` in it.
    """

    name = "wandb"

    def __init__(self, settings: WandbConfig, config: Config, folder: Path):
        self.settings, self.config, self.folder = settings, config, folder
        self.where = f"{settings.entity}/{settings.project}" if settings.entity else settings.project
        self.id = uuid.uuid4().hex[:12]  # of a new run, however often it is tried
        self.run: Any = None

    def load(self) -> None:
        import wandb  # noqa: F401

    def open(self, run: str | None) -> str:
        import wandb

        self.run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            mode=self.settings.mode,
            dir=self.folder,
            id=run or self.id,
            resume="allow",
            name=PurePosixPath(self.config.run_dir).name,
            group=self.config.name,
            config={**parameters(self.config), **tags(self.config)},
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=CLOSE_S
            ),
        )
        self.run.define_metric("*", step_metric="step")  # its own count knows no way back, which a restart takes
        return self.run.id

    def send(self, records: list[Record], status: Status) -> None:
        for r in records:
            if figures := dict(scalars(r)):
                self.run.log({"step": r["step"], **figures})
            if r["kind"] == "end":
                self._keep(json.dumps(r["result"], indent=1) + "\n")

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=int(status == "failed"))

    def _keep(self, result: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self.run.id}", type="run")
        for name, text in (("config.yaml", dump_config(self.config)), ("result.json", result)):
            with artifact.new_file(name) as file:
                file.write(text)
        self.run.log_artifact(artifact)
