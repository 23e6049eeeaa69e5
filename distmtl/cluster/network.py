"""The network interface that gloo and NCCL use: the one that owns the node's Ray address.

Left alone, gloo binds to whatever the hostname resolves to. Where that is 127.0.1.1 (Debian's default, many containers) workers on
different nodes try to reach each other on their own loopback, and no process group comes up.
"""

from __future__ import annotations

import os
import socket

import psutil
import ray
from ray.train._internal.worker_group import WorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class ProcessGroupConfig(TorchConfig):
    """Ray's TorchConfig, with the interface chosen on every worker before the process group is made."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return InterfaceBackend


class InterfaceBackend(_TorchBackend):
    def on_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Tell gloo and NCCL which interface to use, where the user has not. Runs in a worker, before its process group exists."""
    name = interface_of(ray.util.get_node_ip_address())
    for variable in VARIABLES:
        if name and (variable != "NCCL_SOCKET_IFNAME" or name != "lo"):  # NCCL finds its own way on a single node
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The interface that owns an IPv4 address; None where it is nobody's here (an address behind NAT)."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return None
