"""follow(): training that goes on as partitions of the data arrive, a chain of ordinary runs.

RUN/partitions/000003-day=003/   the run directory of the 4th partition trained, DIR/day=003 (a / of its name becomes a comma): one epoch,
                                 from the last checkpoint of the one before, optimizer state included
RUN/follow.jsonl, result.json    a line for every partition trained, and train's result summed over them: derived from these directories

Nothing else is remembered. The position is (partition, step); a partition is trained when its result.json is there, and what an ordinary
run survives (docs/fault-tolerance.md), a followed one survives.
"""

from __future__ import annotations

import gc
import json
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from distmtl import checkpoint
from distmtl.config import Config
from distmtl.data.partitions import SEAL, Partitions, in_order
from distmtl.distributed.process import Process, on_first_rank
from distmtl.errors import DistmtlError
from distmtl.progress import Report, print_record
from distmtl.run_directory import PARTITIONS, ResumePolicy, entries_of, make_run, partition_folder, partition_runs, read_json, write_json
from distmtl.stopping import Request, asked, forget, passing_requests
from distmtl.storage import absolute, place, remove_tree, write_whole
from distmtl.tracking.trackers import require_trackers

POLL_S = 1.0
CHECKPOINTS_OF = 2  # newest partitions that keep their checkpoints
CLOCKS_S = 60.0  # that storage and workers may disagree by

Train = Callable[..., dict[str, Any]]  # loop.train, or cluster.trainer.train_on_ray
Publish = Callable[[int, str], object]  # index of the partition just trained, its checkpoint


@dataclass(frozen=True)
class Until:
    """When to end, beside being asked to; without any of these, never."""

    partitions: int | None = None  # trained in all
    idle_s: float | None = None  # passed without a new one


@dataclass(frozen=True)
class Partition:
    """One that is to be trained, or was."""

    index: int  # its place in the chain
    name: str  # its folder below DIR, such as day=003/hour=07
    continue_from: str | None  # the checkpoint of the one before
    late: bool  # its name sorts before that of one trained before it

    @property
    def folder(self) -> str:
        return partition_folder(self.index, self.name)


@dataclass
class Line:
    """A partition that was trained, as follow.jsonl has it."""

    index: int
    name: str
    late: bool
    rows: int
    steps: int
    skipped: int
    restarts: int
    seconds: float
    samples_per_second: float | None
    metrics: dict[str, Any]  # task → metric → value, of the model before it was trained on these rows; empty for the first
    checkpoint: str | None  # its last one, None once that is deleted
    began: float  # Unix time; 0 where its log could not be written
    data: str  # digest of its files when it was trained
    changed: bool = field(default=False)  # its files are others now


Choice = Partition | Literal["wait", "stop", "end"]


def follow(
    config: Config,
    source: str,
    train: Train,
    until: Until,
    *,
    resume: str = "auto",
    policy: ResumePolicy = "strict",
    report: Report = print_record,
    publish: Publish | None = None,
    process: Process | None = None,
) -> dict[str, Any]:
    """Train every sealed partition below a folder once, in name order, and wait for more. Returns result.json's object.

    Args:
        train: makes the run of one partition.
        resume: as for `train`; `never` and a path are about the whole chain, so a path gives the first partition its weights.
        publish: called when a partition was trained; after a restart once more for the newest, as nothing tells whether it was.
        process: this one's place among those that call it together, as under torchrun; by default it is alone.

    Raises:
        DistmtlError: a config that cannot be followed, or what a partition's run raises, with its name.
    """
    follower = Follower(config, source, until, resume, report, publish)
    process = process or Process(0, 1, torch.device("cpu"))
    on_first_rank(process, follower.open)
    while True:
        choice: Choice = on_first_rank(process, follower.choose)
        if choice == "wait":
            time.sleep(POLL_S)
        elif isinstance(choice, Partition):
            partition = choice
            run = follower.config_of(partition)
            how = resume if partition.index == 0 else "auto"
            with passing_requests(follower.run, place(run.run_dir)) if process.first else nullcontext():
                try:
                    result = train(run, how, report, policy=policy, continue_from=partition.continue_from)
                except DistmtlError as e:
                    raise DistmtlError(
                        f"partition {partition.name}: {e}\nWhat was trained before it is kept: once this is mended, or the partition's "
                        f"{SEAL} is taken away to leave it out, the same command goes on"
                    ) from e
            gc.collect()  # tables and process groups of its run, which hang in circles of references
            on_first_rank(process, lambda: follower.settle(partition, result))  # noqa: B023  # called at once
        else:
            return on_first_rank(process, lambda: follower.result(stopped=choice == "stop"))  # noqa: B023


class Follower:
    """What rank 0 knows of the chain, and decides."""

    def __init__(self, config: Config, source: str, until: Until, resume: str, report: Report, publish: Publish | None):
        refuse_ends(config)
        require_trackers(config)
        self.config, self.partitions, self.until, self.resume = config, Partitions(absolute(source).rstrip("/")), until, resume
        self.report, self.publish = report, publish
        self.run = place(absolute(config.run_dir))
        self.lines: list[Line] = []
        self.last: dict[str, Any] = {}  # the result of the newest partition
        self.stopped_in: dict[str, Any] | None = None  # the result of one that was stopped
        self.begun: str | None = None  # name of the one in the chain that is not trained to its end
        self.busy = time.monotonic()  # when something was last trained
        self.said: set[str] = set()
        self.seen: dict[str, float] = {}  # trained partition → time of its newest file when it was last compared

    # ------------------------------------------------------------------------------------------------------ the chain

    def open(self) -> None:
        """Make the run directory, or read the chain that it holds.

        Raises:
            DistmtlError: it is not that of a followed run.
        """
        if {"checkpoints", "metrics.jsonl"} & set(entries_of(self.run)):
            raise DistmtlError(f"run.dir {self.run} holds a run that does not follow anything; choose another run.dir")
        chain = [run.name for run in partition_runs(self.run)]
        if chain and self.resume == "never":
            raise DistmtlError(
                f"run.dir {self.run} already holds a followed run; choose another run.dir, or continue it with --resume auto"
            )
        if chain and self.resume != "auto":
            self.say(f"run.dir {self.run} holds partitions of its own, which go before --resume {self.resume}")
        make_run(self.run, self.config, PARTITIONS)
        for folder in chain:
            name = folder.partition("-")[2].replace(",", "/")
            partition, result = self.at_end(name), self.result_of(self.run / PARTITIONS / folder)
            if result and (folder != chain[-1] or self.has_checkpoint(partition, result["steps"])):
                self.add(partition, result)
            elif folder == chain[-1]:
                self.begun = name
            else:
                raise DistmtlError(f"run.dir {self.run}: {PARTITIONS}/{folder} has no result.json, but partitions after it were trained")
        self.prune(self.lines[:-CHECKPOINTS_OF])
        self.write_index()
        if self.lines:
            self.say(f"{len(self.lines)} partition(s) are trained, {self.lines[-1].name} the last")
            self.tell_publisher()

    def at_end(self, name: str) -> Partition:
        """A partition as the chain's next."""
        late = any(in_order(name) < in_order(line.name) for line in self.lines)
        return Partition(len(self.lines), name, self.lines[-1].checkpoint if self.lines else None, late)

    def result_of(self, folder: Path) -> dict[str, Any] | None:
        """What a partition's run ended with, if it did."""
        result = read_json(folder / "result.json")
        return result if result and not result["stopped"] else None

    def has_checkpoint(self, partition: Partition, step: int) -> bool:
        """Whether the newest complete checkpoint of its run is of a step."""
        found, _ = checkpoint.newest(self.run / partition.folder / "checkpoints")
        return found is not None and found.step == step

    def add(self, partition: Partition, result: dict[str, Any]) -> None:
        folder = self.run / partition.folder
        began = 0.0
        with suppress(FileNotFoundError, ValueError), (folder / "metrics.jsonl").open(encoding="utf-8") as log:
            began = json.loads(log.readline())["time"]
        found, _ = checkpoint.newest(folder / "checkpoints")
        kept = {key: result[key] for key in ("rows", "steps", "skipped", "restarts", "seconds", "samples_per_second")}
        self.lines.append(
            Line(
                **{key: getattr(partition, key) for key in ("index", "name", "late")},
                **kept,
                metrics=result["metrics"].get("unseen", {}),
                checkpoint=str(found.path) if found else None,
                began=began,
                data=result["data"]["train"],
            )
        )
        self.last = result

    def settle(self, partition: Partition, result: dict[str, Any]) -> None:
        """After a partition's run: its line, the older checkpoints deleted, the publisher told."""
        self.busy = time.monotonic()
        if result["stopped"]:
            self.stopped_in = result
            return
        self.begun = None
        self.add(partition, result)
        warmup = self.config.optimizer.schedule.warmup_steps
        if partition.index == 0 and result["steps"] < warmup:
            self.say(f"the warm-up of {warmup} steps ended with the first partition, after {result['steps']}")
        self.prune(self.lines[:-CHECKPOINTS_OF][-1:])
        self.write_index()
        self.tell_publisher()

    def prune(self, lines: list[Line]) -> None:
        for line in lines:
            remove_tree(self.run / partition_folder(line.index, line.name) / "checkpoints")
            line.checkpoint = None

    def write_index(self) -> None:
        write_whole(self.run / "follow.jsonl", "".join(json.dumps(asdict(line)) + "\n" for line in self.lines))

    def tell_publisher(self) -> None:
        newest = self.lines[-1]
        if self.publish and newest.checkpoint:
            self.publish(newest.index, newest.checkpoint)

    def config_of(self, partition: Partition) -> Config:
        """The config of one partition's run. The first keeps run.seed, so that its initial weights are those of any run of that seed;
        the others draw the order of rows, dropout and id_dropout by (run.seed, name)."""
        config, optimizer = self.config, self.config.optimizer
        seed = config.run.seed
        if partition.index > 0:
            seed = zlib.crc32(f"{seed}/{partition.name}".encode()) >> 1
            optimizer = optimizer.model_copy(update={"schedule": optimizer.schedule.model_copy(update={"warmup_steps": 0})})
        run = config.run.model_copy(update={"dir": str(self.run / partition.folder), "seed": seed})
        data = config.data.model_copy(update={"train": f"{self.partitions.folder}/{partition.name}"})
        return config.model_copy(update={"data": data, "optimizer": optimizer, "run": run})

    def result(self, stopped: bool) -> dict[str, Any]:
        """result.json: the newest partition's, with sums over all of them."""
        forget(self.run, Request.STOP)
        results: list[dict[str, Any]] = [*map(asdict, self.lines), *([self.stopped_in] if self.stopped_in else [])]
        newest = self.stopped_in or self.last
        sums = {key: sum(r[key] for r in results) for key in ("rows", "steps", "skipped", "restarts")}
        paced = [(r["rows"], r["samples_per_second"]) for r in results if r["samples_per_second"]]
        result = {
            **newest,
            "run_dir": str(self.run),
            "partitions": len(self.lines),
            "epochs": 1.0,
            **sums,
            "seconds": round(sum(r["seconds"] for r in results), 3),
            "samples_per_second": round(sum(n for n, _ in paced) / sum(n / s for n, s in paced), 1) if paced else None,
            "best_step": None,
            "best_value": None,
            "stopped": stopped,
            "metrics": newest.get("metrics", {}),
        }
        write_json(self.run / "result.json", result)
        return result

    # --------------------------------------------------------------------------------------------------- what is next

    def choose(self) -> Choice:
        """The next partition to train, or what else to do.

        Raises:
            DistmtlError: the source cannot be listed, or its partitions lie in each other.
        """
        if self.stopped_in or asked(self.run) == Request.STOP:
            return "stop"
        if self.until.partitions is not None and len(self.lines) >= self.until.partitions:
            return "end"
        sealed, misnamed = self.partitions.sealed()
        for folder in misnamed:
            self.say(f"{folder} is sealed but not named key=value (such as day=003): it is no partition", once=True)
        self.look_back(sealed)
        trained = {line.name for line in self.lines}
        if self.begun:
            self.keep_or_undo(self.begun, sealed)
        name = self.begun or min(sealed.keys() - trained, key=in_order, default=None)
        if name is None:
            if self.until.idle_s is not None and time.monotonic() - self.busy > self.until.idle_s:
                return "end"
            self.say(
                f"waiting for a partition in {self.partitions.folder}" + (f", after {self.lines[-1].name}" if self.lines else ""), once=True
            )
            return "wait"
        partition = self.at_end(name)
        late = f"; it is late: {max((line.name for line in self.lines), key=in_order)} was trained before it" if partition.late else ""
        self.say(f"partition {name}, number {len(self.lines) + 1} of the run{late}")
        forget(self.run / partition.folder, *Request)  # of a process that was killed
        self.begun = name
        return partition

    def look_back(self, sealed: dict[str, float]) -> None:
        """Say which partitions have changed since they were trained: those with newer files, if they make another data set."""
        for line in self.lines:
            newest = sealed.get(line.name, 0.0)
            if line.changed or newest < line.began - CLOCKS_S or self.seen.get(line.name) == newest:
                continue
            self.seen[line.name] = newest
            if self.partitions.digest(line.name) != line.data:
                line.changed = True
                self.say(
                    f"partition {line.name} has changed since it was trained: what is new in it is not trained; write it to a partition of "
                    "its own"
                )
                self.write_index()

    def keep_or_undo(self, name: str, sealed: dict[str, float]) -> None:
        """A partition that was begun goes on, unless its rows are no longer those that it began with."""
        folder = self.run / self.at_end(name).folder
        found, _ = checkpoint.newest(folder / "checkpoints")
        if name not in sealed:
            self.say(f"partition {name} is no longer sealed: it is left out, and what was trained of it undone")
            self.begun = None
        elif found and found.manifest["data"]["digest"] != self.partitions.digest(name):
            self.say(f"partition {name} has changed since it was begun: it is trained anew from its start")
        elif (folder / "config.yaml").exists():
            return
        remove_tree(folder)

    def say(self, text: str, once: bool = False) -> None:
        if not once or text not in self.said:
            self.report({"kind": "note", "time": round(time.time(), 3), "text": text})
        if once:
            self.said.add(text)


def refuse_ends(config: Config) -> None:
    """Of settings that need to know the end of the data, or would leave rows out.

    Raises:
        DistmtlError: all of them.
    """
    train, decay = config.train, config.optimizer.schedule.decay
    mistakes = []
    if decay != "none":
        mistakes.append(f"optimizer.schedule.decay is {decay}: it needs to know the last step, and there is none; set it to none")
    if train.epochs != 1:
        mistakes.append(f"train.epochs is {train.epochs}: every partition is trained once; set it to 1")
    if train.steps is not None:
        mistakes.append(f"train.steps is {train.steps}: it would leave out rows of every partition; take it away, or end with --partitions")
    if train.early_stopping:
        mistakes.append("train.early_stopping would leave out rows of a partition; take it away")
    if mistakes:
        raise DistmtlError("this config cannot be followed:\n" + "\n".join(f"  - {m}" for m in mistakes))
