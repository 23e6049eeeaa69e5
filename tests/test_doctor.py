import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distmtl import doctor
from distmtl.doctor import Finding, Probe, diagnose, report, run_doctor

REPOSITORY = Path(__file__).parents[1]
HEALTHY = Probe(
    {
        "torch": {"threads": 1, "cuda": None, "devices": [], "gloo": True},
        "fbgemm": {"variant": "cpu"},
        "torchrec": {},
    }
)
MEND_CLASH = "pip uninstall -y fbgemm-gpu && {pip} install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"


@pytest.fixture
def probe(monkeypatch):
    """Lets a test say what the child process found, and takes this machine's environment out of the picture."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def set_probe(found: Probe) -> None:
        monkeypatch.setattr(doctor, "probe_stack", lambda: found)

    set_probe(HEALTHY)
    return set_probe


@pytest.fixture
def distributions(monkeypatch):
    """Lets a test say which distributions are installed; the others stay as they are."""
    real = doctor.installed

    def set_distributions(**versions: str | None) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(doctor, "installed", lambda name: known[name] if name in known else real(name))

    return set_distributions


def about(topic: str) -> Finding:
    found = [finding for finding in diagnose() if finding.topic == topic]
    assert len(found) == 1, found
    return found[0]


def test_this_environment_is_healthy(monkeypatch, capsys):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert run_doctor() == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "torch, fbgemm operators and torchrec load" in out
    assert "problem " not in out


def test_both_fbgemms_installed(probe, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "fbgemm_gpu-1.8.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: fbgemm-gpu\nVersion: 1.8.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_doctor() == 1
    out = capsys.readouterr().out
    assert "fbgemm-gpu 1.8.0 (CUDA) and fbgemm-gpu-cpu 1.8.0 are both installed" in out
    assert MEND_CLASH.format(pip=doctor.pip()) in out
    assert "Traceback" not in out


def test_both_fbgemms_on_a_gpu_keep_the_cuda_one(probe, distributions):
    probe(Probe({**HEALTHY.stages, "torch": {"threads": 1, "cuda": "13.0", "devices": ["H100"], "gloo": True}}))
    distributions(fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0")
    assert "uninstall -y fbgemm-gpu-cpu && " in about("fbgemm").remedy


def test_cuda_fbgemm_under_cpu_torch(probe, distributions):
    distributions(fbgemm_gpu="1.8.0", fbgemm_gpu_cpu=None)
    finding = about("fbgemm")
    assert finding.level == "problem"
    assert MEND_CLASH.format(pip=doctor.pip()) in finding.remedy


def test_files_left_by_the_cuda_build(probe):
    probe(Probe({**HEALTHY.stages, "fbgemm": {"variant": "cuda"}}))
    finding = about("fbgemm")
    assert finding.level == "problem"
    assert finding.remedy.endswith("install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0")


def test_missing_torchrec_is_installed_alone(probe, distributions):
    distributions(torchrec=None)
    assert about("torchrec").remedy.endswith("install --no-deps torchrec==1.8.0")


def test_another_release_is_a_warning(probe, distributions):
    distributions(ray="2.61.0")
    assert about("ray") == Finding("warning", "ray", "2.61.0; distmtl is tested with 2.60.0", doctor.INSTALL)


@pytest.mark.parametrize(
    ("body", "stage", "words"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "fbgemm", "ImportError: undefined symbol: _ZN3c10"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "fbgemm", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "fbgemm", "no answer in 3 s"),
    ],
)
def test_a_crash_of_fbgemm_is_a_finding(body, stage, words, tmp_path, monkeypatch):
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text(body)
    (tmp_path / "torch.py").write_text(  # the real one takes seconds
        "class cuda: is_available = staticmethod(lambda: False)\n"
        "class version: cuda = None\n"
        "class distributed: is_gloo_available = staticmethod(lambda: True)\n"
        "get_num_threads = lambda: 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT", 3 if "3 s" in words else 60)
    assert about("loading") == Finding("problem", "loading", f"{stage} does not load: {words}", doctor.reinstall("fbgemm"))


def test_more_threads_than_cores(probe, monkeypatch):
    monkeypatch.setattr(doctor, "available_cores", lambda: 2)
    probe(Probe({**HEALTHY.stages, "torch": {**HEALTHY.stages["torch"], "threads": 64}}))
    assert about("threads").level == "warning"
    assert "export OMP_NUM_THREADS=2" in about("threads").remedy


INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.7"}


@pytest.mark.parametrize(
    ("chosen", "resolved", "level", "words"),
    [
        (None, "127.0.1.1", "warning", "resolves to 127.0.1.1: fine on one machine"),
        (None, "10.0.0.7", "ok", "gloo uses eth0 (10.0.0.7)"),
        (None, "10.9.9.9", "warning", "which no interface here has"),
        (None, None, "warning", "does not resolve"),
        ("eth0", "127.0.1.1", "ok", "gloo uses eth0 (10.0.0.7), from GLOO_SOCKET_IFNAME"),
        ("lo", "10.0.0.7", "warning", "the loopback"),
        ("eth9", "10.0.0.7", "problem", "no interface 'eth9' here (lo, eth0)"),
    ],
)
def test_the_interface_gloo_would_use(probe, monkeypatch, chosen, resolved, level, words):
    def getaddrinfo(host, port):
        if resolved is None:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolved, 0))]

    if chosen:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    monkeypatch.setattr(doctor, "interface_addresses", lambda: INTERFACES)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    finding = about("network")
    assert finding.level == level
    assert words in finding.text
    if level == "warning":
        assert "export GLOO_SOCKET_IFNAME=eth0" in finding.remedy


def test_ray_auth(probe, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert "no token yet" in about("ray auth").text
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("hush")
    assert about("ray auth").text == "token from ~/.ray/auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    assert "hush" not in report(diagnose())
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert about("ray auth").text.startswith("disabled")
    monkeypatch.setenv("RAY_AUTH_MODE", "tokn")
    assert about("ray auth").level == "problem"


def test_a_cluster_that_does_not_answer(probe, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert about("ray cluster").level == "problem"


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "http://127.0.0.1:{port}"])
def test_a_cluster_that_answers(probe, monkeypatch, address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", address.format(port=server.getsockname()[1]))
        assert about("ray cluster").level == "ok"


@pytest.mark.parametrize("address", ["auto", "local", "nonsense", "ray://", ":::", "http://[::1"])
def test_odd_addresses_do_not_confuse_it(probe, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert about("ray cluster").level in ("ok", "warning", "problem")


def test_a_full_disk(probe, monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"total": 100 * doctor.GIB, "used": 0, "free": 1000})())
    assert run_doctor() == 1
    assert re.search(r"problem +disk here", capsys.readouterr().out)


def test_a_check_that_fails_is_a_finding(probe, monkeypatch):
    def broken():
        raise PermissionError("no")

    monkeypatch.setattr(doctor.psutil, "virtual_memory", broken)
    assert about("memory") == Finding("warning", "memory", "could not be examined: PermissionError: no")


def test_importing_the_doctor_imports_nothing_that_may_be_broken():
    code = "import distmtl.doctor, sys; print([name for name in ('torch', 'fbgemm_gpu', 'torchrec', 'ray') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=REPOSITORY).strip() == "[]"


def test_versions_agree_with_the_constraints():
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED
    assert pinned["fbgemm-gpu-cpu"] == doctor.FBGEMM
    assert "fbgemm-gpu" not in pinned
