"""Predictor: rows with features → what every task predicts of them. Batch and online scoring, and the parity gate, all use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.calibration import Calibration
from distmtl.config import Config, Ids, MulticlassTask
from distmtl.data.check import check_table_to_score
from distmtl.data.collate import ROW, Collator
from distmtl.data.rows import Rows, batch_of
from distmtl.data.schema import arrow_type
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest, program
from distmtl.exporting.manifest import MODEL, Manifest
from distmtl.exporting.program import Run
from distmtl.scores import Predictions, served
from distmtl.serving.lookup import Changed, Lookup

# KeyedJaggedTensor asks torch.fx whether it is being traced, and torch warns of how it asks.
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: not record.getMessage().startswith("is_fx_tracing"))


@dataclass(frozen=True)
class Scored:
    """Predictions of n rows; of each row how many ids were looked up, and how many of them were outside their table."""

    predictions: dict[str, np.ndarray]
    ids: np.ndarray  # (n,)
    replaced: np.ndarray  # (n,)


@dataclass(frozen=True)
class Delta:
    """A delta in memory."""

    folder: Path
    manifest: Manifest
    changed: Changed
    program: Run
    predictions: Predictions


class Predictor:
    """An export in memory, on CPU. Threads may not share one.

    Args:
        path: a full export's folder.
        check: read every file once more to compare its SHA-256.

    Raises:
        DistmtlError: no export there, a delta, or a damaged one.
    """

    def __init__(self, path: str | Path, check: bool = True):
        folder = Path(path)
        self.manifest = manifest.read(folder)
        if self.manifest.is_delta:
            raise DistmtlError(f"export {folder} is a delta, of the export {self.manifest.base}; give the folder of a full one")
        if check:
            manifest.verify(folder, self.manifest)
        self.config = self.manifest.parsed_config()
        self.collate = Collator(self.config, labelled=False)
        self.schema = pa.schema([(name, arrow_type(self.manifest.columns[name])) for name in self.collate.columns])
        self.fits = self.schema  # of the rows that came last
        self.ids = {f.source for f in self.config.features if isinstance(f, Ids) and self.manifest.columns[f.source] == "integer"}
        self.lookup = Lookup(self.config, self.manifest.row_format)
        self.lookup.load(folder)
        self.hashes = program.hashes(self.config)
        self.hashes_of_lists = [h for h, key in zip(self.hashes, self.lookup.keys, strict=True) if key in self.lookup.lists]
        self._take(folder, self.manifest)

    def _take(self, folder: Path, of: Manifest) -> None:
        """All but the tables."""
        self.manifest, self.program, self.predictions = of, *_loaded(folder, of, self.config)

    def apply(self, path: str | Path) -> None:
        """Become what a delta makes of this export.

        Raises:
            DistmtlError: it is damaged, or of another export than this one.
        """
        self.commit(self.prepare(path))

    def prepare(self, path: str | Path) -> Delta:
        """A delta of this export (or of the delta before it, not yet committed), read and checked. Another thread may score meanwhile.

        Raises:
            DistmtlError: it is damaged, or of a model that reads or predicts other things.
        """
        folder = Path(path)
        delta = manifest.read(folder)
        manifest.verify(folder, delta)
        if not self.manifest.serves_like(delta.config, delta.columns) or delta.row_format != self.manifest.row_format:
            raise DistmtlError(f"delta {folder} is of another model than {self.manifest.name}: publish a full export")
        return Delta(folder, delta, self.lookup.changed(folder), *_loaded(folder, delta, self.config))

    def commit(self, delta: Delta) -> None:
        """Take a delta in; not while another thread scores.

        Raises:
            DistmtlError: it is of another export than this one.
        """
        if delta.manifest.base != self.manifest.digest:
            raise DistmtlError(
                f"delta {delta.folder} changes export {delta.manifest.base}, and this is {self.manifest.digest}; apply those between first"
            )
        self.lookup.update(delta.changed)
        self.manifest, self.program, self.predictions = delta.manifest, delta.program, delta.predictions

    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Task → (n,) float32, a probability of a binary one, or (n, classes) probabilities, of rows in their order.

        Args:
            table: has `self.schema`'s columns, in types that training data may have; ids also as floats that are whole, NaN being null.

        Raises:
            DistmtlError: a value that the model does not take, with its column and row (counted from 0).
        """
        return self.score(table).predictions

    def score(self, table: pa.Table) -> Scored:
        """The same, and how many ids were not in the tables."""
        if not isinstance(table, pa.Table):
            raise DistmtlError(
                f"rows are a pyarrow.Table, not a {type(table).__name__}; of a DataFrame pyarrow.Table.from_pandas makes one"
            )
        n = table.num_rows
        if not n:
            none = {t.name: np.zeros((0, t.classes) if isinstance(t, MulticlassTask) else 0, np.float32) for t in self.config.tasks}
            return Scored(none, np.zeros(0, np.int64), np.zeros(0, np.int64))
        if table.schema is not self.fits and not table.schema.equals(self.fits):
            check_table_to_score(table.schema, self.collate, self.manifest.columns)
            self.fits = table.schema
        rows = self.checked(table.append_column(ROW, pa.array(np.arange(n))))
        batch = batch_of([(rows, 0, n)], self.collate.keys, n)
        with torch.inference_mode():
            outputs = self._outputs(batch.sparse, batch.dense, batch.domain)
            predicted = self.predictions(outputs, batch.sparse, batch.extras)
            predictions = {t.name: served(t, p) for t, p in zip(self.config.tasks, predicted, strict=True)}
        return Scored(predictions, batch.sparse.lengths().numpy().reshape(-1, n).sum(0), rows.replaced)

    def checked(self, table: pa.Table) -> Rows:
        """What the model reads of a table that has a column ROW, checked.

        Raises:
            DistmtlError: a value that the model does not take, with its column and row.
        """
        for i, field in enumerate(table.schema):
            if field.name in self.ids and pa.types.is_floating(field.type):
                table = table.set_column(i, field.name, _integers(table[field.name], field.name, table[ROW]))
        rows = self.collate(table)
        if rows.domain is None or self.manifest.domains is None:
            return rows
        if (unseen := ~np.isin(rows.domain, self.manifest.domains)).any():
            i = int(np.flatnonzero(unseen)[0])
            raise DistmtlError(
                f"domain {rows.domain[i]} of row {rows.numbers[i]} was never seen in training; leave such rows out, or train on rows of "
                f"that {self.config.domain}"
            )
        return rows

    def _outputs(self, ids: KeyedJaggedTensor, dense: Tensor, domain: Tensor | None) -> Tensor:
        """(B, O). The program takes no fewer rows and ids than program.LEAST: what is missing is made up, and left out again."""
        pooled, lists = self.lookup(ids)
        lengths = ids.lengths().view(len(self.lookup.keys), -1)
        n, more = lengths.shape[1], program.LEAST
        if n < more or any(x.shape[0] < more * hashes for x, hashes in zip(lists, self.hashes_of_lists, strict=True)):
            pooled, dense = (torch.cat([x, x.new_zeros(more, x.shape[1])]) for x in (pooled, dense))
            lists = [torch.cat([x, x.new_zeros(more * h, x.shape[1])]) for x, h in zip(lists, self.hashes_of_lists, strict=True)]
            lengths = torch.cat([lengths, lengths.new_tensor(self.hashes)[:, None].expand(-1, more)], dim=1)
            domain = None if domain is None else torch.cat([domain, domain.new_zeros(more)])
        return self.program(pooled, lists, lengths, dense, domain)[:n]


def _integers(floats: pa.ChunkedArray, name: str, rows: pa.ChunkedArray) -> pa.Array:
    """What pandas made floats of because some were null.

    Raises:
        DistmtlError: one is not whole, or too large for its float to tell it from its neighbour.
    """
    x = floats.to_numpy()  # null is NaN
    null = np.isnan(x)
    wrong = ~null & ((x != np.trunc(x)) | (np.abs(x) >= 2.0 ** (np.finfo(x.dtype).nmant + 1)))
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        what = "is not whole" if x[i] != np.trunc(x[i]) else f"is beyond the integers that a {floats.type} holds exactly"
        raise DistmtlError(
            f"column {name!r}: {x[i]} at row {rows[i]} {what}, and the model was trained on integers; write those, null where unknown"
        )
    return pa.array(np.where(null, 0, x).astype(np.int64), mask=null)


def _loaded(folder: Path, of: Manifest, config: Config) -> tuple[Run, Predictions]:
    with (folder / MODEL).open("rb") as file:
        run = program.load(file, f"export {folder}: {MODEL}")
    return run, Predictions(config, {task: Calibration.from_dict(c) for task, c in of.calibrations.items()})
