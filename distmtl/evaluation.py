"""Per-task metrics of a model on a data set: every row exactly once, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distmtl import checkpoint
from distmtl.config import Config
from distmtl.data.check import check_dataset
from distmtl.data.collate import Collator
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.reader import Reader
from distmtl.distributed.process import Process, gather_texts, on_first_rank, process_group
from distmtl.distributed.sharding import shard
from distmtl.errors import DistmtlError
from distmtl.metrics import Accumulator
from distmtl.model.loss import Terms
from distmtl.model.multitask import MultiTaskModel
from distmtl.model.normalisation import unseen_domain
from distmtl.run_directory import checkpoint_config, find_checkpoint
from distmtl.scores import Scores


def evaluate(path: str, data: str | None = None, split: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Per-task metrics of a checkpoint, or of a run's best one: split → task → metric → value.

    Args:
        path: a run's or a checkpoint's folder.
        data: Parquet path to evaluate on, named "data" in the result; default: the config's own `split`.
        split: `test` or `validation`; default: test where the config has one.

    Raises:
        DistmtlError: no complete checkpoint there, or data that does not fit its config.
    """
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    name = "data" if data else split or ("test" if config.data.test else "validation")
    where = data or getattr(config.data, name)
    if not where:
        raise DistmtlError(f"the config of {path} names no data.{name}; say which data to evaluate with --data")
    with process_group(config) as process:
        dataset = on_first_rank(process, lambda: _checked(where, config, None if data else name))
        model = MultiTaskModel(config, process.device)
        sharded, _ = shard(nn.ModuleDict({"model": model}), config, process)
        checkpoint.load_weights(found, sharded)
        return {name: evaluate_split(model, dataset, config, process)[1]}


def _checked(path: str, config: Config, split: str | None) -> Dataset:
    dataset = open_dataset(path)
    check_dataset(dataset, config, split)
    return dataset


def evaluate_split(model: nn.Module, dataset: Dataset, config: Config, process: Process) -> tuple[float, dict[str, dict[str, Any]]]:
    """The joint loss and every task's metrics; all ranks call it and get the same. Changes nothing in the model.

    Args:
        model: Batch → outputs, sharded or not.

    Raises:
        DistmtlError: a row that cannot be read, or of a domain that was never trained on, on whatever rank.
    """
    streams = config.data.num_streams
    collate = Collator(config, oracle=dataset.columns, locate=dataset.locate)
    reader = Reader(
        dataset,
        collate,
        global_batch_size=max(config.evaluation.batch_size // streams, 1) * streams,
        num_streams=streams,
        window=config.data.shuffle_window,
        seed=None,
        rank=process.rank,
        world_size=process.world_size,
        prefetch=config.data.prefetch,
    )
    terms, scores = Terms(config), Scores(config, collate.oracles)
    metrics = Accumulator(
        scores.columns, total_rows=dataset.rows, exact_rows=config.evaluation.exact_rows, grouped=config.data.group is not None
    )
    sums = torch.zeros(2, len(terms.names), dtype=torch.float64)
    error = None
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in reader.batches(0, reader.steps_per_epoch):
            batch = batch.to(process.device)
            error = batch.error or unseen_domain(model, batch, config, dataset.locate)
            outputs = model(batch)
            errors, weights = terms(outputs, batch)
            sums += torch.stack([(errors * weights).sum(0), weights.sum(0)]).double().cpu()
            metrics.update(scores(outputs, batch), batch.groups)
            if _anyone(error is not None, process):
                break
    model.train(was_training)
    if errors := gather_texts(process, error):
        raise DistmtlError("\n".join(errors))
    if process.world_size > 1:
        sums = sums.to(process.device)
        dist.all_reduce(sums)
    means = (sums[0] / sums[1].clamp(min=1e-30)).cpu()
    loss = float((means * torch.tensor(terms.coefficients)).sum())
    return loss, metrics.compute()


def _anyone(failed: bool, process: Process) -> bool:
    """Whether a rank has an error: all of them stop at the same step then."""
    if process.world_size == 1:
        return failed
    flag = torch.tensor(float(failed), device=process.device)
    dist.all_reduce(flag)
    return bool(flag > 0)
