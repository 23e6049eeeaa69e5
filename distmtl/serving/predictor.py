"""Predictor: rows with features → what every task predicts of them. Batch and online scoring, and the parity gate, all use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.calibration import Calibration
from distmtl.config import MulticlassTask
from distmtl.data.collate import ROW, Collator
from distmtl.data.rows import batch_of
from distmtl.data.schema import arrow_type
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest, program
from distmtl.exporting.manifest import MODEL, Manifest
from distmtl.scores import Predictions, served
from distmtl.serving.lookup import Lookup


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
        self.lookup = Lookup(self.config, self.manifest.row_format)
        self.lookup.load(folder)
        self.hashes = program.hashes(self.config)
        self.hashes_of_lists = [h for h, key in zip(self.hashes, self.lookup.keys, strict=True) if key in self.lookup.lists]
        self._take(folder, self.manifest)

    def _take(self, folder: Path, of: Manifest) -> None:
        """All but the tables."""
        self.manifest = of
        with (folder / MODEL).open("rb") as file:
            self.program = program.load(file, f"export {folder}: {MODEL}")
        self.predictions = Predictions(self.config, {task: Calibration.from_dict(c) for task, c in of.calibrations.items()})

    def apply(self, path: str | Path) -> None:
        """Become what a delta makes of this export.

        Raises:
            DistmtlError: it is damaged, or of another export than this one.
        """
        folder = Path(path)
        delta = manifest.read(folder)
        if delta.base != self.manifest.digest:
            raise DistmtlError(f"delta {folder} changes export {delta.base}, and this is {self.manifest.digest}; apply those between first")
        manifest.verify(folder, delta)
        for table in self.lookup.weights:
            if (file := folder / "tables" / table / "changed.safetensors").exists():
                rows = load_file(file)
                self.lookup.update(table, rows.pop("rows"), rows)
        self._take(folder, delta)

    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Task → (n,) float32, a probability of a binary one, or (n, classes) probabilities, of rows in their order.

        Args:
            table: has `self.schema`'s columns, in types that training data may have.

        Raises:
            DistmtlError: a value that the model does not take, with its column and row (counted from 0).
        """
        n = table.num_rows
        if not n:
            return {t.name: np.zeros((0, t.classes) if isinstance(t, MulticlassTask) else 0, np.float32) for t in self.config.tasks}
        rows = self.collate(table.append_column(ROW, pa.array(np.arange(n))))
        self._refuse_unseen(rows.domain)
        batch = batch_of([(rows, 0, n)], self.collate.keys, n)
        with torch.inference_mode():
            outputs = self._outputs(batch.sparse, batch.dense, batch.domain)
            predicted = self.predictions(outputs, batch.sparse, batch.extras)
            return {t.name: served(t, p) for t, p in zip(self.config.tasks, predicted, strict=True)}

    def _refuse_unseen(self, domains: np.ndarray | None) -> None:
        if domains is None or self.manifest.domains is None:
            return
        if (unseen := ~np.isin(domains, self.manifest.domains)).any():
            row = int(np.flatnonzero(unseen)[0])
            raise DistmtlError(
                f"domain {domains[row]} of row {row} was never seen in training; leave such rows out, or train on rows of that "
                f"{self.config.domain}"
            )

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
