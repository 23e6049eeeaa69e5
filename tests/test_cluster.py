"""What surrounds Ray, without starting it: restarts of its controller, the network interface, time limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distmtl.cluster import network, timeouts, trainer


class Fit:
    """Fails in the given ways, then succeeds."""

    def __init__(self, *failures: Exception):
        self.failures, self.calls = list(failures), []

    def __call__(self, failures_left: int) -> str:
        self.calls.append(failures_left)
        if self.failures:
            raise self.failures.pop(0)
        return "done"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(timeouts, "RETRY_WAIT_S", (0.0, 0.01))


def test_a_failed_controller_is_started_again_and_counted():
    fit, said = Fit(ControllerError(RuntimeError("no gloo")), RayActorError()), []
    assert trainer.fit_with_retries(fit, 3, said.append) == "done"
    assert fit.calls == [3, 2, 1]
    assert ["no gloo" in said[0]["text"], "died" in said[1]["text"], len(said)] == [True, True, 2]


def test_not_more_often_than_max_failures():
    fit = Fit(*[ControllerError(RuntimeError("again"))] * 9)
    with pytest.raises(ControllerError):
        trainer.fit_with_retries(fit, 2, lambda record: None)
    assert fit.calls == [2, 1, 0]


def test_what_ray_itself_has_retried_is_not_tried_again():
    fit = Fit(WorkerGroupError("rank 1 died", {1: RuntimeError("killed")}))
    with pytest.raises(WorkerGroupError):
        trainer.fit_with_retries(fit, 5, lambda record: None)
    assert fit.calls == [5]


def test_fit_leaves_the_main_thread_to_our_signal_handlers():
    assert trainer.off_main_thread(threading.current_thread) is not threading.main_thread()


def test_the_interface_is_the_one_that_owns_the_node_s_address(monkeypatch):
    for variable in network.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    network.use_node_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME").startswith("lo") and "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(network, "interface_of", lambda address: "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # the user's own choice stays
    network.use_node_interface()
    assert (os.environ.pop("GLOO_SOCKET_IFNAME"), os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "ib0")
    monkeypatch.undo()
    assert network.interface_of("203.0.113.9") is None


def test_time_limits_reach_ray_and_the_users_own_win():
    code = "import distmtl.cluster, os; print(*[os.environ[n] for n in distmtl.cluster.timeouts.DRIVER])"
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"}
    for name in timeouts.DRIVER:
        if name != "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S":
            environment.pop(name, None)
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said == ["7", *list(timeouts.DRIVER.values())[1:]]


def test_ray_knows_these_limits():
    """A renamed variable would be ignored without a word."""
    from ray.train.v2._internal import constants

    known = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR") and isinstance(value, str)}
    ours = {name for name in timeouts.DRIVER if name.startswith("RAY_TRAIN_")} | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"}
    assert ours <= known
    from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S

    assert TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S in timeouts.DRIVER


def test_no_cluster_at_ray_address_is_said_and_no_local_one_started():
    """Else a job meant for a cluster would train on the submitter's laptop."""
    from distmtl.errors import DistmtlError

    def refuse(**settings):
        assert settings["address"] == "10.0.0.9:6379"
        raise ConnectionError("Failed to connect")

    before, ray_init = signal.getsignal(signal.SIGTERM), trainer.ray.init
    trainer.ray.init = refuse
    try:
        with pytest.raises(DistmtlError, match=r"RAY_ADDRESS=10.0.0.9:6379: Failed to connect.*RAY_AUTH_MODE=token"):
            trainer._connect("10.0.0.9:6379", None, {})
    finally:
        trainer.ray.init = ray_init
    assert signal.getsignal(signal.SIGTERM) is before
