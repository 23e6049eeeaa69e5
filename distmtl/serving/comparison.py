"""An export beside the checkpoint that it was made of: the same rows through the training code and through Predictor."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmtl.config import BinaryTask, MulticlassTask
from distmtl.data.collate import ROW, Collator, alike
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.rows import batch_of
from distmtl.distributed.process import process_group
from distmtl.errors import DistmtlError
from distmtl.evaluation import load_model
from distmtl.exporting.writer import export as write
from distmtl.run_directory import checkpoint_config, find_checkpoint
from distmtl.scores import Predictions, served
from distmtl.serving.batch import in_this_process, open_job, predict
from distmtl.serving.following import Model
from distmtl.serving.predictor import Predictor
from distmtl.serving.request import Limits, parse_body, parse_rows

ROWS = 50_000
REQUESTED = 256  # rows of a request
ROUNDS = 50
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Comparison:
    """Of one task: the largest difference of a prediction, and its metric of checkpoint and export (NaN: not measurable)."""

    task: str
    difference: float
    metric: str
    of_checkpoint: float
    of_export: float

    def text(self) -> str:
        change = f", {self.metric} {self.of_checkpoint:.5f} → {self.of_export:.5f}" if self.metric else ""
        return f"task {self.task}: predictions differ by {self.difference:.1e} at most{change}"


def compare(path: str, export: str, data: str | None = None, rows: int = ROWS) -> list[Comparison]:
    """Score the first rows of `data` (default: the config's test split, else validation, else train) by the checkpoint at `path` and
    by its export.

    Raises:
        DistmtlError: no such checkpoint, export or data, or data that does not fit.
    """
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    dataset = open_dataset(data or config.data.test or config.data.validation or config.data.train)
    labelled = Collator(config, locate=dataset.locate)
    table = first_rows(dataset, labelled.columns, rows)
    expected, got = checkpoint_predictions(path, table), Predictor(export)(table)
    known = labelled(table.append_column(ROW, pa.array(np.arange(table.num_rows))))
    out = []
    for t, task in enumerate(config.tasks):
        counts = known.weights[:, t] > 0
        metric, values = "", [float("nan")] * 2
        if not isinstance(task, MulticlassTask) and counts.any():
            metric = "auc" if isinstance(task, BinaryTask) else "rmse"
            of = known.labels[counts, t], known.weights[counts, t]
            values = [_metric(metric, p[task.name][counts], *of) for p in (expected, got)]
        out.append(Comparison(task.name, float(np.abs(expected[task.name] - got[task.name]).max()), metric, *values))
    return out


def first_rows(dataset: Dataset, columns: list[str], rows: int) -> pa.Table:
    """Of types that the files mix, one that holds all."""
    tables: list[pa.Table] = []
    for p in range(len(dataset.parts)):
        with dataset.open_part(p) as file:
            tables.append(alike(file.schema_arrow.empty_table().select(columns)))
            for batch in file.iter_batches(batch_size=8192, columns=columns):
                tables.append(alike(pa.Table.from_batches([batch]).select(columns)))
                if sum(map(len, tables)) >= rows:
                    return pa.concat_tables(tables, promote_options="permissive").slice(0, rows)
    return pa.concat_tables(tables, promote_options="permissive")


def checkpoint_predictions(path: str, table: pa.Table) -> dict[str, np.ndarray]:
    """What the model of a checkpoint predicts of some rows, by the code that trains and evaluates it: sharded tables on one rank."""
    found = find_checkpoint(path)
    config = checkpoint_config(found)
    collate = Collator(config, labelled=False)
    rows = collate(table.append_column(ROW, pa.array(np.arange(table.num_rows))))
    with process_group(config) as process:
        model, fitted = load_model(found, config, process)
        predictions, size = Predictions(config, fitted), config.evaluation.batch_size
        model.eval()
        parts: list[list[np.ndarray]] = []
        with torch.no_grad():
            for first in range(0, table.num_rows, size):
                last = min(first + size, table.num_rows)
                batch = batch_of([(rows, first, last)], collate.keys, last - first).to(process.device)
                predicted = predictions(model(batch).float(), batch.sparse, batch.extras)
                parts.append([served(task, p) for task, p in zip(config.tasks, predicted, strict=True)])
    return {task.name: np.concatenate(columns) for task, columns in zip(config.tasks, zip(*parts, strict=True), strict=True)}


def costs(path: str, export: str) -> Iterator[str]:
    """Size and time of a quantised export beside an fp32 one of the same checkpoint, made for that in a temporary folder."""
    config = checkpoint_config(find_checkpoint(path))
    dataset = open_dataset(config.data.test or config.data.validation or config.data.train)
    with tempfile.TemporaryDirectory(dir=Path(export).absolute().parent) as folder:
        plain = f"{folder}/fp32"
        write(path, plain, say=lambda text: None)
        sizes = [sum(f.stat().st_size for f in Path(e).glob("tables/*/*")) / 2**20 for e in (plain, export)]
        yield f"tables: {sizes[0]:,.1f} MiB as fp32, {sizes[1]:,.1f} here, {sizes[1] / sizes[0]:.2f} x"
        predictors = [Predictor(e, check=False) for e in (plain, export)]
        for rows in (1, 512):
            table = first_rows(dataset, predictors[0].collate.columns, rows)
            times = _times_ms([partial(p, table) for p in predictors])
            yield f"{rows} rows: {times[0]:.2f} ms with fp32, {times[1]:.2f} here, {times[1] / times[0]:.2f} x"


def _times_ms(calls: list[Callable[[], object]]) -> list[float]:
    """Medians, one thread, in turns."""
    threads, seen = torch.get_num_threads(), [list[float]() for _ in calls]
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for call, times in zip(calls, seen, strict=True):
                began = time.perf_counter()
                call()
                times.append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    return [median(times) for times in seen]


def _metric(name: str, predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score  # it takes a second to import

    if name == "rmse":
        return float(np.sqrt(np.average((predicted - labels) ** 2, weights=weights)))
    return float(roc_auc_score(labels, predicted, sample_weight=weights)) if len(np.unique(labels)) == 2 else float("nan")


def ways_apart(export: str, dataset: Dataset, folder: str) -> float:
    """The largest difference between what Predictor says of a data set's first rows, what a JSON request for them is answered, and what
    batch scoring of the data set writes to the new `folder`."""
    model = Model.load(Path(export), Limits(candidates=ROWS))
    table = first_rows(dataset, model.predictor.schema.names, REQUESTED)
    expected = model.predictor(table)
    body = json.dumps({"candidates": table.cast(model.predictor.schema).to_pydict()}).encode()
    answer = model.predictor(parse_rows(parse_body(body), model.columns, model.fusion, model.limits).table)
    job = open_job(export, dataset.path, folder, max_rejected=0.0)
    predict(job, in_this_process, say=lambda text: None)
    written = pq.read_table(sorted(Path(folder).glob("part-*.parquet")), columns=["row", *expected]).slice(0, table.num_rows)
    assert written["row"].to_pylist() == list(range(table.num_rows))
    scored = {task: np.array(written[task].to_pylist(), dtype=np.float32) for task in expected}
    return max(float(np.abs(values - other[task]).max()) for task, values in expected.items() for other in (answer, scored))


def refuse_apart(comparisons: list[Comparison]) -> None:
    """
    Raises:
        DistmtlError: a prediction of the export differs by more than rounding.
    """
    if apart := [f"{c.task} by {c.difference:.1e}" for c in comparisons if not c.difference <= TOLERANCE]:
        raise DistmtlError(f"the export's predictions differ from the checkpoint's: {', '.join(apart)} (allowed {TOLERANCE:.0e})")
