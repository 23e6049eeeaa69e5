"""serve(): the service on Ray Serve, a proxy that speaks HTTP before replicas that score."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

# A third less time of replica and proxy for a request: gRPC between the two instead of Ray tasks (Serve's replicas listen for it anyway),
# and no thread of its own for a handler that never blocks.
os.environ.update(
    {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    }
    | os.environ
)  # before ray.serve, which reads them when it is imported

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from distmtl.cluster.supervision import last_line
from distmtl.cluster.trainer import QUIET, session
from distmtl.config import ClusterConfig, Workers
from distmtl.errors import DistmtlError
from distmtl.serving.app import Service, Settings
from distmtl.serving.counters import FOLDER
from distmtl.serving.request import BadRequest

NAME = "distmtl"
SAID = f"{DistmtlError.__name__}: "
STOP_S = 20.0  # that requests in flight have at the end
LOGS = LoggingConfig(enable_access_log=False, log_level="ERROR")


class Replica:
    """A process that scores: the service, and around it what Ray Serve wants."""

    def __init__(self, settings: Settings):
        from distmtl.distributed.process import quieten

        quieten()
        self.service = Service(settings)

    async def __call__(self, request: Request) -> Response:
        answer = await self.service.answer(request.method, request.url.path, request.headers, request.query_params, body_of(request))
        return Response(answer.body, answer.status, dict(answer.headers), answer.kind)

    def check_health(self) -> None:
        if not self.service.scorer.thread.is_alive():
            raise RuntimeError("the thread that scores has ended")

    def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()


async def body_of(request: Request) -> AsyncIterator[bytes]:
    """
    Raises:
        BadRequest: the client went away before its end; nobody reads the answer, and the server has not failed.
    """
    try:
        async for part in request.stream():
            yield part
    except ClientDisconnect:
        raise BadRequest(400, "the client went away before its request was whole") from None


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 8000, replicas: int = 1, say: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; then requests in flight are answered first.

    Raises:
        DistmtlError: an export, the fusion or the token cannot be read, or the port is taken.
    """
    settings = settings.absolute()
    settings.check()
    _refuse_taken(host, port)
    example = settings.request(f"http://{host}:{port}")
    stop = threading.Event()
    counts = tempfile.mkdtemp(prefix="distmtl-serve-")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cluster = ClusterConfig(workers=Workers(min=replicas, max=replicas), cpus_per_worker=1)
    try:
        with session(cluster):
            _start(settings, host, port, replicas, counts)
            say(f"serving {', '.join(settings.versions)} at http://{host}:{port}/v1/score with {replicas} replica(s); Ctrl-C ends it")
            say(f"try it: {example}")
            before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                stop.wait()
                say("stopping: requests in flight are answered first")
                ray_serve.delete(NAME)
                if not ray._private.worker._global_node:  # a cluster that goes on without us
                    ray_serve.shutdown()
            finally:
                for s, handler in before.items():
                    signal.signal(s, handler)
    finally:
        shutil.rmtree(counts, ignore_errors=True)


def _start(settings: Settings, host: str, port: int, replicas: int, counts: str) -> None:
    if ray_serve.status().applications:
        raise DistmtlError("Ray Serve runs on this cluster already, with ports of its own; unset RAY_ADDRESS to serve on this machine")
    if (cpus := int(ray.cluster_resources().get("CPU", 0))) < replicas:
        raise DistmtlError(f"the Ray cluster has {cpus} CPUs, but {replicas} replicas want one each; lower --replicas, or add nodes")
    room = 2 * settings.pending + 16  # of requests in a replica: above `pending` it answers itself, and health always
    deployment: Any = ray_serve.deployment(
        Replica,
        name="replica",
        num_replicas=replicas,
        max_ongoing_requests=room,
        max_queued_requests=room,
        graceful_shutdown_timeout_s=STOP_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        max_constructor_retry_count=2,
        logging_config=LOGS,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": QUIET | {FOLDER: counts, "OMP_NUM_THREADS": "1"}}},
    )
    try:
        ray_serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port), logging_config=LOGS)
        ray_serve.run(deployment.bind(settings), name=NAME, route_prefix="/", logging_config=LOGS)
    except (RayError, RuntimeError) as e:
        raise DistmtlError(_why() or f"the service does not start: {last_line(e)}") from e


def _why() -> str:
    """What a replica said that did not start: Serve keeps the end of its traceback."""
    applications = ray_serve.status().applications
    texts = [d.message for d in applications[NAME].deployments.values()] if NAME in applications else []
    said = [line.partition(SAID)[2] for text in texts for line in text.splitlines() if SAID in line]
    return said[-1] if said else ""


def _refuse_taken(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as e:
        raise DistmtlError(f"--host {host} --port {port} cannot be opened: {getattr(e, 'strerror', e)}; choose others") from None
