"""launch/local_cluster.sh with NETNS: nodes with addresses of their own, and nothing is left of them afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from namespaces import needs_namespaces

SCRIPT = Path(__file__).parents[1] / "launch" / "local_cluster.sh"
ADDRESSES = """
import json, ray, sys

ray.init(address="auto", log_to_driver=False)
where = ray.remote(ray.util.get_node_ip_address)
answers = [ray.get(where.options(resources={f"node:{a}": 0.01}).remote(), timeout=60) for a in sys.argv[1:]]
print(json.dumps([sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]), answers]))
"""


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def names(tmp_path) -> Iterator[dict[str, str]]:
    """What tells this cluster from others; it is stopped in the end, whatever became of it."""
    pid = os.getpid()
    environment = {"NETNS": f"t{pid % 10**7}", "SUBNET": f"10.{100 + pid // 250 % 100}.{pid % 250}.0/24", "CLUSTER_DIR": str(tmp_path)}
    yield environment
    shell(SCRIPT, "stop", **environment)


def remains(name: str, pids: set[int]) -> list[str]:
    """Namespaces, links and processes of a cluster; one that is dead, but whose parent has not looked yet, does not count."""
    listed = shell("ip", "netns", "list").stdout + shell("ip", "-o", "link", "show").stdout
    alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    return re.findall(rf"\b{name}-\w+", listed) + [f"process {p}" for p in alive]


@needs_namespaces
@pytest.mark.slow
def test_nodes_have_addresses_of_their_own_and_leave_nothing(names):
    def cluster(*arguments: object) -> str:
        done = shell(SCRIPT, *arguments, **names)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pids(node: str) -> set[int]:
        return set(map(int, shell("ip", "netns", "pids", f"{names['NETNS']}-{node}").stdout.split()))

    def address(n: int) -> str:
        return names["SUBNET"].replace(".0/24", f".{n}")

    said = cluster("start", 2, 1)
    assert f"RAY_ADDRESS={address(1)}:6379 RAY_API_SERVER_ADDRESS=http://{address(1)}:8265" in said
    head, workers = address(1), [address(2), address(3)]
    assert json.loads(cluster("run", "python", "-c", ADDRESSES, *workers)) == [[head, *workers], workers]

    cluster("cut", 2)
    assert shell("ip", "netns", "exec", f"{names['NETNS']}-head", "bash", "-c", f"timeout 2 bash -c '</dev/tcp/{address(3)}/1'").returncode
    cluster("mend", 2)

    assert pids("node1")
    cluster("kill", 1)
    assert not pids("node1")
    assert address(4) in cluster("add", 1)
    workers = [address(3), address(4)]
    alive, answers = json.loads(cluster("run", "python", "-c", ADDRESSES, *workers))
    assert {head, *workers} <= set(alive) and answers == workers  # Ray takes 15 seconds to miss the killed one

    last = Path(os.environ.get("RAY_TEMP_DIR", "/tmp/ray")) / "ray_current_cluster"  # Ray's note, for drivers that name no address
    assert last.read_text() == f"{head}:6379"
    running = pids("head") | pids("node2") | pids("node3")
    assert running and len(remains(names["NETNS"], running)) > len(running)
    cluster("stop")
    assert remains(names["NETNS"], running) == []
    assert not last.exists(), "the next driver of this machine would look for the cluster that is gone"


def test_without_ip_it_says_so(tmp_path):
    for tool in ("bash", "realpath", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    refused = shell(SCRIPT, "start", NETNS="t", CLUSTER_DIR=str(tmp_path / "cluster"), PATH=str(tmp_path))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "local_cluster.sh: NETNS needs root and the command ip (package iproute2)\n"
    assert not (tmp_path / "cluster").exists()


def test_cut_is_for_namespaces_only(tmp_path):
    refused = shell(SCRIPT, "cut", "1", NETNS="", CLUSTER_DIR=str(tmp_path))
    assert (refused.returncode, refused.stderr) == (1, "local_cluster.sh: cut needs a cluster with NETNS\n")
