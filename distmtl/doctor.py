"""What would go wrong on this machine, before it does: versions, conflicts, devices, threads, network, Ray, storage.

    $ distmtl doctor
    ok       python       3.11.7, Linux x86_64, in a virtual environment
    problem  fbgemm       fbgemm-gpu and fbgemm-gpu-cpu are both installed: they overwrite each other's files
                          mend: pip uninstall -y fbgemm-gpu && pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0
    …

Nothing is imported into this process that a broken installation could crash it with: torch, fbgemm and torchrec are tried in a
child process, Ray is known by its metadata alone.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from distmtl.machine import available_cores, cgroup_memory_limit

Level = Literal["ok", "warning", "problem"]

PYTHONS = ((3, 11), (3, 12))
TESTED = {"torch": "2.13.0", "torchrec": "1.8.0", "ray": "2.60.0", "pyarrow": "26.0.1"}
CPU, CUDA, FBGEMM = "fbgemm-gpu-cpu", "fbgemm-gpu", "1.8.0"
PROBE_TIMEOUT = 60  # seconds; importing torch and torchrec from a cold disk takes ten
GIB = 1024**3

INSTALL = "rm -rf .venv && make install"


@dataclass(frozen=True)
class Finding:
    level: Level
    topic: str
    text: str
    remedy: str = ""


# ------------------------------------------------------------------------------------------------------------ remedies


def pip() -> str:
    """How to call the pip of this environment from here: `pip` may be another's."""
    own = Path(sys.prefix) / "bin" / "pip"
    found = shutil.which("pip")
    if found and Path(found) == own:
        return "pip"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def swap_fbgemm(wrong: str, right: str) -> str:
    # Uninstalling takes the shared files along, so the right one must be put back whole.
    return f"{pip()} uninstall -y {wrong} && {pip()} install --force-reinstall --no-deps {right}=={FBGEMM}"


def reinstall(name: str) -> str:
    if name == "torchrec":  # alone, or it brings the CUDA fbgemm along
        return f"{pip()} install --no-deps torchrec=={TESTED['torchrec']}"
    if name == "fbgemm":  # whole, even where pip believes it is there: uninstalling fbgemm-gpu takes its files along
        return f"{pip()} install --force-reinstall --no-deps {CUDA if installed(CUDA) else CPU}=={FBGEMM}"
    return INSTALL


# ------------------------------------------------------------------------------------------------- the child process

# Each stage prints one JSON line as soon as it has passed: the first one missing is the one that failed.
PROBE = """
import json, sys

def passed(stage, **facts):
    print("distmtl-probe " + json.dumps({"stage": stage, **facts}), flush=True)

import torch
cuda = torch.version.cuda
try:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
except Exception as error:
    devices = [f"unusable: {error}"]
passed("torch", threads=torch.get_num_threads(), cuda=cuda, devices=devices, gloo=torch.distributed.is_gloo_available())
import fbgemm_gpu
found = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2])).tolist()
assert found == [0, 1, 3], f"cumsum of [1, 2] is {found}"
torch.ops.fbgemm.split_embedding_codegen_lookup_rowwise_adagrad_function_pt2
passed("fbgemm", variant=fbgemm_gpu.__variant__)
import torchrec
passed("torchrec")
"""


@dataclass(frozen=True)
class Probe:
    """What importing the stack in a child process told: the facts of each stage passed, and how it ended."""

    stages: dict[str, dict]
    error: str = ""


def probe_stack() -> Probe:
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, errors="replace", timeout=PROBE_TIMEOUT
        )
    except subprocess.TimeoutExpired as expired:
        out = expired.stdout or b""  # bytes, in spite of text=True
        return Probe(read_stages(out.decode(errors="replace") if isinstance(out, bytes) else out), f"no answer in {PROBE_TIMEOUT} s")
    except OSError as error:
        return Probe({}, f"cannot start Python: {error}")
    if child.returncode < 0:
        ending = f"killed by {signal_name(-child.returncode)}"
    elif child.returncode > 0:
        ending = last_line(child.stderr) or f"exit status {child.returncode}"
    else:
        ending = ""
    return Probe(read_stages(child.stdout), ending)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_stages(text: str) -> dict[str, dict]:
    marker = "distmtl-probe "
    records = [json.loads(line.removeprefix(marker)) for line in text.splitlines() if line.startswith(marker)]
    return {record["stage"]: record for record in records}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# ------------------------------------------------------------------------------------------------------------ versions


def installed(distribution: str) -> str | None:
    """The version of an installed distribution without its local tag (`2.13.0+cpu` → `2.13.0`), or None."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterable[Finding]:
    version = sys.version_info[:2]
    inside = "in a virtual environment" if sys.prefix != sys.base_prefix else "not in a virtual environment"
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {inside}"
    if version not in PYTHONS:
        yield Finding("problem", "python", text, "use Python 3.11 or 3.12: rm -rf .venv && make install")
    elif platform.system() != "Linux":
        yield Finding("warning", "python", text, "only Linux is tested; fbgemm has no wheels for other systems")
    else:
        yield Finding("ok", "python", text)


def check_versions() -> Iterable[Finding]:
    for name, tested in TESTED.items():
        version = installed(name)
        if version is None:
            yield Finding("problem", name, "not installed", reinstall(name))
        elif minor(version) != minor(tested):
            yield Finding("warning", name, f"{version}; distmtl is tested with {tested}", reinstall(name))
        else:
            yield Finding("ok", name, version)


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


def check_fbgemm(probe: Probe) -> Iterable[Finding]:
    """Two distributions own the same files: the one installed last wins, and removing either takes the other's files along."""
    cpu, cuda = installed(CPU), installed(CUDA)
    torch = probe.stages.get("torch", {})
    if cpu and cuda:
        text = f"fbgemm-gpu {cuda} (CUDA) and fbgemm-gpu-cpu {cpu} are both installed: they overwrite each other's files"
        yield Finding("problem", "fbgemm", text, swap_fbgemm(wrong=CPU, right=CUDA) if torch.get("devices") else swap_fbgemm(CUDA, CPU))
        return
    if cuda and torch and not torch["cuda"]:
        text = f"fbgemm-gpu {cuda} is the CUDA build, torch is built for CPU"
        yield Finding("problem", "fbgemm", text, swap_fbgemm(CUDA, CPU))
        return
    name, version = (CPU, cpu) if cpu else (CUDA, cuda)
    variant = probe.stages.get("fbgemm", {}).get("variant", "")
    if version is None:
        yield Finding("problem", "fbgemm", "not installed", reinstall("fbgemm"))
    elif name == CPU and "cuda" in variant:
        text = f"{name} {version}, but the files on disk are those of a CUDA build installed over it"
        yield Finding("problem", "fbgemm", text, reinstall("fbgemm"))
    elif minor(version) != minor(FBGEMM):
        yield Finding("warning", "fbgemm", f"{name} {version}; distmtl is tested with {FBGEMM}", INSTALL)
    elif name == CPU and torch.get("devices"):
        remedy = "to train on the GPU: pip install 'distmtl[cuda]' in a venv of its own"
        yield Finding("warning", "fbgemm", f"{name} {version}: tables stay on the CPU although there is a GPU", remedy)
    else:
        yield Finding("ok", "fbgemm", f"{name} {version}")


def check_loading(probe: Probe) -> Iterable[Finding]:
    """Do the operators really load? A wrong build of fbgemm installs well and then dies at import."""
    for stage in ("torch", "fbgemm", "torchrec"):
        if stage not in probe.stages:
            clash = stage == "fbgemm" and installed(CPU) and installed(CUDA)
            remedy = "as for fbgemm above" if clash else reinstall(stage)
            yield Finding("problem", "loading", f"{stage} does not load: {probe.error or 'no answer'}", remedy)
            return
    if probe.error:  # a crash on the way out
        yield Finding("problem", "loading", f"torch, fbgemm and torchrec load, then Python dies: {probe.error}", INSTALL)
    elif not probe.stages["torch"].get("gloo"):
        yield Finding("problem", "loading", "torch was built without gloo: no training on CPU", INSTALL)
    else:
        yield Finding("ok", "loading", "torch, fbgemm operators and torchrec load")


# ------------------------------------------------------------------------------------------------------------ hardware


def check_devices(probe: Probe) -> Iterable[Finding]:
    facts = probe.stages.get("torch")
    if facts is None:
        return
    if facts["devices"]:
        unusable = any(name.startswith("unusable") for name in facts["devices"])
        remedy = "see nvidia-smi; CUDA_VISIBLE_DEVICES= trains on the CPU" if unusable else ""
        yield Finding("warning" if unusable else "ok", "devices", f"CUDA {facts['cuda']}: {', '.join(facts['devices'])}", remedy)
    elif facts["cuda"]:
        yield Finding(
            "warning", "devices", f"torch is built for CUDA {facts['cuda']} but sees no device", "see nvidia-smi; training runs on CPU"
        )
    elif shutil.which("nvidia-smi"):
        text = "CPU build of torch on a machine with an NVIDIA driver"
        yield Finding("warning", "devices", text, "to train on the GPU: pip install 'distmtl[cuda]' in a venv of its own")
    else:
        yield Finding("ok", "devices", "CPU only")


def check_threads(probe: Probe) -> Iterable[Finding]:
    cores, machine = available_cores(), os.cpu_count() or 1
    threads = probe.stages.get("torch", {}).get("threads")
    omp = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} of {machine} cores usable"
    if threads is not None:
        text += f", torch uses {threads} thread{'s' if threads > 1 else ''} per process"
    if omp:
        text += f" (OMP_NUM_THREADS={omp})"
    if threads is not None and threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}, divided by the workers on this machine when not under Ray, which sets it"
        yield Finding("warning", "threads", text, remedy)
    else:
        yield Finding("ok", "threads", text)


def check_memory() -> Iterable[Finding]:
    memory = psutil.virtual_memory()
    text = f"{gib(memory.available)} of {gib(memory.total)} available"
    limit = cgroup_memory_limit()
    free = memory.available
    if limit is not None and limit < memory.total:
        text += f", limited to {gib(limit)} by the container"
        free = min(free, limit)
    if free < 2 * GIB:
        yield Finding("warning", "memory", text, "a worker takes about 1 GiB before its tables: use fewer --workers or a larger machine")
    else:
        yield Finding("ok", "memory", text)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


# ------------------------------------------------------------------------------------------------------------- network


def check_network() -> Iterable[Finding]:
    """Gloo listens on GLOO_SOCKET_IFNAME, else on the address the host name resolves to.

    Where that is 127.x, ranks on several nodes try to reach each other at 127.0.0.1: "Gloo connectFullMesh failed … Connection
    refused", which Ray Train does not retry.
    """
    addresses = interface_addresses()
    outward = [name for name, address in addresses.items() if not is_loopback(address)]
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    several_nodes = f"on every node: export GLOO_SOCKET_IFNAME={outward[0] if outward else 'the interface that reaches the others'}"
    if chosen:
        missing = [name for name in chosen.split(",") if name not in addresses]
        if missing:
            text = f"GLOO_SOCKET_IFNAME={chosen}: no interface {missing[0]!r} here ({', '.join(addresses)})"
            yield Finding("problem", "network", text, "unset GLOO_SOCKET_IFNAME, or name one of those")
        elif all(is_loopback(addresses[name]) for name in chosen.split(",")):
            yield Finding("warning", "network", f"gloo uses {chosen}, the loopback: one machine only", several_nodes)
        else:
            yield Finding("ok", "network", f"gloo uses {chosen} ({addresses[chosen.split(',')[0]]}), from GLOO_SOCKET_IFNAME")
        return

    host = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        text = f"host name {host!r} does not resolve, gloo falls back to the loopback: fine on one machine, fails on several"
        yield Finding("warning", "network", text, several_nodes)
        return
    if is_loopback(address):
        text = f"host name {host!r} resolves to {address}: fine on one machine; over several, ranks would not find each other"
        yield Finding("warning", "network", text, several_nodes)
        return
    interface = next((name for name, own in addresses.items() if own == address), None)
    if interface is None:
        text = f"host name {host!r} resolves to {address}, which no interface here has"
        yield Finding("warning", "network", text, several_nodes)
    else:
        yield Finding("ok", "network", f"gloo uses {interface} ({address}), where the host name resolves to")


def interface_addresses() -> dict[str, str]:
    """Name → IPv4 address (IPv6 where there is no other) of every interface that is up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, str] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, entries in psutil.net_if_addrs().items():
            for entry in entries:
                if name in up and entry.family == family:
                    found.setdefault(name, entry.address.partition("%")[0])
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


# ----------------------------------------------------------------------------------------------------------------- ray


def check_ray_auth() -> Iterable[Finding]:
    """Ray 2.60 wants a token by default. It is enough to know that there is one: what it says is nobody's business."""
    mode = os.environ.get("RAY_AUTH_MODE")
    cluster = os.environ.get("RAY_ADDRESS", "")
    token = token_source()
    same = "every node and submitter needs the same token, or RAY_AUTH_MODE=disabled everywhere"
    if mode is not None and mode.lower() not in ("token", "disabled"):
        yield Finding("problem", "ray auth", f"RAY_AUTH_MODE={mode} is neither token nor disabled", "unset RAY_AUTH_MODE")
    elif mode is not None and mode.lower() == "disabled":
        yield Finding("ok", "ray auth", "disabled by RAY_AUTH_MODE: anyone who reaches the cluster's ports can run code on it")
    elif token:
        yield Finding("ok", "ray auth", f"token from {token}" + (f"; {same}" if cluster else ""))
    elif cluster and cluster != "local":
        yield Finding("problem" if mode else "warning", "ray auth", f"no token for the cluster at RAY_ADDRESS={cluster}", same)
    else:
        yield Finding("ok", "ray auth", "no token yet; a local cluster writes ~/.ray/auth_token at its first start")


def token_source() -> str | None:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return "RAY_AUTH_TOKEN_PATH" if Path(path).is_file() else None
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").is_file() else None


def check_ray_address() -> Iterable[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("ok", "ray cluster", "RAY_ADDRESS is not set: a running cluster of this machine, else a new local one")
        return
    host, _, port = address.rpartition("://")[2].rpartition("/")[2].rpartition(":")
    if address in ("auto", "local") or not port.isdigit():
        yield Finding("ok", "ray cluster", f"RAY_ADDRESS={address}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        yield Finding("ok", "ray cluster", f"RAY_ADDRESS={address} answers")
    except (OSError, OverflowError) as error:
        remedy = "start the cluster, mend the address, or unset RAY_ADDRESS to train on this machine"
        yield Finding("problem", "ray cluster", f"RAY_ADDRESS={address} does not answer: {error}", remedy)


# ------------------------------------------------------------------------------------------------------------- storage


def check_shared_memory() -> Iterable[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("warning", "/dev/shm", "missing: Ray keeps its objects on disk instead, slowly", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(shm)
    text = f"{gib(usage.free)} of {gib(usage.total)} free"
    if usage.free < GIB:
        remedy = "docker run --shm-size=8g (Kubernetes: an emptyDir with medium: Memory); ray stop frees what old clusters left"
        yield Finding("warning", "/dev/shm", text + ": too little for Ray's object store and gloo's buffers", remedy)
    else:
        yield Finding("ok", "/dev/shm", text)


def check_disk(topic: str, path: Path, elsewhere: str) -> Iterable[Finding]:
    usage = shutil.disk_usage(path)
    text = f"{gib(usage.free)} of {gib(usage.total)} free"
    if not os.access(path, os.W_OK):
        yield Finding("warning", topic, "not writable", elsewhere)
    elif usage.free < GIB // 2:
        yield Finding("problem", topic, text, f"free some space, or {elsewhere}")
    elif usage.free < 5 * GIB or usage.free < usage.total * 0.05:  # Ray stops creating objects on a disk 95 % full
        yield Finding("warning", topic, text, f"free some space, or {elsewhere}")
    else:
        yield Finding("ok", topic, text)


# ----------------------------------------------------------------------------------------------------------- the report


def diagnose() -> list[Finding]:
    probe = probe_stack()
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", check_python),
        ("versions", check_versions),
        ("fbgemm", lambda: check_fbgemm(probe)),
        ("loading", lambda: check_loading(probe)),
        ("devices", lambda: check_devices(probe)),
        ("threads", lambda: check_threads(probe)),
        ("memory", check_memory),
        ("network", check_network),
        ("ray auth", check_ray_auth),
        ("ray cluster", check_ray_address),
        ("/dev/shm", check_shared_memory),
        ("disk here", lambda: check_disk("disk here", Path.cwd(), "keep runs and data elsewhere: run.dir=…, data.train=…")),
        (
            "disk temp",
            lambda: check_disk("disk temp", Path(tempfile.gettempdir()), "point TMPDIR at a larger disk (Ray spills there)"),
        ),
    ]
    findings: list[Finding] = []
    for topic, check in checks:
        try:
            findings += check()
        except Exception as error:  # a doctor who collapses helps nobody
            findings.append(Finding("warning", topic, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def report(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8} {finding.topic:12} {finding.text}")
        if finding.remedy:
            lines.append(f"{'':21} mend: {finding.remedy}")
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    lines.append("healthy" if not problems + warnings else f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}")
    return "\n".join(lines)


def plural(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def run_doctor() -> int:
    """Print the report; 1 if anything must be mended before training, else 0."""
    findings = diagnose()
    print(report(findings))
    return int(any(finding.level == "problem" for finding in findings))
