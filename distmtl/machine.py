"""What this process may use of its machine: cores and memory, within its affinity and its container's limits."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limits at the root of each hierarchy


def available_cores() -> int:
    """Cores this process may use: affinity, and the cgroup's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_cpu_quota() or cores)))


def usable_memory() -> int:
    """Bytes of memory: the machine's, or the cgroup's limit where that is smaller."""
    total = psutil.virtual_memory().total
    return min(total, cgroup_memory_limit() or total)


def cgroup_memory_limit() -> int | None:
    """Bytes; None outside a container and without a limit (version 1 then gives a number beyond every machine's memory)."""
    found = _words("memory.max") or _words("memory/memory.limit_in_bytes")
    return int(found[0]) if found and found[0] != "max" else None


def _cpu_quota() -> float | None:
    """In cores."""
    match _words("cpu.max") or [*_words("cpu/cpu.cfs_quota_us"), *_words("cpu/cpu.cfs_period_us")]:
        case [quota, period] if quota not in ("max", "-1"):
            return float(quota) / float(period)
    return None


def _words(name: str) -> list[str]:
    """Of a cgroup's file; none if it cannot be read."""
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []
