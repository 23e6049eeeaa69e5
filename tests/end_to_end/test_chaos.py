"""Failures on a cluster of several nodes in network namespaces (tests/chaos.py): a few always, every kind and elastic when slow."""

from __future__ import annotations

import pytest
from chaos import KINDS, Chaos
from namespaces import needs_namespaces

pytestmark = needs_namespaces


@pytest.mark.timeout(600)
def test_a_run_survives(tmp_path):
    """A worker, a node and the driver die, a checkpoint is truncated: every row trained once, metrics as if undisturbed."""
    kinds = ["worker", "node", "truncate", "driver"]
    chaos = Chaos(tmp_path, "2", steps=600, seed=0)
    result = chaos.go(kinds)
    chaos.check(result)
    assert result["restarts"] == len(kinds) and result["world_size"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", ["2", "1-2"])
def test_every_failure(tmp_path, workers):
    """Every kind once, on a fixed number of workers and on an elastic one, which must really have shrunk and grown."""
    chaos = Chaos(tmp_path, workers, steps=3600 if workers == "1-2" else 1800, seed=1)  # growing takes a lone worker about 1,000 steps
    chaos.check(chaos.go(list(KINDS)))
    print(chaos.summary())
    if workers == "1-2":
        assert {r["world_size"] for r in chaos.records("start")} == {1, 2}
    lost = {f.kind: f.step - f.resumed for f in chaos.failures}
    assert lost["drain"] <= 0, "a preemption notice cost steps"
