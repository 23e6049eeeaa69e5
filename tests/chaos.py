"""Random failures against one training run on a cluster of several nodes in network namespaces. Needs root and `ip`.

    make chaos                                              # 24 failures on two fixed workers, then 24 on one or two (elastic)
    .venv/bin/python tests/chaos.py --failures 6 --seed 3 --workers 1-2

Every row must be trained exactly once per epoch in the course that counts, and the metrics of the end be those of an undisturbed run:
equal where the number of workers is fixed, else no further apart than runs of three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recording
import tiny
import yaml
from worlds import train_world

from distmtl import checkpoint
from distmtl.config_file import load_config

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "launch" / "local_cluster.sh"
KINDS = ("worker", "node", "driver", "hang", "truncate", "exception", "oom", "drain", "cut")
NODE_ID = """
import ray, sys
ray.init(logging_level="ERROR", log_to_driver=False)
print(next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == sys.argv[1]))
"""
STEPS_BETWEEN = (30, 120)  # steps that are trained before the next failure
SAVE_EVERY, LOG_EVERY, STEPS_PER_EPOCH = 20, 5, 24
MEMORY = Path("/sys/fs/cgroup/memory")


@dataclass
class Failure:
    """One failure: what, when, and what it cost."""

    kind: str
    step: int  # the last step logged before it
    resumed: int = 0
    seconds: float = 0.0  # from the failure to the first logged step after it
    workers: int = 0  # in the next attempt


@dataclass
class Chaos:
    """A run, its cluster, and what was done to it."""

    folder: Path
    workers: str
    steps: int
    seed: int
    say: Callable[[str], None] = print
    failures: list[Failure] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.nodes: list[int] = []
        self.run, self.log, self.config = self.folder / "run", self.folder / "log", self.folder / "config.yaml"
        self.env = {
            **os.environ, "NETNS": "chaos", "SUBNET": "10.78.0.0/24", "CLUSTER_DIR": str(self.folder / "cluster"), "PYTHONPATH": str(HERE),
            "RAY_TEMP_DIR": tempfile.mkdtemp(prefix="ray"), "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        self.env.pop("RAY_ADDRESS", None)
        tiny.write(self.folder / "data")
        train = {
            "global_batch_size": 128,
            "epochs": 10**6,
            "steps": self.steps,
            "log_every": LOG_EVERY,
            "save_every": SAVE_EVERY,
            "eval_every": 240,
        }
        cluster = {"max_failures": 5, "collective_timeout_s": 15, "resize_every_s": 5}
        raw = tiny.raw(self.folder / "data", self.run, train=train, cluster=cluster)
        self.config.write_text(yaml.safe_dump(recording.recorded(raw, self.log)))

    # ------------------------------------------------------------------------------------------------ cluster and run

    def cluster(self, *arguments: object) -> str:
        done = subprocess.run([str(SCRIPT), *map(str, arguments)], env=self.env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def add_node(self) -> None:
        self.nodes.append(int(self.cluster("add", 1).split()[1].rstrip(":")))

    def submit(self) -> None:
        command = [str(SCRIPT), "run", sys.executable, "-m", "distmtl", "train", str(self.config), "--workers", self.workers]
        with (self.folder / "out").open("ab") as out:
            self.process = subprocess.Popen(command, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def records(self, kind: str) -> list[dict[str, Any]]:
        log = self.run / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line) for line in lines if line.startswith(f'{{"kind": "{kind}"')]

    def wait(self, what: str, done: Callable[[], bool], within: float = 180) -> None:
        assert self.process is not None
        deadline = time.monotonic() + within
        while not done():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode} before {what}\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {what} within {within:g} s\n{self.tail()}"
            time.sleep(0.05)

    def tail(self) -> str:
        return "\n".join((self.folder / "out").read_text(errors="replace").splitlines()[-40:])

    def step(self) -> int:
        last = self.records("train")[-1:]
        return last[0]["step"] if last else 0

    def worker(self) -> int:
        """The process of a random rank."""
        return int(self.random.choice(self.records("start")[-1]["workers"]).rsplit(" ", 1)[1])

    # ------------------------------------------------------------------------------------------------------- failures

    def fail(self, kind: str) -> None:
        """Do it, wait until the run trains again, and note what it cost."""
        starts, step, began = len(self.records("start")), self.step(), time.time()
        getattr(self, f"do_{kind}")()
        self.wait(f"new attempt after {kind} at step {step}", lambda: len(self.records("start")) > starts)
        self.wait(f"step after {kind}", lambda: self.records("train")[-1]["time"] > self.records("start")[-1]["time"])
        start = self.records("start")[starts]
        first = next(r for r in self.records("train") if r["time"] > start["time"])
        self.failures.append(Failure(kind, step, start["step"], first["time"] - began, start["world_size"]))
        f = self.failures[-1]
        lost = max(f.step - f.resumed, 0)
        self.say(
            f"{len(self.failures):3}  {kind:10} at step {f.step:5}, {lost:3} lost, {f.workers} worker(s) again after {f.seconds:5.1f} s"
        )

    def do_worker(self) -> None:
        os.kill(self.worker(), signal.SIGKILL)

    def do_hang(self) -> None:
        os.kill(self.worker(), signal.SIGSTOP)

    def do_exception(self) -> None:
        (self.log / f"{recording.RAISE}-{self.worker()}").touch()

    def do_oom(self) -> None:
        """The kernel's own OOM killer, in a memory cgroup that is too small for what the worker asks for."""
        pid, group = self.worker(), MEMORY / f"chaos-{os.getpid()}"
        if not os.access(MEMORY / "cgroup.procs", os.W_OK):
            return os.kill(pid, signal.SIGKILL)  # all that an OOM killer does
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(200 << 20))
        (group / "cgroup.procs").write_text(str(pid))
        (self.log / f"{recording.HOG}-{pid}").touch()
        return None

    def do_truncate(self) -> None:
        """The newest checkpoint loses the end of its largest file."""
        os.kill(self.worker(), signal.SIGKILL)
        time.sleep(0.5)  # whatever was being written is written, or never will be
        newest, _ = checkpoint.newest(self.run / "checkpoints")
        if newest:
            file = max(newest.path.iterdir(), key=lambda f: f.stat().st_size)
            os.truncate(file, file.stat().st_size // 2)

    def do_driver(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.submit()

    def do_node(self) -> None:
        """A machine is gone with all it ran; a new one comes. An elastic run shrinks at once, and grows again."""
        starts = len(self.records("start"))
        lost = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster("kill", lost)
        if "-" in self.workers:
            self.wait("smaller world", lambda: len(self.records("start")) > starts and self.step() >= self.records("start")[-1]["step"])
        self.add_node()
        if "-" in self.workers:
            self.wait("larger world", lambda: self.records("start")[-1]["world_size"] == 2)

    def do_cut(self) -> None:
        """A machine's network goes silent: no connection is closed, nothing answers. A new one comes; the old one stays away."""
        starts = len(self.records("start"))
        lost = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster("cut", lost)
        self.add_node()
        self.wait("attempt without the silent node", lambda: len(self.records("start")) > starts)
        self.cluster("kill", lost)

    def do_drain(self) -> None:
        """A preemption notice, the replacement there already: nothing must be lost."""
        starts = len(self.records("start"))
        leaving = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.add_node()
        node = self.cluster("run", sys.executable, "-c", NODE_ID, f"10.78.0.{leaving + 1}").split()[-1]
        ray = Path(sys.executable).parent / "ray"
        why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos", "--deadline-remaining-seconds", 60)
        self.cluster("run", ray, "drain-node", "--node-id", node, *why)
        self.wait("move away from the leaving node", lambda: len(self.records("start")) > starts)
        self.cluster("kill", leaving)

    # ----------------------------------------------------------------------------------------------------------- whole

    def go(self, kinds: list[str]) -> dict[str, Any]:
        """All failures, then the run to its end; its result."""
        try:
            self.cluster("start", 0)
            for _ in range(2):
                self.add_node()
            self.submit()
            for kind in kinds:
                goal = self.step() + self.random.randint(*STEPS_BETWEEN)
                self.wait("progress", lambda goal=goal: self.step() >= goal)
                self.fail(kind)
            assert self.process is not None
            self.wait("last step", lambda: self.step() >= self.steps, within=600)
            assert self.process.wait(timeout=120) == 0, self.tail()
        finally:
            if self.process and self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            subprocess.run([str(SCRIPT), "stop"], env=self.env, capture_output=True, timeout=120, check=False)
            group = MEMORY / f"chaos-{os.getpid()}"
            if group.exists():
                group.rmdir()
        return json.loads((self.run / "result.json").read_text())

    def check(self, result: dict[str, Any]) -> None:
        """Every row once, and the metrics of an undisturbed run."""
        steps = recording.course(self.run, self.log)
        recording.assert_every_row_once(steps, tiny.ROWS["train"], STEPS_PER_EPOCH, self.steps)
        self.say(f"every one of {tiny.ROWS['train']:,} rows exactly once in each of {self.steps // STEPS_PER_EPOCH} epochs")
        here = self.last_metrics(self.run)
        undisturbed = [self.undisturbed(seed) for seed in ((0, 1, 2) if "-" in self.workers else (0,))]
        if len(undisturbed) == 1:
            assert here == undisturbed[0], "the last step's metrics are not the undisturbed run's"
            assert result["metrics"] == json.loads((self.folder / "undisturbed-0" / "result.json").read_text())["metrics"]
            self.say("metrics of the last and of the best step equal, to the last digit, to the undisturbed run's")
            return
        for task in ("click", "conversion"):
            aucs, auc = [u[task]["auc"] for u in undisturbed], here[task]["auc"]
            spread = max(aucs) - min(aucs)
            self.say(f"{task}: AUC at the last step {auc:.5f}, undisturbed {aucs[0]:.5f}, spread of three seeds {spread:.5f}")
            assert abs(auc - aucs[0]) <= spread

    def last_metrics(self, run: Path) -> dict[str, Any]:
        """Of the last step, not of the best one: that may lie before every failure."""
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [r["metrics"] for r in records if r["kind"] == "evaluation" and r["step"] == self.steps][-1]

    def undisturbed(self, seed: int) -> dict[str, Any]:
        folder = self.folder / f"undisturbed-{seed}"
        train_world(load_config(self.config, [f"run.dir={folder}", f"run.seed={seed}"]), 2, timeout_s=900)
        return self.last_metrics(folder)

    def summary(self) -> str:
        """Markdown: per kind, how often, lost steps and recovery times."""
        lines = ["| failure | times | steps lost, median (max) | seconds to the next logged step, median (max) |", "|---|---|---|---|"]
        for kind in dict.fromkeys(f.kind for f in self.failures):
            of = [f for f in self.failures if f.kind == kind]
            lost, seconds = [max(f.step - f.resumed, 0) for f in of], [f.seconds for f in of]
            cost = f"{statistics.median(lost):g} ({max(lost)}) | {statistics.median(seconds):.1f} ({max(seconds):.1f})"
            lines.append(f"| {kind} | {len(of)} | {cost} |")
        return "\n".join(lines)


def shuffled_kinds(failures: int, seed: int) -> list[str]:
    """Every kind as often as any other, in random order."""
    kinds = (list(KINDS) * (failures // len(KINDS) + 1))[:failures]
    random.Random(seed).shuffle(kinds)
    return kinds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--failures", type=int, default=24)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", default="2", help="2 (fixed) or 1-2 (elastic)")
    a = p.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    chaos = Chaos(folder, a.workers, steps=a.failures * 150 + 300, seed=a.seed, say=lambda text: print(text, flush=True))
    print(f"{a.failures} failures, {a.workers} worker(s), seed {a.seed}, in {folder}; load {os.getloadavg()[0]:.1f}", flush=True)
    result = chaos.go(shuffled_kinds(a.failures, a.seed))
    print(f"{result['restarts']} restarts", flush=True)
    chaos.check(result)
    print(chaos.summary())


if __name__ == "__main__":
    main()
