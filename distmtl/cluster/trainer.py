"""train_on_ray(): the loop on Ray Train workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of every worker without a GPU

import pyarrow.fs
import ray
from ray._private.services import find_bootstrap_address
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from distmtl.cluster.metrics import TrainingMetrics
from distmtl.cluster.network import ProcessGroupConfig
from distmtl.cluster.places import answers, nodes, worker_resources
from distmtl.cluster.supervision import Supervisor, last_line
from distmtl.cluster.timeouts import set_hang_timeout
from distmtl.config import ClusterConfig, Config
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.following import Publish, Until, follow
from distmtl.progress import Report, print_record
from distmtl.run_directory import ResumePolicy, open_run
from distmtl.storage import absolute, is_remote, place
from distmtl.tracking.log import LOG, LogReader, add_to_log
from distmtl.tracking.trackers import require_trackers

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
# glibc gives the memory of a step's large tensors back to the system, and the next step pays a page fault for every 4 kB of them: a fifth
# of its time on CPU. One arena, since the others give back whatever these say (mallopt(3)); and Arrow's own allocator gives back too.
# launch/torchrun.sh sets the same.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def train_on_ray(
    config: Config,
    resume: str = "auto",
    report: Report = print_record,
    policy: ResumePolicy = "strict",
    continue_from: str | None = None,
) -> dict[str, Any]:
    """Train on `cluster.workers` Ray Train workers: of the cluster that RAY_ADDRESS or `ray start` offers, else of a local one.

    Config and data are checked here, before anything is started. Returns result.json's object.

    Raises:
        DistmtlError: what a retry cannot mend, or more failures in a row than cluster.max_failures.
    """
    from distmtl.data.splits import open_splits
    from distmtl.model.head import try_plugin

    refuse_fleeting(config.run_dir, "run.dir")
    require_trackers(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": absolute(config.run_dir)})})
    open_run(config, resume, open_splits(config)["train"], policy, continue_from)
    try_plugin(config)
    report({"kind": "note", "text": f"data and config are sound; starting {config.cluster.workers} Ray Train worker(s) …"})
    set_hang_timeout(config.cluster)
    folder = place(config.run_dir)
    origin = "auto" if resume in ("auto", "never") else absolute(resume)  # Ray's workers have directories of their own
    settings = {"resume": origin, "policy": policy, "continue_from": continue_from}
    with session(config.cluster), passing_on(folder / LOG, report):
        worker = worker_resources(config.cluster, use_gpu=use_gpu(config.cluster))
        supervisor = Supervisor(
            config.cluster,
            folder,
            attempt=lambda workers: _trainer(config, settings, workers, worker).fit().return_value,
            places=lambda: nodes(worker),
            report=report,
        )
        with last_word(folder / LOG):
            outcome = supervisor.run()
    if "error" in outcome:
        raise DistmtlError(outcome["error"])
    return outcome["result"]


def follow_on_ray(
    config: Config, source: str, until: Until, resume: str = "auto", policy: ResumePolicy = "strict", publish: Publish | None = None
) -> dict[str, Any]:
    """`follow` on Ray Train workers; the session lasts over the partitions. Between them no worker runs."""
    refuse_fleeting(config.run_dir, "run.dir")
    refuse_fleeting(source, "--follow")
    set_hang_timeout(config.cluster)
    with session(config.cluster):
        return follow(config, source, train_on_ray, until, resume=resume, policy=policy, publish=publish)


def _trainer(config: Config, settings: dict[str, Any], workers: int, worker: dict[str, int]) -> TorchTrainer:
    return TorchTrainer(
        work,
        train_loop_config={**settings, "config": config.model_dump(mode="json")},
        torch_config=ProcessGroupConfig(timeout_s=config.cluster.collective_timeout_s),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in worker, resources_per_worker=worker),
        run_config=RunConfig(
            name="train",
            **storage(place(config.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),  # the Supervisor restarts
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def storage(folder: Path) -> dict[str, Any]:
    """Where Ray keeps its own little state; no weights are in it."""
    if not is_remote(folder):
        return {"storage_path": absolute(str(folder))}
    handler = pyarrow.fs.FSSpecHandler(folder.fs)  # type: ignore[attr-defined]
    return {"storage_path": folder.path, "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}  # type: ignore[attr-defined]


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. An error that a retry cannot mend is returned, not raised: Ray would try again."""
    from distmtl.distributed.process import quieten

    quieten()
    from distmtl.loop import train

    config = parse_config(settings["config"])
    try:
        with TrainingMetrics(config.run_dir) as metrics:
            return {"result": train(**{**settings, "config": config}, report=metrics.take, checked=True)}
    except DistmtlError as e:
        return {"error": str(e)}


@contextmanager
def session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, connected; a local instance is stopped afterwards."""
    own = not ray.is_initialized()
    if own:
        # What the environment holds comes first, and a job's own env_vars are in it: Ray refuses a variable set by both.
        environment = {"env_vars": {k: v for k, v in (QUIET | KEEP_MEMORY).items() if k not in os.environ}}
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "runtime_env": environment}
        handler = signal.getsignal(signal.SIGTERM)
        _connect(os.environ.get("RAY_ADDRESS", "auto"), cluster, quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        with known_address():
            yield
    finally:
        if own:
            ray.shutdown()


@contextmanager
def known_address() -> Iterator[None]:
    """Ray Train's actors are told which cluster is theirs. Left alone, the one that looks whether the controller lives asks whichever
    instance of this machine it finds, even a stale one: every attempt ends 12 seconds later, or a live run loses its places."""
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _connect(address: str, cluster: ClusterConfig, settings: dict[str, Any]) -> None:
    """To the cluster of an address; `auto`: one that `ray start` made here, else a new local one, as `local`.

    Raises:
        DistmtlError: no cluster answers there, or none can be started here.
    """
    place = _cluster_here() if address == "auto" else address
    if place != "local":
        try:
            ray.init(**settings, address=place)
            return
        except (ConnectionError, RayError) as e:
            if address != "auto":
                raise DistmtlError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {last_line(e)}; unset RAY_ADDRESS to train on this machine, "
                    "and where the cluster wants a token, export RAY_AUTH_MODE=token"
                ) from e
    cpus = max(os.cpu_count() or 1, cluster.workers.max * cluster.cpus_per_worker)
    try:
        ray.init(**settings, address="local", num_cpus=cpus, include_dashboard=False)
    except Exception as e:  # Ray raises bare ones
        raise DistmtlError(
            f"no local Ray could be started: {last_line(e)}; on a busy machine try again; launch/torchrun.sh trains without Ray"
        ) from e


def _cluster_here() -> str:
    """The cluster that `ray start` made on this machine, else `local`. Not, as ray.init would, any other command's own instance: it
    may have another token, and ends with that command. Ray's note may be of a cluster that died: ray.init would wait for it in silence,
    for minutes."""
    if not (address := find_bootstrap_address(None)):
        return "local"
    host, _, port = address.rpartition(":")
    return address if answers(host.strip("[]"), int(port)) else "local"


def use_gpu(cluster: ClusterConfig) -> bool:
    """Whether workers get a GPU each.

    Raises:
        DistmtlError: the cluster has no places for that many workers.
    """
    there, least = ray.cluster_resources(), cluster.workers.min
    gpu = cluster.device == "cuda" or (cluster.device == "auto" and there.get("GPU", 0) >= least)
    wanted = {name: least * amount for name, amount in worker_resources(cluster, gpu).items()}
    lacking = [f"{int(there.get(k, 0))} {k}s, but {least} workers want {n}" for k, n in wanted.items() if there.get(k, 0) < n]
    if lacking:
        raise DistmtlError(f"the Ray cluster has {' and '.join(lacking)}; lower cluster.workers or cpus_per_worker, or add nodes")
    return gpu


@contextmanager
def passing_on(log: Path, report: Report) -> Iterator[None]:
    """Pass on the records that rank 0 appends to the log, wherever it runs."""
    reader = LogReader(log)
    reader.read()  # of former attempts; half a line that a crash left at the end is cut off by the next one
    done = threading.Event()

    def follow() -> None:
        last = False
        while not last:
            last = done.wait(0.2)
            with suppress(OSError):  # a store that does not answer is asked again
                for record in reader.read():
                    report(record)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def last_word(log: Path) -> Iterator[None]:
    """Why no further attempt is made goes into the log, which its workers could not say any more."""
    try:
        yield
    except DistmtlError as e:
        with suppress(OSError):  # the first error is the one to tell
            add_to_log(log, {"kind": "failed", "time": round(time.time(), 3), "text": str(e)})
        raise


def refuse_fleeting(folder: str, key: str) -> None:
    """Of a folder that results go to, as `key` of the config gives it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and absolute(folder) != folder:
        raise DistmtlError(
            f"{key} {folder} is relative, and a Ray job's working directory is a copy that goes with the job; "
            f"set {key} to an absolute path that every node sees"
        )
