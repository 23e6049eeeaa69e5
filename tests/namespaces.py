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
    veth = ["type", "veth", "peer", "name", "eth1"]
    steps = (["netns", "add", name], ["-n", name, "link", "add", "eth0", *veth], ["-n", name, "link", "add", "br0", "type", "bridge"])
    done = [subprocess.run(["ip", *step], capture_output=True, text=True, check=False) for step in steps]
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    errors = [d.stderr.strip() for d in done if d.returncode]
    return f"cannot make a network namespace: {errors[0]}" if errors else None


_reason = _why_not()
needs_namespaces = pytest.mark.skipif(_reason is not None, reason=_reason or "")
