"""`needs_namespaces`: skips where no network namespaces can be made."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs the command ip (package iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None if made.returncode == 0 else f"cannot make a network namespace: {made.stderr.strip()}"


_reason = _why_not()
needs_namespaces = pytest.mark.skipif(_reason is not None, reason=_reason or "")
