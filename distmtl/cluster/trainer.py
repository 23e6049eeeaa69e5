"""train_on_ray(): the loop on Ray Train workers, restarted from the newest complete checkpoint when one of them dies."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. Its defaults leave a death unnoticed for seconds and a stuck shutdown for half a minute.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from distmtl.config import Config, parse_config
from distmtl.errors import DistmtlError
from distmtl.progress import Report, print_record

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def train_on_ray(config: Config, resume: str = "auto", report: Report = print_record) -> dict[str, Any]:
    """Train on `cluster.workers` Ray Train workers: of the cluster that RAY_ADDRESS or `ray start` offers, else of a local one.

    Config and data are checked here, before anything is started. Returns result.json's object.

    Raises:
        DistmtlError: what a retry cannot mend, or more failures than cluster.max_failures.
    """
    from distmtl.loop import open_splits
    from distmtl.run_directory import open_run

    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(Path(config.run_dir).resolve())})})
    open_run(config, resume, open_splits(config)["train"])
    report({"kind": "note", "text": f"data and config are sound; starting {config.cluster.workers} Ray Train worker(s) …"})
    with session(config):
        trainer = TorchTrainer(
            work,
            train_loop_config={"config": config.model_dump(mode="json"), "resume": "auto" if resume == "never" else resume},
            torch_config=TorchConfig(timeout_s=config.cluster.collective_timeout_s),
            scaling_config=scaling(config),
            run_config=RunConfig(
                name="train",
                storage_path=str(Path(config.run_dir) / "ray"),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        with following(Path(config.run_dir) / "metrics.jsonl", report):
            try:
                outcome = trainer.fit().return_value
            except TrainingFailedError as e:
                raise DistmtlError(_reason(e, config)) from e
    if "error" in outcome:
        raise DistmtlError(outcome["error"])
    return outcome["result"]


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. An error that a retry cannot mend is returned, not raised: Ray would try again."""
    from distmtl.distributed.process import quieten

    quieten()
    from distmtl.loop import train

    try:
        return {"result": train(parse_config(settings["config"]), settings["resume"], report=lambda record: None)}
    except DistmtlError as e:
        return {"error": str(e)}


@contextmanager
def session(config: Config) -> Iterator[None]:
    """Ray, connected; a local instance is stopped afterwards."""
    own = not ray.is_initialized()
    if own:
        environment = {"env_vars": QUIET}
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "runtime_env": environment}
        try:
            ray.init(**quiet, address=os.environ.get("RAY_ADDRESS") or "auto")
        except ConnectionError:
            cpus = max(os.cpu_count() or 1, config.cluster.workers * config.cluster.cpus_per_worker)
            ray.init(**quiet, address="local", num_cpus=cpus)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def scaling(config: Config) -> ScalingConfig:
    cluster, there = config.cluster, ray.cluster_resources()
    gpus = there.get("GPU", 0)
    use_gpu = cluster.device == "cuda" or (cluster.device == "auto" and gpus >= cluster.workers)
    wanted = {"CPU": cluster.workers * cluster.cpus_per_worker} | ({"GPU": cluster.workers} if use_gpu else {})
    lacking = [f"{int(there.get(k, 0))} {k}s, but {cluster.workers} workers want {n}" for k, n in wanted.items() if there.get(k, 0) < n]
    if lacking:
        raise DistmtlError(f"the Ray cluster has {' and '.join(lacking)}; lower cluster.workers or cpus_per_worker, or add nodes")
    return ScalingConfig(
        num_workers=cluster.workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(use_gpu)}
    )


@contextmanager
def following(log: Path, report: Report) -> Iterator[None]:
    """Pass on the records that rank 0 appends to the log, wherever it runs."""
    position = log.stat().st_size if log.exists() else 0
    done = threading.Event()

    def follow() -> None:
        nonlocal position
        while True:
            last = done.wait(0.2)
            if log.exists():
                with log.open("rb") as lines:
                    lines.seek(position)
                    for line in lines:
                        if not line.endswith(b"\n"):
                            break
                        position += len(line)
                        report(json.loads(line))
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _reason(error: TrainingFailedError, config: Config) -> str:
    """The workers' own words, without the tracebacks."""
    failures = getattr(error, "worker_failures", {}) or {}
    words = [f"rank {rank}: {str(e).strip().splitlines()[-1]}" for rank, e in sorted(failures.items()) if str(e).strip()]
    text = "; ".join(words[:4]) or (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return (
        f"training failed after {config.cluster.max_failures} restart(s): {text}\n"
        f"the newest checkpoint stays in {config.run_dir}; the same command continues from it. "
        "Workers' logs: the newest session_*/logs/train under Ray's temporary folder; --debug shows the traceback"
    )
