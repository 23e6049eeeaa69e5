"""verify(): every comparison that applies to a config."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmtl.config import Config, Ids, StaticWeighting, TableConfig
from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.distributed.process import quieten
from distmtl.distributed.ranks import run_ranks
from distmtl.evaluation import evaluate
from distmtl.exporting.writer import export
from distmtl.loop import train
from distmtl.serving.comparison import TOLERANCE, compare, ways_apart
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import STEPS, State, loaded_state, short_run

MAX_TABLE_ROWS = 100_000  # larger tables are shrunk, their ids hashed into them
MAX_BATCH = 2048
LOSS_TOLERANCE = 1e-5
WEIGHTING_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Check:
    """One comparison: what differed most, and by how much it may."""

    name: str
    compared: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # NaN does not pass


def verify(config: Config, workers: int = 2, say: Callable[[str], None] = print) -> list[Check]:
    """Run every check that applies to the config; says what it does, and what it changed in the config to do it.

    Raises:
        DistmtlError: the config or its data are unsound.
    """
    quieten()
    torch.set_num_threads(1)  # forked ranks inherit no thread pool
    with tempfile.TemporaryDirectory() as folder:
        small, changes = shrink(config, folder)
        for change in changes:
            say(f"for this check {change}")
        checks = []
        for check in _checks(small, workers, Path(folder)):
            word = "ok  " if check.passed else "FAIL"
            say(f"{word} {check.name}: {check.compared} differ by {check.difference:.1e} (allowed {check.tolerance:.0e})")
            checks.append(check)
        return checks


def shrink(config: Config, folder: str) -> tuple[Config, list[str]]:
    """The config as it is verified, and in words what was changed."""
    changes, features = [], []
    for feature in config.features:
        if isinstance(feature, Ids) and feature.rows > MAX_TABLE_ROWS:
            changes.append(
                f"table {feature.table_name!r} has {MAX_TABLE_ROWS:,} rows instead of {feature.rows:,}, and ids are hashed into it"
                + (", none dropped" if feature.id_dropout else "")
            )
            feature = feature.model_copy(update={"rows": MAX_TABLE_ROWS, "out_of_range": "hash", "id_dropout": 0.0})
        features.append(feature)
    batch, streams = config.train.global_batch_size, config.data.num_streams
    if batch > MAX_BATCH:
        batch = max(MAX_BATCH // streams, 1) * streams
        changes.append(f"the global batch has {batch} rows instead of {config.train.global_batch_size}")
    raw = config.model_dump(mode="json")
    raw["features"] = [f.model_dump(mode="json") for f in features]
    for network in (raw["model"], raw["model"].get("network", {})):
        if network.get("dropout"):
            network["dropout"] = 0.0
            changes.append("dropout is off")
    raw["optimizer"]["schedule"] = {"warmup_steps": 0, "decay": "none"}
    raw["train"] |= {
        "global_batch_size": batch,
        "steps": STEPS,
        "eval_every": STEPS,
        "save_every": STEPS,
        "log_every": 1,
        "early_stopping": None,
        "keep": 9,
    }
    raw["data"] |= {"validation": config.data.validation or config.data.test, "test": None}
    raw["cluster"] |= {"device": "cpu", "workers": 1}
    raw["run"]["dir"] = folder
    del raw["tracking"]  # these are no runs to look at
    return parse_config(raw), list(dict.fromkeys(changes))


def _checks(config: Config, workers: int, folder: Path) -> Iterator[Check]:
    one = run_ranks(short_run, 1, config)
    losses, weights, _ = unsharded_run(config, one)
    plain = "of plain PyTorch and of TorchRec on 1 worker"
    yield Check("unsharded = sharded", f"losses {plain}", _apart(losses, one[0].losses), LOSS_TOLERANCE)
    if not isinstance(config.weighting, StaticWeighting):
        off = _apart(weights, one[0].weighting) / float(weights.abs().max())
        yield Check(f"weighting {config.weighting.kind}", f"tasks' weights {plain}", off, WEIGHTING_TOLERANCE)
    many = run_ranks(short_run, workers, config)
    yield Check(f"1 = {workers} workers", "losses", _apart(one[0].losses, many[0].losses), LOSS_TOLERANCE)
    yield Check(
        f"{workers} workers agree", "dense gradients of the last step", max(_apart(many[0].gradients, r.gradients) for r in many), 0.0
    )
    for sharding in allowed_types(config, workers):
        forced = config.model_copy(update={"tables": {t: _table(config, t, sharding) for t in {f.table_name for f in config.embedded}}})
        ranks = run_ranks(short_run, workers, forced)
        yield Check(f"{sharding} on {workers} workers", "losses, to 1 worker's", _apart(one[0].losses, ranks[0].losses), LOSS_TOLERANCE)

    whole, parts = (_in(config, folder / name) for name in ("whole", "parts"))
    first = parts.model_copy(
        update={"train": parts.train.model_copy(update={"steps": STEPS // 2, "eval_every": STEPS // 2, "save_every": STEPS // 2})}
    )
    result = run_ranks(_train, workers, whole)[0]
    run_ranks(_train, workers, first)
    half = run_ranks(loaded_state, workers, parts)[0]
    yield Check(
        f"resharded, {workers} workers to 1",
        "weights and optimizer state on loading",
        _states(half, run_ranks(loaded_state, 1, parts)[0]),
        0.0,
    )
    run_ranks(_train, workers, parts)
    states = [run_ranks(loaded_state, workers, c)[0] for c in (whole, parts)]
    yield Check("uninterrupted = resumed", "weights and optimizer state at the end", _states(*states), 0.0)
    if config.data.validation:
        again = run_ranks(_evaluate, 1, whole)[0]
        pairs = [(a, again["validation"][t].get(m)) for t, values in result["metrics"]["validation"].items() for m, a in values.items()]
        apart = [math.inf if a is None or b is None else abs(a - b) for a, b in pairs if (a, b) != (None, None)]
        yield Check("train's metrics = evaluate's", "metrics of the checkpoint", max(apart), METRIC_TOLERANCE)
    of_export, of_ways = run_ranks(_exported, 1, whole, str(folder / "export"))[0]
    yield Check("checkpoint = export", "predictions of the training code and of Predictor", of_export, TOLERANCE)
    yield Check("export = predict = serve", "predictions of Arrow rows, Parquet and a JSON request", of_ways, TOLERANCE)


def _exported(config: Config, folder: str) -> tuple[float, float]:
    """The largest difference of a prediction: from the checkpoint's, and between the ways to ask an export."""
    export(config.run_dir, folder, say=lambda text: None)
    data = config.data.validation or config.data.train
    of_export = max(c.difference for c in compare(config.run_dir, folder, data, rows=MAX_BATCH))
    return of_export, ways_apart(folder, open_dataset(data), f"{folder}-predictions")


def allowed_types(config: Config, workers: int) -> list[str]:
    """Sharding types that are right on one host for every table's optimizer."""
    rowwise = any(config.table_optimizer(f.table_name).kind == "rowwise_adagrad" for f in config.embedded)
    return ["table_wise", "row_wise"] + ([] if rowwise or workers < 2 else ["column_wise"])


def _train(config: Config) -> dict[str, Any]:
    return train(config, report=lambda record: None)


def _evaluate(config: Config) -> dict[str, Any]:
    return evaluate(config.run_dir, split="validation")


def _in(config: Config, folder: Path) -> Config:
    shutil.rmtree(folder, ignore_errors=True)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def _table(config: Config, table: str, sharding: Any) -> TableConfig:
    return config.tables.get(table, TableConfig()).model_copy(update={"sharding": (sharding,)})


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _states(a: State, b: State) -> float:
    """The largest difference; infinite where one has what the other lacks."""
    return max(_apart(a[k], b[k]) for k in a) if a.keys() == b.keys() else float("inf")
