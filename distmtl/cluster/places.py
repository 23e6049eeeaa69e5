"""Where workers could run now: the cluster's nodes, how many workers each has room for, which of them are about to go."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node, state

from distmtl.config import ClusterConfig
from distmtl.errors import DistmtlError

CONNECT_S = 1.0  # a node that takes longer to answer is not counted on


@dataclass(frozen=True)
class Node:
    """One node: workers it has room for in all, and now. `leaves_at`: seconds since the epoch, 0 where nobody knows when."""

    name: str
    total: int
    free: int
    leaving: bool = False
    leaves_at: float = 0.0


def worker_resources(cluster: ClusterConfig, use_gpu: bool) -> dict[str, int]:
    """What one worker takes."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})


def nodes(worker: dict[str, int]) -> list[Node]:
    """The nodes that answer. Ray itself believes in a dead node for some seconds more; whoever counts on its places waits in vain."""
    free, draining = available_resources_per_node(), state.get_draining_nodes()
    return [
        Node(
            name=f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})",
            total=_fitting(n["Resources"], worker),
            free=_fitting(free.get(n["NodeID"], {}), worker),
            leaving=n["NodeID"] in draining,
            leaves_at=draining.get(n["NodeID"], 0) / 1000,
        )
        for n in ray.nodes()
        if n["Alive"] and answers(n["NodeManagerAddress"], n["NodeManagerPort"])
    ]


def places_for_one(worker: dict[str, int]) -> int:
    """How many workers of one each could run at a time, at most.

    Raises:
        DistmtlError: none could.
    """
    if room := sum(node.total for node in nodes(worker)):
        return room
    asked = " and ".join(f"{n} {k}" for k, n in worker.items())
    raise DistmtlError(f"no node of the cluster has {asked}, which a run takes; lower cluster.cpus_per_worker, or add a node")


def _fitting(resources: dict[str, float], worker: dict[str, int]) -> int:
    return min(int(resources.get(name, 0) // amount) for name, amount in worker.items())


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
