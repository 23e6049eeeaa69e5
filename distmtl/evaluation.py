"""Per-task metrics of a model on a data set: every row exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmtl import checkpoint
from distmtl.batch import Batch
from distmtl.calibration import NO_SLICE, Calibration, Observed, fit, slices_of
from distmtl.checkpoint import Checkpoint
from distmtl.config import BinaryTask, CalibrationConfig, Config, FakeNegativeWeighted
from distmtl.data.check import check_dataset
from distmtl.data.collate import Collator
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.reader import decoding_threads, every_row
from distmtl.data.splits import SPLITS
from distmtl.distributed.process import Process, gather_arrays, gather_texts, on_any_rank, on_first_rank, process_group
from distmtl.distributed.sharding import shard
from distmtl.errors import DistmtlError
from distmtl.metrics import Accumulator
from distmtl.model.kinds import of_all_negatives
from distmtl.model.loss import Terms
from distmtl.model.multitask import MultiTaskModel
from distmtl.model.normalisation import unseen_domain
from distmtl.run_directory import checkpoint_config, find_checkpoint, saved_calibrations
from distmtl.scores import Scores
from distmtl.slices import Slices, make_slices


def evaluate(
    path: str, data: str | None = None, split: str | None = None, slices: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per-task metrics of a checkpoint, or of a run's best one, calibrated where the run fitted that: split → task → metric → value.

    Args:
        path: a run's or a checkpoint's folder.
        data: Parquet path to evaluate on, named "data" in the result; default: the config's own `split`.
        split: `test` or `validation`; default: test where the config has one.
        slices: of what rows the metrics are wanted too (slices.py): "user_id", "item_id:1,10", "domain=". A task's `slices` in the
            result: feature → slice → metric → value, of the slices in which a row has its label.

    Raises:
        DistmtlError: no complete checkpoint there, another split, or data or slices that do not fit its config.
    """
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    if split not in (None, *SPLITS[1:]):
        raise DistmtlError(f"split {split!r} is not one of {' and '.join(SPLITS[1:])}")
    name = "data" if data else split or ("test" if config.data.test else "validation")
    where = data or getattr(config.data, name)
    if not where:
        raise DistmtlError(f"the config of {path} names no data.{name}; say which data to evaluate with --data")
    with process_group(config) as process:
        dataset = on_first_rank(process, lambda: _checked(where, config, None if data else name))
        sliced = make_slices(slices, dataset, config, process)
        model, fitted = load_model(found, config, process)
        return {name: evaluate_split(model, dataset, config, process, fitted, sliced)[1]}


def load_model(found: Checkpoint, config: Config, process: Process) -> tuple[MultiTaskModel, dict[str, Calibration]]:
    """A checkpoint's model, its tables sharded over the ranks, which all call it; and its tasks' calibrations.

    Raises:
        DistmtlError: it cannot be read, on all ranks.
    """
    model = MultiTaskModel(config, process.device)
    sharded, _ = shard(nn.ModuleDict({"model": model}), config, process)
    checkpoint.load_weights(found, sharded)
    calibrations = on_first_rank(process, lambda: saved_calibrations(found))
    return model, {task: Calibration.from_dict(c).to(process.device) for task, c in calibrations.items()}


def _checked(path: str, config: Config, split: str | None) -> Dataset:
    dataset = open_dataset(path)
    check_dataset(dataset, config, split)
    return dataset


def evaluate_split(
    model: nn.Module,
    dataset: Dataset,
    config: Config,
    process: Process,
    calibrations: Mapping[str, Calibration] | None = None,
    slices: Sequence[Slices] = (),
) -> tuple[float, dict[str, dict[str, Any]]]:
    """The joint loss and every task's metrics, these after the `calibrations`; all ranks call it and get the same. Changes nothing
    in the model.

    Args:
        model: Batch → outputs, sharded or not.

    Raises:
        DistmtlError: a row that cannot be read, or of a domain that was never trained on, on whatever rank.
    """
    collate = Collator(config, oracle=dataset.columns, locate=dataset.locate)
    terms, scores = Terms(as_measured(config)), Scores(config, collate.oracles, calibrations)
    accumulator = partial(
        Accumulator, scores.columns, total_rows=dataset.rows, exact_rows=config.evaluation.exact_rows, grouped=config.data.group is not None
    )
    metrics, of_slices = accumulator(), [[accumulator() for _ in s.names] for s in slices]
    sums = torch.zeros(2, len(terms.names), dtype=torch.float64)

    def see(outputs: Tensor, batch: Batch) -> None:
        errors, weights = terms(of_all_negatives(config, outputs), batch)
        sums.add_(torch.stack([(errors * weights).sum(0), weights.sum(0)]).double().cpu())
        scored = scores(outputs, batch)
        metrics.update(scored, batch.groups)
        for of_names, places in zip(of_slices, (s(batch) for s in slices), strict=True):
            for i, of_slice in enumerate(of_names):
                if (rows := places == i).any():
                    of_slice.update(scored[rows], None if batch.groups is None else batch.groups[rows])

    _run(model, dataset, collate, config, process, see)
    if process.world_size > 1:
        sums = sums.to(process.device)
        dist.all_reduce(sums)
    means = (sums[0] / sums[1].clamp(min=1e-30)).cpu()
    loss = float((means * torch.tensor(terms.coefficients)).sum())
    out: dict[str, dict[str, Any]] = dict(metrics.compute())
    for s, of_names in zip(slices, of_slices, strict=True):
        found = [(name, of_slice.compute()) for name, of_slice in zip(s.names, of_names, strict=True)]
        for task, values in out.items():
            values.setdefault("slices", {})[s.feature] = {name: of[task] for name, of in found if any(of[task].values())}
    return loss, out


def as_measured(config: Config) -> Config:
    """With plain cross-entropy for what undoes false negatives of the training data alone: an evaluation set has none (FNW)."""
    plain = [
        t.model_copy(update={"delay": None}) if isinstance(t, BinaryTask) and isinstance(t.delay, FakeNegativeWeighted) else t
        for t in config.tasks
    ]
    return config.model_copy(update={"tasks": tuple(plain)})


def calibrate(model: nn.Module, dataset: Dataset, config: Config, process: Process) -> tuple[dict[str, Calibration], list[str]]:
    """Fit every calibration of the config on a data set, on rank 0; all ranks call it and get the same, and what is worth saying.

    Raises:
        DistmtlError: a row that cannot be read, or a task that cannot be calibrated.
    """
    collate, scores = Collator(config, locate=dataset.locate), Scores(config, [])
    every = -(-dataset.rows // config.evaluation.exact_rows)
    columns = {c.task: i for i, c in enumerate(scores.columns) if c.task in config.calibrations and not c.prefix}
    seen: dict[str, list[np.ndarray]] = {task: [] for task in columns}

    def see(outputs: Tensor, batch: Batch) -> None:
        scored = scores(outputs, batch)
        for task, c in columns.items():
            feature = config.calibrations[task].slices
            slices = slices_of(batch.sparse, feature) if feature else torch.full_like(batch.rows, NO_SLICE)
            rows = torch.stack([*(v[:, c].double() for v in (scored.scores, scored.labels, scored.weights)), slices.double()])
            seen[task].append(rows[:, (scored.weights[:, c] > 0) & (batch.rows % every == 0)].cpu().numpy())

    _run(model, dataset, collate, config, process, see)
    fitted, notes = {}, []
    for task, calibration in config.calibrations.items():
        parts = gather_arrays(process, np.concatenate(seen.pop(task), axis=1))
        saved, said = on_first_rank(process, partial(_fit, task, calibration, parts))
        fitted[task] = Calibration.from_dict(saved).to(process.device)
        notes += said
    return fitted, notes


def _fit(task: str, config: CalibrationConfig, parts: list[np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    logits, labels, weights, slices = np.concatenate(parts, axis=1)
    fitted, notes = fit(task, config, Observed(logits, labels, weights, slices.astype(np.int64)))
    return fitted.to_dict(), notes


def _run(
    model: nn.Module, dataset: Dataset, collate: Collator, config: Config, process: Process, see: Callable[[Tensor, Batch], None]
) -> None:
    """Show every row and its outputs once, over all ranks, to `see`.

    Raises:
        DistmtlError: a row that cannot be read, on whatever rank.
    """
    reader = every_row(dataset, collate, config, process.rank, process.world_size, decoding_threads(config, process.device))
    error = None
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in reader.batches(0, reader.steps_per_epoch):
            batch = batch.to(process.device)
            error = batch.error or unseen_domain(model, batch, config, dataset.locate)
            see(model(batch), batch)
            if on_any_rank(process, error is not None)[0]:  # all of them stop at the same step then
                break
    model.train(was_training)
    if errors := gather_texts(process, error):
        raise DistmtlError("\n".join(errors))
