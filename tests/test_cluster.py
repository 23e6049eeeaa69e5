"""What surrounds Ray, without starting it: attempts and their number of workers, the network interface, time limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distmtl import checkpoint
from distmtl.cluster import network, supervision, timeouts, trainer
from distmtl.cluster.places import Node
from distmtl.config import ClusterConfig
from distmtl.errors import DistmtlError
from distmtl.stopping import Request, ask
from distmtl.tracking.log import LogWriter, read_log


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Seconds of waiting become hundredths."""
    monkeypatch.setattr(timeouts, "RETRY_WAIT_S", (0.0, 0.01))
    for name, seconds in {"LOOK_EVERY_S": 0.01, "RELEASE_S": 0.05, "SAY_EVERY_S": 0.05, "LAST_SAVE_S": 0.2}.items():
        monkeypatch.setattr(supervision, name, seconds)


KILLED = WorkerGroupError("rank 1 died", {0: RuntimeError("Connection closed by peer [10.0.0.1]:99"), 1: RuntimeError("killed")})
DONE = {"result": {"stopped": False}}
ROOM = (Node("a", 2, 2),)


class Cluster:
    """Nodes that change, and attempts that end as they are told: an outcome, an exception, or a function of the run's folder."""

    def __init__(self, folder, *attempts, nodes=ROOM, **settings):
        self.folder, self.attempts, self.nodes = folder, list(attempts), list(nodes)
        self.begun, self.said = [], []
        self.settings = ClusterConfig.model_validate({"workers": 2, **settings})

    def attempt(self, workers):
        self.begun.append(workers)
        what = self.attempts.pop(0)
        what = what(self) if callable(what) else what
        if isinstance(what, Exception):
            raise what
        return what

    def run(self):
        said = lambda record: self.said.append(record["text"])  # noqa: E731
        return supervision.Supervisor(self.settings, self.folder, self.attempt, lambda: list(self.nodes), said).run()


def saved(folder, step):
    checkpoint.prepare(path := folder / "checkpoints" / checkpoint.name_of(step, 0))
    checkpoint.commit(path, {"step": step})


def wait_for(file, within=5.0):
    deadline = time.monotonic() + within
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name} was asked for"
        time.sleep(0.005)


def test_every_kind_of_failure_is_restarted(tmp_path):
    cluster = Cluster(tmp_path, KILLED, ControllerError(RuntimeError("no gloo")), RayActorError(), DONE)
    assert cluster.run() == DONE
    assert cluster.begun == [2, 2, 2, 2]
    assert [t.split(";")[0] for t in cluster.said] == ["rank 1: killed", "Ray's controller failed: no gloo", "Ray's controller died"]


def test_not_more_often_than_max_failures_without_a_new_checkpoint(tmp_path):
    cluster = Cluster(tmp_path, *[KILLED] * 9, max_failures=2)
    with pytest.raises(DistmtlError, match="max_failures=2 allows no further restart: rank 1: killed"):
        cluster.run()
    assert len(cluster.begun) == 3


def test_progress_forgives_failures(tmp_path):
    def gets_to(step):
        def attempt(cluster):
            saved(tmp_path, step)
            return KILLED

        return attempt

    cluster = Cluster(tmp_path, *[gets_to(step) for step in range(1, 8)], DONE, max_failures=1)
    assert cluster.run() == DONE and len(cluster.begun) == 8


def test_what_a_retry_cannot_mend_is_returned_at_once(tmp_path):
    cluster = Cluster(tmp_path, {"error": "bad data"})
    assert cluster.run() == {"error": "bad data"} and cluster.begun == [2]


def test_a_lost_node_shrinks_the_run_and_a_new_one_lets_it_grow(tmp_path):
    """3 workers, 1 node lost: 2 at once; a node added: the loop is asked to move, and 3 go on. Failures are not counted for a move."""

    def loses_a_node(cluster):
        cluster.nodes = [Node("a", 2, 2)]
        return KILLED

    def is_asked_to_move(cluster):
        cluster.nodes = [Node("a", 2, 0), Node("c", 4, 4)]
        wait_for(tmp_path / Request.MOVE)
        (tmp_path / Request.MOVE).unlink()  # as the loop does
        cluster.nodes = [Node("a", 2, 2), Node("c", 4, 4)]
        return {"result": {"stopped": True}}

    settings = {"workers": {"min": 1, "max": 3}, "resize_every_s": 1, "max_failures": 1}
    cluster = Cluster(tmp_path, loses_a_node, is_asked_to_move, DONE, nodes=[Node("a", 2, 2), Node("b", 2, 2)], **settings)
    assert cluster.run() == DONE
    assert cluster.begun == [3, 2, 3] and "room for 3 workers instead of 2" in cluster.said[-1]


def test_places_that_are_given_back_late_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "RELEASE_S", 60)

    def dies(cluster):
        cluster.nodes = [Node("a", 2, 1)]  # the other worker's place is not free yet
        threading.Timer(0.3, lambda: cluster.nodes.__setitem__(0, Node("a", 2, 2))).start()
        return KILLED

    cluster = Cluster(tmp_path, dies, DONE, workers={"min": 1, "max": 2})
    assert cluster.run() == DONE and cluster.begun == [2, 2]


def test_a_fixed_number_waits_for_a_node_and_says_so(tmp_path):
    def loses_a_node(cluster):
        cluster.nodes = [Node("a", 1, 1)]
        threading.Timer(0.4, lambda: cluster.nodes.append(Node("b", 1, 1))).start()
        return KILLED

    cluster = Cluster(tmp_path, loses_a_node, DONE)
    assert cluster.run() == DONE and cluster.begun == [2, 2]
    assert "waiting for places for 2 worker(s): the cluster has 1 free" in cluster.said


def test_waiting_ends(tmp_path):
    def gone(cluster):
        cluster.nodes = []
        return KILLED

    with pytest.raises(DistmtlError, match="places for 0 worker.*place_timeout_s=1 "):
        Cluster(tmp_path, gone, place_timeout_s=1).run()

    def stopped_by_the_user(cluster):
        ask(tmp_path, Request.STOP)
        return gone(cluster)

    with pytest.raises(DistmtlError, match="asked to stop while waiting"):
        Cluster(tmp_path, stopped_by_the_user).run()


def test_a_leaving_node_is_left_in_time(tmp_path):
    """The others have room: the loop saves and moves there at once."""

    def is_told(cluster):
        cluster.nodes = [Node("a", 2, 0, leaving=True), Node("b", 2, 2)]
        wait_for(tmp_path / Request.MOVE)
        (tmp_path / Request.MOVE).unlink()
        return {"result": {"stopped": True}}

    cluster = Cluster(tmp_path, is_told, DONE, nodes=[Node("a", 2, 2), Node("b", 2, 2)])
    assert cluster.run() == DONE and cluster.begun == [2, 2] and "node a is leaving; the run moves" in cluster.said[0]


def test_where_there_is_no_room_a_leaving_node_is_used_to_the_end(tmp_path):
    """Saved at the notice, and again shortly before the node goes."""

    def is_told(cluster):
        cluster.nodes = [Node("a", 2, 0, leaving=True, leaves_at=time.time() + 0.6)]
        for _ in range(2):
            wait_for(tmp_path / Request.SAVE)
            (tmp_path / Request.SAVE).unlink()
        cluster.nodes = [Node("b", 2, 2)]
        return KILLED

    cluster = Cluster(tmp_path, is_told, DONE)
    assert cluster.run() == DONE and "saving, and training on until it goes" in cluster.said[0]


def test_a_users_stop_goes_before_a_move(tmp_path):
    """Both were asked for; the loop answered STOP, so the run ends."""

    def is_stopped(cluster):
        cluster.nodes.append(Node("b", 2, 2))
        wait_for(tmp_path / Request.MOVE)
        return {"result": {"stopped": True}}  # MOVE is still there

    cluster = Cluster(tmp_path, is_stopped, nodes=[Node("a", 1, 1)], workers={"min": 1, "max": 2}, resize_every_s=1)
    assert cluster.run()["result"]["stopped"] and cluster.begun == [1]


def test_attempts_leave_the_main_thread_to_our_signal_handlers():
    assert supervision.start(threading.current_thread).result() is not threading.main_thread()


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


def test_a_local_ray_that_does_not_start_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    code = "from distmtl.cluster.trainer import session; from distmtl.config import ClusterConfig\nwith session(ClusterConfig()): pass"
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(tmp_path / "file" / "none")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "DistmtlError: no local Ray could be started" in run.stderr.splitlines()[-1]


def test_ray_train_s_actors_are_told_which_cluster_is_theirs(monkeypatch):
    """And the environment is as before afterwards."""
    from types import SimpleNamespace

    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    monkeypatch.setattr(trainer.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.9:6379"))
    for before in ("auto", None):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if before:
            monkeypatch.setenv("RAY_ADDRESS", before)
        with trainer.known_address():
            assert get_env_vars_to_propagate()["RAY_ADDRESS"] == "10.0.0.9:6379"
        assert os.environ.get("RAY_ADDRESS") == before


def test_a_cluster_that_died_is_not_waited_for(tmp_path, monkeypatch):
    """`ray start` notes its cluster on the machine; one that was killed leaves the note. Another command's own instance counts not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {"127.0.0.1:1"})
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda temp_dir: str(tmp_path / "ray_current_cluster"))
    assert trainer._cluster_here() == "local"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray_current_cluster").write_text(address)
        assert trainer._cluster_here() == address
    assert trainer._cluster_here() == "local"


def test_the_log_is_passed_on_from_where_the_last_attempt_ended(tmp_path):
    """Half a line that a crash left is cut off by the next attempt: nothing is told twice, nothing torn."""
    log, got = tmp_path / "metrics.jsonl", []
    log.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    with trainer.passing_on(log, got.append):
        writer = LogWriter(log)
        for i in (3, 4):
            writer.take({"a": i})
        writer.close()
    assert got == [{"a": 3}, {"a": 4}]


def test_what_ended_the_attempts_is_in_the_log(tmp_path):
    (log := tmp_path / "metrics.jsonl").write_text('{"kind": "start"}\n')
    with pytest.raises(DistmtlError), trainer.last_word(log):
        Cluster(tmp_path, *[KILLED] * 9, max_failures=1).run()
    *_, last = read_log(log)
    assert last["kind"] == "failed" and "cluster.max_failures=1 allows no further restart: rank 1: killed" in last["text"]
