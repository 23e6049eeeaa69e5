"""The operator's scripts parse, and say how they are used."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    asked = subprocess.run([script], capture_output=True, text=True, check=False)
    assert asked.returncode == 2 and f"launch/{script.name}" in asked.stdout
