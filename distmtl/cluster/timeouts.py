"""Every time limit that decides how soon a failure is noticed and mended, with Ray's default where it differs.

Imported before ray, which reads some of them when it is imported. An environment variable that is already set wins.
docs/fault-tolerance.md explains them to users.
"""

from __future__ import annotations

import os

from distmtl.config import ClusterConfig

DRIVER = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2: how often the controller asks the workers; a death costs one interval
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # 60: waiting for places that a node which just died seemed to have
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its actor logs an error at every start
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30: leaving a process group that a dead or stuck worker belongs to
}
RETRY_WAIT_S = (2, 5, 15, 30)  # before the 1st, 2nd … restart of Ray's controller; the last one for all further ones


def set_timeouts() -> None:
    for name, value in DRIVER.items():
        os.environ.setdefault(name, value)


def set_hang_timeout(cluster: ClusterConfig) -> None:
    """A worker that answers nobody (stopped, or stuck outside a collective) is given up like one stuck in a collective. Ray: 600."""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(cluster.collective_timeout_s))


def retry_wait_s(attempt: int) -> float:
    """Seconds before restart number `attempt` (from 0)."""
    return RETRY_WAIT_S[min(attempt, len(RETRY_WAIT_S) - 1)]
