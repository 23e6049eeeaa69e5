"""A container's limits, in both versions of cgroups, and who goes by them."""

import os

import psutil
import pytest
import tiny
import torch

from distmtl import machine
from distmtl.data.reader import decoding_threads

GIB = 2**30
NONE = 9223372036854771712  # what version 1 gives where there is no limit


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 16, 64),
        ({"cpu.max": "max 100000", "memory.max": "max"}, 16, 64),
        ({"cpu.max": "650000 100000", "memory.max": 8 * GIB}, 6, 8),
        ({"cpu.max": "50000 100000", "memory.max": 128 * GIB}, 1, 64),
        ({"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": NONE}, 16, 64),
        ({"cpu/cpu.cfs_quota_us": 400000, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": 8 * GIB}, 4, 8),
    ],
)
def test_a_containers_limits(tmp_path, monkeypatch, files, cores, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64 * GIB}))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (machine.available_cores(), machine.usable_memory()) == (cores, memory * GIB)
    config = tiny.config(tmp_path, tmp_path)
    assert decoding_threads(config, torch.device("cuda")) == min(max(cores - 2, 1), 8)
    assert decoding_threads(config, torch.device("cpu")) == 1
