"""train_on_ray(): the loop on Ray Train workers, restarted from the newest complete checkpoint when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of every worker without a GPU

import pyarrow.fs
import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from distmtl.cluster.network import ProcessGroupConfig
from distmtl.cluster.timeouts import retry_wait_s, set_hang_timeout
from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.progress import Report, print_record
from distmtl.run_directory import ResumePolicy, open_run
from distmtl.storage import absolute, is_remote, place

R = TypeVar("R")

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def train_on_ray(config: Config, resume: str = "auto", report: Report = print_record, policy: ResumePolicy = "strict") -> dict[str, Any]:
    """Train on `cluster.workers` Ray Train workers: of the cluster that RAY_ADDRESS or `ray start` offers, else of a local one.

    Config and data are checked here, before anything is started. Returns result.json's object.

    Raises:
        DistmtlError: what a retry cannot mend, or more failures than cluster.max_failures.
    """
    from distmtl.loop import open_splits
    from distmtl.model.embeddings import FeatureVector
    from distmtl.model.multitask import Head

    _refuse_fleeting_directory(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": absolute(config.run_dir)})})
    open_run(config, resume, open_splits(config)["train"], policy)
    if config.model.kind == "plugin":  # the user's own code: better it fails here
        Head(config, FeatureVector(config).width)
    report({"kind": "note", "text": f"data and config are sound; starting {config.cluster.workers} Ray Train worker(s) …"})
    set_hang_timeout(config.cluster)
    with session(config), following(place(config.run_dir) / "metrics.jsonl", report):
        try:
            outcome = fit_with_retries(
                lambda failures_left: _trainer(config, resume, policy, failures_left).fit().return_value,
                config.cluster.max_failures,
                report,
            )
        except (TrainingFailedError, RayActorError) as e:
            raise DistmtlError(_reason(e, config)) from e
    if "error" in outcome:
        raise DistmtlError(outcome["error"])
    return outcome["result"]


def fit_with_retries(fit: Callable[[int], R], max_failures: int, report: Report) -> R:
    """fit(failures left), again where Ray's controller itself failed: Ray restarts workers, but gives up when its controller cannot
    make their process group (a node that dies meanwhile) or dies. Every such restart costs one of `max_failures`."""
    for attempt in range(max_failures):
        try:
            return off_main_thread(fit, max_failures - attempt)
        except (ControllerError, RayActorError) as e:
            wait = retry_wait_s(attempt)
            why = "it died" if isinstance(e, RayActorError) else _last_line(e)
            report({"kind": "note", "text": f"Ray's controller failed: {why}; starting it again in {wait:g} s"})
            time.sleep(wait)
    return off_main_thread(fit, 0)


def off_main_thread(function: Callable[..., R], *arguments: Any) -> R:
    """On the main thread Ray Train answers Ctrl-C by aborting without a checkpoint, and a wait inside Ray holds back our own handlers."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def _trainer(config: Config, resume: str, policy: ResumePolicy, max_failures: int) -> TorchTrainer:
    return TorchTrainer(
        work,
        train_loop_config={"config": config.model_dump(mode="json"), "resume": "auto" if resume == "never" else resume, "policy": policy},
        torch_config=ProcessGroupConfig(timeout_s=config.cluster.collective_timeout_s),
        scaling_config=scaling(config),
        run_config=RunConfig(
            name="train",
            **_storage(place(config.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _storage(folder: Path) -> dict[str, Any]:
    """Where Ray keeps its own little state; no weights are in it."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    handler = pyarrow.fs.FSSpecHandler(folder.fs)  # type: ignore[attr-defined]
    return {"storage_path": folder.path, "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}  # type: ignore[attr-defined]


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. An error that a retry cannot mend is returned, not raised: Ray would try again."""
    from distmtl.distributed.process import quieten

    quieten()
    from distmtl.loop import train

    try:
        result = train(
            parse_config(settings["config"]), settings["resume"], report=lambda record: None, checked=True, policy=settings["policy"]
        )
        return {"result": result}
    except DistmtlError as e:
        return {"error": str(e)}


@contextmanager
def session(config: Config) -> Iterator[None]:
    """Ray, connected; a local instance is stopped afterwards."""
    own = not ray.is_initialized()
    if own:
        # What the environment holds comes first, and a job's own env_vars are in it: Ray refuses a variable set by both.
        environment = {"env_vars": {k: v for k, v in QUIET.items() if k not in os.environ}}
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "runtime_env": environment}
        handler = signal.getsignal(signal.SIGTERM)
        _connect(os.environ.get("RAY_ADDRESS", "auto"), config, quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def _connect(address: str, config: Config, settings: dict[str, Any]) -> None:
    """To the cluster of an address; `auto`: one that `ray start` made here, else a new local one, as `local`.

    Raises:
        DistmtlError: no cluster answers there.
    """
    if address != "local":
        try:
            ray.init(**settings, address=address)
            return
        except (ConnectionError, RayError) as e:
            if address != "auto":
                raise DistmtlError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {_last_line(e)}; unset RAY_ADDRESS to train on this machine, "
                    "and where the cluster wants a token, export RAY_AUTH_MODE=token"
                ) from e
    cpus = max(os.cpu_count() or 1, config.cluster.workers * config.cluster.cpus_per_worker)
    ray.init(**settings, address="local", num_cpus=cpus)


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


def _refuse_fleeting_directory(config: Config) -> None:
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and absolute(config.run_dir) != config.run_dir:
        raise DistmtlError(
            f"run.dir {config.run_dir} is relative, and a Ray job's working directory is a copy that goes with the job; "
            "set run.dir to an absolute path that every node sees"
        )


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _reason(error: TrainingFailedError | RayActorError, config: Config) -> str:
    """The workers' own words, without the tracebacks."""
    failures = getattr(error, "worker_failures", {}) or {}
    words = [f"rank {rank}: {_last_line(e)}" for rank, e in sorted(failures.items()) if str(e).strip()]
    text = "; ".join(words[:4]) or _last_line(error)
    kept = any((place(config.run_dir) / "checkpoints").glob("step-*/manifest.json"))
    return (
        f"training failed, and cluster.max_failures={config.cluster.max_failures} allows no further restart: {text}\n"
        + (f"the newest checkpoint stays in {config.run_dir}; the same command continues from it. " if kept else "")
        + "Workers' logs: the newest session_*/logs/train under Ray's temporary folder; --debug shows the traceback"
    )
