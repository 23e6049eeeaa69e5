"""What a run's checkpoint does on rows that it was not trained on: calibration, ranking, what it reads, which experts it needs, slices."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from distmtl.batch import Batch
from distmtl.calibration import Calibration
from distmtl.checkpoint import Checkpoint
from distmtl.config import BinaryTask, Config
from distmtl.data.collate import Collator
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.reader import GroupRows
from distmtl.data.rows import batch_of
from distmtl.distributed.process import Process, process_group
from distmtl.errors import DistmtlError
from distmtl.evaluation import load_model
from distmtl.metrics import Accumulator, Metrics, higher_is_better
from distmtl.reporting.curves import Curves, curves_of
from distmtl.reporting.gates import gated, without_expert
from distmtl.reporting.gathering import Run
from distmtl.run_directory import checkpoint_config, config_of, find_checkpoint, partition_folder
from distmtl.scores import Scored, Scores
from distmtl.slices import Slices, make_slices
from distmtl.storage import place

ROWS = 50_000
GROUPS = 16  # row groups that the rows are taken from
REPEATS = 3  # permutations of a feature
DOMAINS = 32  # up to which a slice is shown of each

Drop = dict[str, float | None]  # task → how much worse its headline metric is, None where it cannot be told


@dataclass(frozen=True)
class Examination:
    """Of one checkpoint, on `rows` of the `of` rows of some data."""

    checkpoint: str
    step: int
    data: str
    rows: int
    of: int
    metrics: Metrics  # task → metric → value, of these rows
    headline: dict[str, str]  # task → the metric that is compared
    curves: dict[str, Curves]  # of the binary tasks
    importance: dict[str, list[Drop]]  # features that read one column → of every permutation of it
    ablation: dict[int, Drop]  # expert → without it; nothing where the head has no gates
    slices: dict[str, dict[str, Metrics]]  # feature → slice → task → metric → value


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and rows to examine it on."""

    found: Checkpoint
    config: Config
    dataset: Dataset


def subject(run: Run) -> Subject:
    """A run's best checkpoint and its test split, else its validation split. Of a followed run that names neither, the checkpoint of the
    last partition but one and the last partition, which that checkpoint has not seen.

    Raises:
        DistmtlError: no such checkpoint or data.
    """
    data = run.config.data.test or run.config.data.validation
    if data or not run.partitions:
        if not data:
            raise DistmtlError(f"the config of {run.path} names neither data.test nor data.validation")
        found = find_checkpoint(run.path)
        return Subject(found, checkpoint_config(found), open_dataset(data))
    if len(run.partitions) < 2 or not run.partitions[-2]["checkpoint"]:
        raise DistmtlError(f"{run.path} has no checkpoint of the partition before its last one, and its config names no data.test")
    found = find_checkpoint(run.partitions[-2]["checkpoint"])
    last = run.partitions[-1]
    folder = place(run.path) / partition_folder(last["index"], last["name"])
    return Subject(found, checkpoint_config(found), open_dataset(config_of(folder).data.train))


def examine(what: Subject, rows: int = ROWS, slices: Sequence[str] = (), say: Callable[[str], None] = print) -> Examination:
    """
    Args:
        slices: as `distmtl evaluate` takes them; a star's domain is added by its values.

    Raises:
        DistmtlError: rows or slices that do not fit the checkpoint.
    """
    config, dataset = what.config, what.dataset
    with process_group(config) as process:
        sliced = make_slices(with_domain(slices, config), dataset, config, process)
        model, fitted = load_model(what.found, config, process)
        model.eval()
        examiner = Examiner(model, config, dataset, process, fitted)
        table = spread_rows(dataset, examiner.collate.columns, rows)
        say(f"examining {what.found.path} on {table.num_rows:,} of the {dataset.rows:,} rows of {dataset.path} …")
        seen = examiner.see(table)
        metrics = examiner.metrics(seen)
        headline = {t.name: t.metrics[0] for t in config.tasks}
        worse = partial(drops, headline, metrics)
        return Examination(
            checkpoint=str(what.found.path),
            step=what.found.step,
            data=dataset.path,
            rows=table.num_rows,
            of=dataset.rows,
            metrics=metrics,
            headline=headline,
            curves=examiner.curves(seen),
            importance=importance(examiner, table, worse),
            ablation=ablation(examiner, table, worse),
            slices=examiner.slices(seen, sliced),
        )


def with_domain(slices: Sequence[str], config: Config) -> list[str]:
    values = next((f.rows for f in config.embedded if f.name == config.domain), 0)
    named = config.domain in [s.split(":")[0].rstrip("=") for s in slices]
    return [*slices, *([f"{config.domain}="] if 0 < values <= DOMAINS and not named else [])]


def spread_rows(dataset: Dataset, columns: list[str], rows: int) -> pa.Table:
    """Evenly spaced rows of evenly spaced row groups; all rows where there are no more. With their numbers in the data set."""
    many = len(dataset.groups)
    groups = range(many) if dataset.rows <= rows else np.unique(np.linspace(0, many - 1, GROUPS).astype(int)).tolist()
    ends = np.cumsum([0, *(int(dataset.group_rows[g]) for g in groups)])
    wanted = np.arange(min(rows, ends[-1])) * ends[-1] // min(rows, ends[-1])
    source, parts = GroupRows(dataset, columns, dataset.open_part), []
    for group, first, last in zip(groups, ends, ends[1:], strict=False):
        here = wanted[(wanted >= first) & (wanted < last)] - first
        if len(here):
            parts.append(source.take(group, 0, int(dataset.group_rows[group])).take(here))
    return pa.concat_tables(parts, promote_options="permissive")


@dataclass(frozen=True)
class Seen:
    """Some rows, batch by batch, with what the model makes of them."""

    batches: list[Batch]
    scored: list[Scored]


class Examiner:
    """Scores tables by a model as `distmtl evaluate` does."""

    def __init__(self, model: nn.Module, config: Config, dataset: Dataset, process: Process, fitted: dict[str, Calibration]):
        self.model, self.config, self.process = model, config, process
        self.collate = Collator(config, oracle=dataset.columns, locate=dataset.locate)
        self.scores = Scores(config, self.collate.oracles, fitted)

    def see(self, table: pa.Table) -> Seen:
        rows, size = self.collate(table), self.config.evaluation.batch_size
        seen = Seen([], [])
        with torch.no_grad():
            for first in range(0, table.num_rows, size):
                last = min(first + size, table.num_rows)
                batch = batch_of([(rows, first, last)], self.collate.keys, last - first).to(self.process.device)
                seen.batches.append(batch)
                seen.scored.append(self.scores(self.model(batch), batch))
        return seen

    def metrics(self, seen: Seen, of: Callable[[Batch], torch.Tensor] | None = None) -> Metrics:
        """Of all rows, or of those that a mask says."""
        rows = sum(len(s.scores) for s in seen.scored)
        accumulator = Accumulator(self.scores.columns, total_rows=rows, exact_rows=rows, grouped=self.config.data.group is not None)
        for batch, scored in zip(seen.batches, seen.scored, strict=True):
            mask = torch.ones(len(scored.scores), dtype=torch.bool) if of is None else of(batch)
            accumulator.update(scored[mask], None if batch.groups is None else batch.groups[mask])
        return accumulator.compute()

    def slices(self, seen: Seen, sliced: Sequence[Slices]) -> dict[str, dict[str, Metrics]]:
        """Those that have rows."""
        found: dict[str, dict[str, Metrics]] = {}
        for s in sliced:
            for i, name in enumerate(s.names):
                metrics = self.metrics(seen, lambda batch: s(batch) == i)  # noqa: B023  # called at once
                if any(of["rows"] for of in metrics.values()):
                    found.setdefault(s.feature, {})[name] = metrics
        return found

    def curves(self, seen: Seen) -> dict[str, Curves]:
        out = {}
        for c, column in enumerate(self.scores.columns):
            task = self.config.tasks[self.config.place_of(column.task)]
            if column.family == "binary" and not column.prefix and isinstance(task, BinaryTask):
                values = [torch.cat([getattr(s, name)[:, c] for s in seen.scored]).double() for name in ("scores", "labels", "weights")]
                scores, labels, weights = (v.cpu().numpy() for v in values)
                if curves := curves_of(scores[weights > 0], labels[weights > 0], weights[weights > 0]):
                    out[column.task] = curves
        return out


def drops(headline: dict[str, str], before: Metrics, after: Metrics) -> Drop:
    """How much worse every task's headline metric became; below 0, better."""
    out: Drop = {}
    for task, metric in headline.items():
        was, now = before[task].get(metric), after[task].get(metric)
        better = higher_is_better(metric)
        out[task] = None if was is None or now is None else float(was - now if better else now - was)
    return out


def importance(examiner: Examiner, table: pa.Table, worse: Callable[[Metrics], Drop]) -> dict[str, list[Drop]]:
    """Of every column that features read: the drop where its values are those of other rows (Breiman 2001, section 10)."""
    readers: dict[str, list[str]] = {}
    for feature in examiner.config.features:
        readers.setdefault(feature.source, []).append(feature.name)
    out: dict[str, list[Drop]] = {}
    for column, names in readers.items():
        draws = np.random.default_rng(zlib.crc32(column.encode()))
        for _ in range(REPEATS):
            elsewhere = table[column].take(draws.permutation(table.num_rows))
            permuted = table.set_column(table.column_names.index(column), column, elsewhere)
            out.setdefault(", ".join(names), []).append(worse(examiner.metrics(examiner.see(permuted))))
    return out


def ablation(examiner: Examiner, table: pa.Table, worse: Callable[[Metrics], Drop]) -> dict[int, Drop]:
    """Of every expert: the drop without it; None for a task that does not mix it, or no other."""
    head: Any = examiner.model.head
    tasks = gated(head)
    out: dict[int, Drop] = {}
    for expert in sorted({e for of in tasks for e in of.experts}):
        with without_expert(tasks, expert) as lose:
            found = worse(examiner.metrics(examiner.see(table)))
        out[expert] = {task: drop if loses else None for (task, drop), loses in zip(found.items(), lose, strict=True)}
    return out
