"""What a training says, as metrics for Prometheus: Ray exports them on the metrics port of rank 0's node (docs/tracking.md)."""

from __future__ import annotations

import threading

from ray.util.metrics import Counter, Gauge

from distmtl.run_directory import IN_CHAIN, PARTITIONS
from distmtl.tracking.records import Record

OF_RUN = {  # kind of record → its key → metric of the run
    "start": {"world_size": "distmtl_train_workers", "restarts": "distmtl_train_restarts"},
    "train": {
        "step": "distmtl_train_step",
        "of": "distmtl_train_steps",
        "epoch": "distmtl_train_epoch",
        "loss": "distmtl_train_loss",
        "samples_per_second": "distmtl_train_samples_per_second",
        "data_wait": "distmtl_train_data_wait",
        "lr": "distmtl_train_learning_rate",
        "memory_mb": "distmtl_train_memory_mib",
        "replaced_ids": "distmtl_train_replaced_ids",
        "eta_s": "distmtl_train_eta_seconds",
    },
    "checkpoint": {
        "step": "distmtl_checkpoint_step",
        "seconds": "distmtl_checkpoint_seconds",
        "stall": "distmtl_checkpoint_stall_seconds",
        "mb": "distmtl_checkpoint_mib",
    },
}
OF_TASK = {  # part of `health` → metric of a task
    "lambda": "distmtl_train_task_lambda",
    "calibration": "distmtl_train_task_calibration",
    "gradient_norm": "distmtl_train_task_gradient_norm",
    "gate_entropy": "distmtl_train_task_gate_entropy",
}
TASK_LOSS, EVALUATION_LOSS, EVALUATION = "distmtl_train_task_loss", "distmtl_evaluation_loss", "distmtl_evaluation"
ROWS = "distmtl_train_rows"  # a counter: its name ends with _total in Prometheus
LABELS = {
    **{name: ("run",) for names in OF_RUN.values() for name in names.values()},
    **dict.fromkeys([TASK_LOSS, *OF_TASK.values()], ("run", "task")),
    EVALUATION_LOSS: ("run", "split"),
    EVALUATION: ("run", "split", "task", "metric"),
    ROWS: ("run",),
}


REFRESH_S = 5.0  # Ray forgets a gauge that was not set for two of its export intervals, 20 seconds; log lines may be further apart


class TrainingMetrics:
    """Takes the records of rank 0; as a context it keeps their figures exported until the next ones. What is not known is left out.

    Args:
        run_dir: their label `run`; of a followed run's partitions that of the whole.
    """

    def __init__(self, run_dir: str):
        whole, _, partition = run_dir.rpartition(f"/{PARTITIONS}/")
        self.run = whole if IN_CHAIN.fullmatch(partition) else run_dir
        self.gauges = {name: Gauge(name, tag_keys=labels) for name, labels in LABELS.items() if name != ROWS}
        self.rows = Counter(ROWS, "Rows trained, those too that a failure undid", tag_keys=LABELS[ROWS])
        self.counted = 0
        self.values: dict[tuple[str, ...], float] = {}  # metric and its labels → what it was last set to
        self.lock = threading.Lock()  # else a figure could be set back to the one before
        self.done = threading.Event()

    def __enter__(self) -> TrainingMetrics:
        threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()

    def take(self, record: Record) -> None:
        with self.lock:
            self._take(record)

    def _take(self, record: Record) -> None:
        for key, name in OF_RUN.get(record["kind"], {}).items():
            self._set(record[key], name)
        match record["kind"]:
            case "start":
                self.counted = record["rows"]
            case "train":
                self.rows.inc(record["rows"] - self.counted, {"run": self.run})
                self.counted = record["rows"]
                for task, loss in record["losses"].items():
                    self._set(loss, TASK_LOSS, task)
                for part, name in OF_TASK.items():
                    for task, value in record["health"].get(part, {}).items():
                        self._set(value, name, task)
            case "evaluation":
                self._set(record["loss"], EVALUATION_LOSS, record["split"])
                for task, metrics in record["metrics"].items():
                    for metric, value in metrics.items():
                        self._set(value, EVALUATION, record["split"], task, metric)

    def _set(self, value: float | None, *metric: str) -> None:
        """Of a metric: its name and the labels beside `run`."""
        if value is None:
            self.values.pop(metric, None)
        else:
            self.values[metric] = value
            self._export(value, *metric)

    def _export(self, value: float, name: str, *labels: str) -> None:
        self.gauges[name].set(value, dict(zip(LABELS[name], (self.run, *labels), strict=True)))

    def _refresh(self) -> None:
        while not self.done.wait(REFRESH_S):
            with self.lock:
                for metric, value in self.values.items():
                    self._export(value, *metric)
