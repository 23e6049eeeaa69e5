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
RETRY_WAIT_S = (0, 2, 5, 15, 30)  # before the restart after the 1st, 2nd … failure in a row; the last one for all further ones
LOOK_EVERY_S = 1.0  # how often the driver looks for nodes that leave or come
RELEASE_S = 10.0  # a failed attempt's places are free again after a moment; then it is begun with what there is
SAY_EVERY_S = 30.0  # between two lines that say what is waited for
LAST_SAVE_S = 15.0  # before a node goes, where the run cannot move away from it


def set_timeouts() -> None:
    for name, value in DRIVER.items():
        os.environ.setdefault(name, value)


def set_hang_timeout(cluster: ClusterConfig) -> None:
    """A worker that answers nobody (stopped, or stuck outside a collective) is given up like one stuck in a collective. Ray: 600."""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(cluster.collective_timeout_s))


def retry_wait_s(failures: int) -> float:
    """Seconds before a restart, after so many failures in a row before this one."""
    return RETRY_WAIT_S[min(failures, len(RETRY_WAIT_S) - 1)]
