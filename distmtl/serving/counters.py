"""What a server counts, for Prometheus. With PROMETHEUS_MULTIPROC_DIR set, any process of a node tells of all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from distmtl.exporting.manifest import Manifest
from distmtl.serving.predictor import Scored

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        if FOLDER in os.environ:
            _forget_the_dead(Path(os.environ[FOLDER]))
        self.requests = Counter("distmtl_requests", "Requests by answer", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "distmtl_request_seconds", "From a request's body to its answer", ["version"], registry=self.registry, buckets=SECONDS
        )
        self.candidates = Counter("distmtl_candidates", "Candidates scored", ["version"], registry=self.registry)
        self.scores = self._gauge(
            "distmtl_score_sum", "Sum of a task's predictions; its mean: divided by distmtl_candidates", "sum", "task"
        )
        self.ids = Counter("distmtl_ids", "Ids looked up", ["version"], registry=self.registry)
        self.unknown = Counter(
            "distmtl_unknown_ids", "Ids outside their table, replaced by its policy", ["version"], registry=self.registry
        )
        self.reloads = Counter("distmtl_reloads", "Newer exports and deltas taken", ["version", "kind"], registry=self.registry)
        self.failures = Counter("distmtl_reload_failures", "Newer exports, deltas or fusions refused", ["what"], registry=self.registry)
        self.step = self._gauge("distmtl_model_step", "Training step of the model, of several processes the least", "livemin")
        self.sequence = self._gauge("distmtl_model_sequence", "Its number in the published folder, the least", "livemin")
        self.loaded = self._gauge("distmtl_model_loaded_timestamp_seconds", "When it was loaded, the earliest", "livemin")

    def _gauge(self, name: str, text: str, mode: str, *labels: str) -> Gauge:
        return Gauge(name, text, ["version", *labels], registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

    def scored(self, version: str, scored: Scored) -> None:
        """Of one request."""
        self.candidates.labels(version).inc(len(scored.ids))
        self.ids.labels(version).inc(int(scored.ids.sum()))
        self.unknown.labels(version).inc(int(scored.replaced.sum()))
        self._sums(version, scored.predictions)

    def _sums(self, version: str, predictions: Mapping[str, np.ndarray]) -> None:
        for task, p in predictions.items():
            if p.ndim == 1:  # classes have no mean
                self.scores.labels(version, task).inc(float(p.sum(dtype=np.float64)))

    def model(self, version: str, manifest: Manifest) -> None:
        self.step.labels(version).set(manifest.step)
        self.sequence.labels(version).set(manifest.sequence)
        self.loaded.labels(version).set_to_current_time()

    def text(self) -> bytes:
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        all_processes = CollectorRegistry()
        MultiProcessCollector(all_processes)
        return generate_latest(all_processes)


def _forget_the_dead(folder: Path) -> None:
    """Gauges of processes that were killed; what they counted stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if not Path("/proc", pid).exists():
            file.unlink(missing_ok=True)
