"""A run in MLflow: its parameters are the config, its metrics the figures of records, its artifacts config.yaml and result.json."""

from __future__ import annotations

import json
import os
import re
from pathlib import PurePosixPath
from typing import Any

from distmtl.config import Config, MLflowConfig
from distmtl.config_file import dump_config
from distmtl.tracking.facts import parameters, tags
from distmtl.tracking.records import Record, scalars
from distmtl.tracking.tracker import Status

METRICS, PARAMS, LONGEST = 1000, 100, 6000  # that MLflow takes in a request, and of a parameter
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # left alone, it asks a server that is gone for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # who writes file:// wants one
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflowRun:
    name = "mlflow"

    def __init__(self, settings: MLflowConfig, config: Config):
        self.uri, self.experiment, self.config = settings.uri, settings.experiment or config.name, config
        self.where = f"{self.uri}, experiment {self.experiment}"
        self.client: Any = None
        self.run = self.status = ""

    def load(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401

    def open(self, run: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(self.uri)
        if run is None:
            self.run = self.run or self._create()  # once, also where what follows has to be tried again
            params = [Param(key, value[:LONGEST]) for key, value in parameters(self.config).items()]
            for i in range(0, len(params), PARAMS):
                self.client.log_batch(self.run, params=params[i : i + PARAMS])
        else:
            self.run = run
        for key, value in tags(self.config).items():
            self.client.set_tag(self.run, key, value)
        self.client.log_text(self.run, dump_config(self.config), "config.yaml")
        return self.run

    def _create(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(self.experiment)
        return str(self.client.create_run(experiment, run_name=PurePosixPath(self.config.run_dir).name).info.run_id)

    def send(self, records: list[Record], status: Status) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", name), value, int(1000 * r["time"]), r["step"])
            for r in records
            for name, value in scalars(r)
        ]
        for i in range(0, len(metrics), METRICS):
            self.client.log_batch(self.run, metrics=metrics[i : i + METRICS])
        for r in records:
            if r["kind"] == "end":
                self.client.log_text(self.run, json.dumps(r["result"], indent=1) + "\n", "result.json")
        if status != self.status:
            self._set(status)

    def close(self, status: Status) -> None:
        if status != self.status:
            self._set(status)

    def _set(self, status: Status) -> None:
        if status == "running":
            self.client.update_run(self.run, status=STATUS[status])
        else:
            self.client.set_terminated(self.run, STATUS[status])
        self.status = status
