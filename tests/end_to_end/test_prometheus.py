"""What Prometheus scrapes of a training on Ray is what its metrics.jsonl has, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from pathlib import Path

import pytest
import ray
import tiny
from prometheus_client.parser import text_string_to_metric_families

from distmtl.cluster.metrics import LABELS, ROWS, TrainingMetrics
from distmtl.cluster.trainer import train_on_ray
from distmtl.serving.counters import Counters

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana" / "dashboard.json"
RECORD = {
    "start": {"workers": "world_size", "restarts": "restarts"},
    "train": {
        **{key: key for key in ("step", "epoch", "loss", "samples_per_second", "data_wait", "replaced_ids")},
        "steps": "of",
        "learning_rate": "lr",
        "memory_mib": "memory_mb",
        "eta_seconds": "eta_s",
    },
}
CHECKPOINT = {"step": "step", "seconds": "seconds", "stall_seconds": "stall", "mib": "mb"}


@pytest.fixture
def session():
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    yield f"http://{(node := ray.nodes()[0])['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def scraped(address: str) -> dict[tuple, float]:
    """Name and labels → value, of our metrics."""
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name.startswith("ray_distmtl_")]
    keys = ("run", "task", "split", "metric")
    return {(s.name.removeprefix("ray_"), *(s.labels[k] for k in keys if k in s.labels)): s.value for s in samples}


def states(run: Path) -> list[dict[tuple, float]]:
    """The same, after every record of the log."""
    now, out, name = {}, [], str(run)
    for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for metric, key in RECORD.get(r["kind"], {}).items():
            now[f"distmtl_train_{metric}", name] = r[key]
        if r["kind"] == "train":
            now["distmtl_train_rows_total", name] = r["rows"]
            now |= {("distmtl_train_task_loss", name, task): v for task, v in r["losses"].items()}
            for part in ("lambda", "calibration", "gradient_norm", "gate_entropy"):
                now |= {(f"distmtl_train_task_{part}", name, task): v for task, v in r["health"][part].items()}
        if r["kind"] == "evaluation":
            now["distmtl_evaluation_loss", name, r["split"]] = r["loss"]
            now |= {("distmtl_evaluation", name, t, r["split"], m): v for t, of in r["metrics"].items() for m, v in of.items()}
        if r["kind"] == "checkpoint":
            now |= {(f"distmtl_checkpoint_{k}", name): r[v] for k, v in CHECKPOINT.items()}
        out.append({k: v for k, v in now.items() if v is not None})
    return out


def test_partitions_share_the_label_of_their_run():
    for run_dir, run in (("/runs/a/partitions/000003-day=3", "/runs/a"), ("/data/partitions/a", "/data/partitions/a")):
        assert TrainingMetrics(run_dir).run == run


@pytest.mark.slow
def test_prometheus_is_told_what_the_log_has(session, tiny_data, tmp_path):
    """Name, labels and value of every figure, between any two records, also long after a figure was last told."""
    run, seen, done = tmp_path / "run", [], threading.Event()

    def scrape() -> None:
        while not done.wait(0.25):
            seen.append(scraped(session))

    train = {"global_batch_size": 128, "epochs": 30, "eval_every": 240, "log_every": 60}
    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        train_on_ray(tiny.config(tiny_data, run, train=train), report=lambda record: None)
    finally:
        done.set()
        thread.join()
    known = states(run)
    told = [s for s in seen if s]
    equal = [s for s in told if s in known]
    assert len(equal) > 0.7 * len(told), "one that is taken between two figures of a record may differ"
    assert max(map(len, equal)) == len(known[-1]) > 50 and len({s.get(("distmtl_train_step", str(run))) for s in equal}) >= 3
    assert {key[0] for key in known[-1]} == {f"{ROWS}_total" if n == ROWS else n for n in LABELS}


def labels_of_serving() -> dict[str, tuple[str, ...]]:
    out = {}
    for collector in Counters().registry._collector_to_names:
        (family,) = collector.describe() or collector.collect()
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        extra = ("le",) if family.type == "histogram" else ()
        out |= {family.name + suffix: (*collector._labelnames, *extra) for suffix in suffixes}
    return out


def test_the_dashboard_asks_for_what_is_exported():
    dashboard = json.loads(DASHBOARD.read_text())
    training = {f"ray_{name}_total" if name == ROWS else f"ray_{name}": labels for name, labels in LABELS.items()}
    exported = training | labels_of_serving()
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    expressions = [t["expr"] for p in panels for t in p["targets"]] + [v["query"] for v in dashboard["templating"]["list"] if "query" in v]
    asked = set()
    for expression in (e for e in expressions if "distmtl" in e):
        names = set(re.findall(r"\w*distmtl_\w+", expression))
        assert names and names <= exported.keys(), expression
        allowed = {label for name in names for label in exported[name]} | {"instance", "job"}
        used = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
        used += [label.strip() for group in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression) for label in group.split(",")]
        assert set(used) <= allowed, f"{expression}: {set(used) - allowed}"
        asked |= names
    assert {"ray_distmtl_train_loss", "ray_distmtl_train_task_loss", "ray_distmtl_evaluation", "distmtl_requests_total"} <= asked
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(ids) == len(set(ids)) and all(p["title"] and p["targets"] for p in panels)
