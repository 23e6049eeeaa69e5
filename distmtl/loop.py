"""train(): the one training loop. It knows nothing of Ray: a launcher gives it its process group and a `report`."""

from __future__ import annotations

import json
import os
import resource
import socket
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distmtl import checkpoint
from distmtl.changes import changes, same_model
from distmtl.config import Config
from distmtl.data.collate import Collator
from distmtl.data.dataset import Dataset
from distmtl.data.hashing import HASH_VERSION
from distmtl.data.output import SPLITS
from distmtl.data.reader import Reader, decoding_threads
from distmtl.data.schema import kinds_of, served_columns
from distmtl.data.splits import open_splits
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.plan import plan_json, plan_text
from distmtl.distributed.process import Process, gather_texts, on_first_rank, process_group
from distmtl.distributed.sharding import dense_parameters, shard, step_counters
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate_split
from distmtl.health import Health
from distmtl.judge import Judge
from distmtl.meter import Meter
from distmtl.metrics import better, select
from distmtl.model.loss import StepNumbers
from distmtl.model.multitask import TrainModel, initialise_dense
from distmtl.optim import Optimizers
from distmtl.pipeline import Queued, make_pipeline
from distmtl.progress import Progress, Report, print_record
from distmtl.run_directory import ResumePolicy, is_own, open_run, write_json
from distmtl.saving import Saver
from distmtl.stopping import GivenUp, Request, asked, forget, steps_between_looks
from distmtl.storage import absolute, place, write_whole
from distmtl.tracking.trackers import require_trackers
from distmtl.versions import git_commit, versions


@dataclass
class LoopState:
    """What the loop must remember over a restart, beside weights and optimizer state."""

    step: int = 0  # steps made; also the position in the data
    rows: int = 0
    seconds: float = 0.0  # of training, over all attempts
    skipped: int = 0
    monitor: str = ""  # what best means
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_best: int = 0
    unseen: dict[str, dict[str, Any]] = field(default_factory=dict)  # metrics of the training set before its first step


def train(
    config: Config,
    resume: str = "auto",
    report: Report = print_record,
    checked: bool = False,
    policy: ResumePolicy = "strict",
    continue_from: str | None = None,
) -> dict[str, Any]:
    """Train in this process, or as one rank under torchrun or Ray. Returns result.json's object.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint to start from (run_directory.open_run).
        report: called on rank 0 with every record of progress.
        checked: the data was checked by who calls, a moment ago; only its footers are read again.
        policy: `matching` takes over the part of a checkpoint that fits a changed model, and says what does not.
        continue_from: the checkpoint of another run whose training goes on here on other data: all of its state but the position.
            The model is measured on these data first (progressive validation: Blum, Kalai and Langford 1999).

    Raises:
        DistmtlError: what a retry cannot mend; on every rank.
    """
    require_trackers(config)
    with process_group(config) as process:
        splits = on_first_rank(process, lambda: open_splits(config, checked))
        found, notes = on_first_rank(process, lambda: open_run(config, resume, splits["train"], policy, continue_from))
        progress, run = Progress(place(config.run_dir), process.first, report, config), None
        try:
            run = Training(config, process, splits, progress)
            run.start(found, notes, policy, goes_on=continue_from is not None)
            if complete := run.former_result():
                return complete
            if continue_from and run.state.step == 0:
                run.measure_unseen()
            try:
                run.train()
                result = run.finish()
            except DistmtlError:  # all ranks raise it, so all can complete the checkpoint on its way
                with suppress(DistmtlError, RuntimeError):  # the first error is the one to tell
                    run.saver.wait()
                raise
            run.saver.close()
            return result
        except DistmtlError as e:
            if progress.begun:  # else the run directory is as good as new, for another config too
                progress.say("stopped" if isinstance(e, GivenUp) else "failed", step=run.state.step if run else 0, text=str(e))
            raise
        finally:
            progress.close()


class Training:
    """A run in progress on one rank: model, optimizers, pipeline, and where they are."""

    def __init__(self, config: Config, process: Process, splits: dict[str, Dataset], progress: Progress):
        self.config, self.process, self.splits, self.progress = config, process, splits, progress
        self.folder = place(config.run_dir)
        self.state = LoopState(monitor=config.train.monitor)
        self.reader = train_reader(config, splits["train"], process)
        self.total_steps = min(self.reader.steps_per_epoch * config.train.epochs, config.train.steps or 2**62)
        torch.manual_seed(config.run.seed)  # for what a head of the user's draws itself
        self.train_model = TrainModel(config, process.device)
        initialise_dense(self.train_model, config.run.seed)
        self.model, self.planned = shard(self.train_model, config, process)
        self.optimizers = Optimizers(
            config.optimizer,
            self.model.fused_optimizer,
            dense_parameters(self.model, self.planned),
            self.total_steps,
            trained=lambda: self.train_model.loss.trained,
            counters=step_counters(self.model),
        )
        self.pipeline = make_pipeline(self.model, self.optimizers, process.device)
        self.judge = Judge(config, self.folder, splits, process, self.train_model.model, self.pipeline)
        self.restarts = 0
        self.queued: Queued | None = None  # the newest step, not looked at yet
        self.asked: Request | None = None  # what the run was last asked to do
        self.look_at = 0  # step at which to look for such a request
        self.meter = Meter(len(self.train_model.loss.terms.names), process.device)
        self.health = Health(config, self.train_model.loss.terms, self.train_model.model.head.mixture, process.device)
        self.measured: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}  # metrics of the step just evaluated

    def start(self, found: checkpoint.Checkpoint | None, notes: list[str], policy: ResumePolicy = "strict", goes_on: bool = False) -> None:
        """Load the checkpoint, if there is one, and say what is about to happen.

        Args:
            goes_on: another run's checkpoint is loaded with the state of its training, not as weights to start from.
        """
        own = found is not None and is_own(found, self.config)
        goes_on = goes_on or own
        changed = found is not None and policy == "matching" and not same_model(self.config, found)
        if found and changed:
            optimizers = self.optimizers if goes_on else None
            notes = notes + checkpoint.load_matching(found, self.model, optimizers, changes(self.config, found, self.splits["train"]))
        elif found and own:
            found = self._load_newest(found, notes)
        elif found and goes_on:
            checkpoint.load(found, self.model, self.optimizers)
        elif found:
            checkpoint.load_weights(found, self.model)
        if found and own:
            self.state = LoopState(**found.manifest["loop"])
            if self.state.monitor != self.config.train.monitor or changed:  # the best so far was another kind of best
                self.state = replace(
                    self.state, monitor=self.config.train.monitor, best_step=None, best_value=None, evaluations_without_best=0
                )
        self.restarts = on_first_rank(self.process, lambda: _count_starts(self.progress.log))
        if self.process.first:
            write_json(self.folder / "plan.json", plan_json(self.planned, self.process.world_size))
            write_whole(self.folder / "plan.txt", plan_text(self.planned, self.process.world_size) + "\n")
        for note in notes:
            self.progress.say("note", step=self.state.step, text=note)
        workers = gather_texts(self.process, f"rank {self.process.rank}: {socket.gethostname()} pid {os.getpid()}")
        self.progress.say(
            "start",
            step=self.state.step,
            text=self._introduction(found, goes_on),
            world_size=self.process.world_size,
            workers=workers,
            restarts=self.restarts,
            rows=self.state.rows,
        )
        self.saver = Saver(
            self.folder / "checkpoints",
            self.model,
            self.optimizers,
            self.process,
            attempt=self.restarts,
            background=self.config.train.save_in_background,
            keep=self.config.train.keep,
        )

    def _load_newest(self, found: checkpoint.Checkpoint, notes: list[str]) -> checkpoint.Checkpoint:
        """Load it, or the newest older one that can be loaded. Sizes were right; whether the bytes are shows now.

        Raises:
            DistmtlError: none can be.
        """
        try:
            checkpoint.load(found, self.model, self.optimizers)
            return found
        except DistmtlError as e:
            older, passed = on_first_rank(self.process, lambda: checkpoint.newest(self.folder / "checkpoints", before=found))
            if older is None:
                raise
            notes += [str(e), *passed]
        return self._load_newest(older, notes)

    def train(self) -> None:
        config, state, last = self.config.train, self.state, self.total_steps
        eval_every = config.eval_every or self.reader.steps_per_epoch
        self.meter = Meter(len(self.train_model.loss.terms.names), self.process.device)  # model building and loading are no training time
        batches = self.meter.timed(self.reader.batches(state.step, last))
        self.model.train()
        with self._profiler() as profiler:
            while state.step < last and not self.stops_early and not self.stopped:
                self.optimizers.set_step(state.step)
                seed_dropout(self.config.run.seed, state.step, self.process.rank)
                numbers: StepNumbers = self.pipeline.progress(batches)
                assert numbers.step == state.step, f"trained batch {numbers.step} at step {state.step}"
                self._refuse_bad()
                self.queued = Queued(numbers)
                if self.process.device.type == "cpu":
                    self._refuse_bad()
                self.meter.add(numbers)
                self.health.add(numbers)
                self._count()
                if profiler:
                    profiler.step()

                ending = state.step == last
                if state.step % config.log_every == 0 or ending:
                    self._log()
                evaluating = "validation" in self.splits and (state.step % eval_every == 0 or ending)
                failure = self._evaluate() if evaluating else None
                self.asked = None if ending or self.stops_early else self._look()
                if evaluating or ending or self.asked or state.step % (config.save_every or eval_every) == 0:
                    self._save()
                self._say_saved()
                if failure:
                    raise failure
        batches.close()
        self.saver.wait()
        self._say_saved()

    @property
    def stopped(self) -> bool:
        """Asked to end before the last step. Not part of the state: a continued run goes on."""
        return self.asked in (Request.STOP, Request.MOVE)

    @property
    def stops_early(self) -> bool:
        stopping = self.config.train.early_stopping
        return stopping is not None and self.state.evaluations_without_best >= stopping.patience

    def former_result(self) -> dict[str, Any] | None:
        """What the run ended with, if it is already at its end."""
        if self.state.step < self.total_steps and not self.stops_early:
            return None
        file = self.folder / "result.json"
        result = on_first_rank(self.process, lambda: json.loads(file.read_text()) if file.exists() else None)
        if (
            result
            and result["steps"] == self.state.step
            and not result["stopped"]
            and result["metrics"].keys() >= self.splits.keys() - {"train"}
            and result.get("calibration", {}) == self.judge.calibrations
        ):
            self.progress.say("note", step=self.state.step, text="this run is complete: its result is in result.json")
            self.progress.say("end", step=self.state.step, result=result)
            return result
        return None

    def measure_unseen(self) -> None:
        """Measure the training set before it is trained. What cannot be measured yet, such as a new domain, is said, and trained."""
        try:
            loss, metrics = evaluate_split(self.train_model.model, self.splits["train"], self.config, self.process)
        except DistmtlError as e:
            self.progress.say("note", step=0, text=f"not measured before it is trained: {e}")
            return
        self.state.unseen = metrics
        self.progress.say("evaluation", step=0, of=self.total_steps, split="unseen", loss=loss, metrics=metrics)

    def finish(self) -> dict[str, Any]:
        """Calibrate and evaluate the best checkpoint, write result.json. A stopped run ends without: there may be little time left."""
        state, process = self.state, self.process
        if not self.stopped and state.best_step is not None and state.best_step != state.step:
            best_step = state.best_step
            best = on_first_rank(process, lambda: checkpoint.of_step(self.folder / "checkpoints", best_step))
            checkpoint.load(best, self.model, self.optimizers)
            self.progress.say("note", step=state.step, text=f"evaluating the best checkpoint, of step {state.best_step}")
        metrics = {"unseen": state.unseen} if state.unseen else {}
        step = state.best_step or state.step
        calibrations, notes = ({}, []) if self.stopped else self.judge.calibrate(step)
        for note in notes:
            self.progress.say("note", step=step, text=note)
        for split in SPLITS[1:]:
            if (step, split) in self.measured and not calibrations:
                metrics[split] = self.measured[step, split]
            elif split in self.splits and not self.stopped:
                loss, metrics[split] = self.judge.measure(split, calibrations)
                self.progress.say("evaluation", step=step, of=self.total_steps, split=split, loss=loss, metrics=metrics[split])
        result = {
            "run_dir": absolute(self.config.run_dir),
            "world_size": process.world_size,
            "device": process.device.type,
            "precision": self.config.train.precision,
            "epochs": round(state.step / self.reader.steps_per_epoch, 4),
            "steps": state.step,
            "rows": state.rows,
            "seconds": round(state.seconds, 3),
            "samples_per_second": self.meter.steady_samples_per_second(),
            "parameters": self._parameters(),
            "data": {split: data.digest for split, data in self.splits.items()},
            "best_step": state.best_step,
            "best_value": state.best_value,
            "skipped": state.skipped,
            "restarts": self.restarts,
            "stopped": self.stopped,
            "calibration": self.judge.calibrations if calibrations else {},
            "metrics": metrics,
            "versions": versions(),
            "git": git_commit(),
        }
        if process.first:
            write_json(self.folder / "result.json", result)
            if self.stopped and self.asked:
                forget(self.folder, self.asked)  # not before: who is killed while saving is still to stop
        self.progress.say("end", step=state.step, result=result, moves=self.asked == Request.MOVE)
        return result

    # ------------------------------------------------------------------------------------------------ parts of a step

    def _refuse_bad(self) -> None:
        """Look at the newest step, if that was not done. All ranks see the same numbers, so all of them raise, or none. On CUDA it is done
        when the step after it is queued, lest the device wait for the host, or before anything is told or saved.

        Raises:
            DistmtlError: a reader failed, or a loss is not finite and may not be skipped.
        """
        queued, self.queued = self.queued, None
        if queued is None or queued.trained():
            return
        numbers = queued.numbers
        if numbers.failed > 0:
            raise DistmtlError("\n".join(gather_texts(self.process, numbers.error)))
        tasks = [name for name, n in zip(self.train_model.loss.terms.names, numbers.non_finite.tolist(), strict=True) if n]
        rows = numbers.bad_rows[numbers.bad_rows >= 0][:3].tolist()
        places = gather_texts(self.process, "; ".join(self.splits["train"].locate(r) for r in rows) or None)
        where = f"is not finite, at {'; '.join(places[:3])}" if places else "is finite, but not its gradient where the tasks share"
        what = f"step {numbers.step}: the loss of {', '.join(tasks)} {where}"
        policy, self.state.skipped = self.config.train.non_finite, self.state.skipped + 1
        if policy.policy == "raise":
            raise DistmtlError(f"{what}. Lower the learning rate, look at these rows, or set train.non_finite.policy=skip")
        if self.state.skipped > policy.limit:
            raise DistmtlError(f"{what}. That is skipped step {self.state.skipped}, more than train.non_finite.limit={policy.limit}")
        self.progress.say("note", step=numbers.step, text=f"{what}; this step's update is left out ({self.state.skipped} so far)")

    def _count(self) -> None:
        rows = self.reader.rows_of_step(self.state.step)
        self.state.rows += rows
        self.meter.rows += rows
        self.state.step += 1
        self.state.seconds += self.meter.tick()

    def _log(self) -> None:
        self._refuse_bad()
        state, meter = self.state, self.meter
        terms = self.train_model.loss.terms
        losses = dict(zip(terms.names, meter.mean_losses(), strict=True))
        speed = meter.samples_per_second()
        health, alarms = self.health.report()
        self.progress.say(
            "train",
            step=state.step,
            of=self.total_steps,
            epoch=(state.step - 1) // self.reader.steps_per_epoch + 1,
            rows=state.rows,
            loss=sum(c * losses[name] for name, c in zip(terms.names, terms.coefficients, strict=True)),
            losses=losses,
            health=health,
            samples_per_second=round(speed, 1),
            data_wait=meter.data_wait(),
            lr=self.optimizers.dense_lr,
            replaced_ids=meter.replaced_ids,
            contradictions=meter.contradictions,
            memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            eta_s=(self.total_steps - state.step) * self.config.train.global_batch_size / speed,
        )
        for alarm in alarms:
            self.progress.say("note", step=state.step, text=alarm.text, alarm=alarm.subject)
        meter.end_interval()

    def _evaluate(self) -> DistmtlError | None:
        """Measure the validation split; remember the best and count how long it has stood. Returns why it could not, on all
        ranks alike: what was trained is saved before that is raised."""
        self._refuse_bad()
        state, monitor = self.state, self.config.train.monitor
        try:
            with self.meter.paused():
                loss, metrics = self.judge.measure("validation")
            value = select(metrics, loss, monitor)[0]
        except DistmtlError as e:
            return e
        self.measured = {(state.step, "validation"): metrics}
        self.train_model.loss.weighting.evaluated(loss)
        best = state.best_value is None or better(value, state.best_value, monitor)
        if best:
            state.best_step, state.best_value, state.evaluations_without_best = state.step, value, 0
        else:
            state.evaluations_without_best += 1
        self.progress.say(
            "evaluation", step=state.step, of=self.total_steps, split="validation", loss=loss, metrics=metrics, best=best, monitored=value
        )
        if self.stops_early and state.step < self.total_steps:
            text = f"early stopping: no better {monitor} in {state.evaluations_without_best} evaluations"
            self.progress.say("note", step=state.step, text=text)
        return None

    def _look(self) -> Request | None:
        """Rank 0 looks for a request about once a second and tells the others: all of them must answer it at the same step."""
        if self.state.step < self.look_at:
            return None
        pace = self.state.step, self.state.seconds
        request, steps = on_first_rank(self.process, lambda: (asked(self.folder), steps_between_looks(*pace)))
        self.look_at = self.state.step + steps
        if request:
            then = {Request.STOP: "; the same command continues", Request.MOVE: "; going on with other workers", Request.SAVE: ""}[request]
            text = f"asked to {request.lower()}: a checkpoint is saved at step {self.state.step} of {self.total_steps}{then}"
            self.progress.say("note", step=self.state.step, text=text)
        if request == Request.SAVE and self.process.first:
            forget(self.folder, request)
        return request

    def _save(self) -> None:
        """Begin a checkpoint; training goes on as soon as its state is copied."""
        self._refuse_bad()
        with self.meter.paused():
            self.saver.save(
                {
                    "step": self.state.step,
                    "loop": asdict(self.state),
                    "world_size": self.process.world_size,
                    "plan": plan_json(self.planned, self.process.world_size),
                    "config": self.config.model_dump(mode="json"),
                    "data": {"digest": self.reader.dataset.digest, "files": self.reader.dataset.manifest()},
                    "columns": kinds_of(self.reader.dataset.schema, served_columns(self.config)),
                    "hash_version": HASH_VERSION,
                    "versions": versions(),
                },
                self.state.best_step,
            )

    def _say_saved(self) -> None:
        if self.process.first and (saved := self.saver.completed()):
            self.progress.say("checkpoint", **asdict(saved))

    def _profiler(self) -> Any:
        """torch.profiler over the chosen steps on rank 0, written to <run>/profile; else nothing."""
        profile = self.config.train.profile
        if not profile or not self.process.first:
            return nullcontext()
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=max(profile.first_step - 1, 0), warmup=1, active=profile.steps, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self.progress.folder / "profile")),
        )

    def _parameters(self) -> dict[str, int]:
        return {
            "tables": sum(t.rows * t.dim for t in self.planned),
            "dense": sum(p.numel() for p in self.optimizers.parameters.values()),
        }

    def _introduction(self, found: checkpoint.Checkpoint | None, goes_on: bool) -> str:
        config, process = self.config, self.process
        sizes = "  ".join(f"{split} {data.rows:,}" for split, data in self.splits.items())
        parameters = self._parameters()
        begin = "starting afresh"
        if found:
            how = "continuing" if is_own(found, config) else "going on" if goes_on else "starting with the weights"
            begin = f"{how} from {found.path} (step {found.step})"
        lines = [
            f"{config.name}: {config.model.kind} on {process.world_size} worker(s), {process.device.type}, run directory {self.folder}",
            f"{begin}; rows: {sizes}; {self.total_steps} steps of {config.train.global_batch_size}",
            config.train.precision + (f"; float32 matrix products by {fastest_fp32()}" if process.device.type == "cpu" else ""),
            f"parameters: {parameters['tables']:,} in {len(self.planned)} tables, {parameters['dense']:,} dense; "
            "sharding plan (MB: weights and optimizer state):",
            *("  " + line for line in plan_text(self.planned, process.world_size).splitlines()),
        ]
        return "\n".join(lines)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout by (seed, step, rank): a resumed run draws what the uninterrupted one would have."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def train_reader(config: Config, dataset: Dataset, process: Process) -> Reader:
    """This rank's share of the training rows, in the order of training."""
    return Reader(
        dataset,
        Collator(config, locate=dataset.locate, training=True),
        global_batch_size=config.train.global_batch_size,
        num_streams=config.data.num_streams,
        window=config.data.shuffle_window,
        seed=config.run.seed if config.data.shuffle else None,
        rank=process.rank,
        world_size=process.world_size,
        prefetch=config.data.prefetch,
        threads=decoding_threads(config, process.device),
        pin=process.device.type == "cuda",
    )


def _count_starts(log: Path | None) -> int:
    """How often this run was started before."""
    return sum(line.startswith('{"kind": "start"') for line in log.open()) if log and log.exists() else 0
