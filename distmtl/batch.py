"""Batch: what the reader makes, the model eats and the loop accounts for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

NO_GROUP = -(2**63)  # of rows whose group is null: they count for no GAUC


@dataclass
class Batch(Pipelineable):
    """B rows on one rank; T tasks. A padding row has weight 0 in every task, no ids, and row -1."""

    sparse: KeyedJaggedTensor  # the embedded features, in config order, B rows
    dense: Tensor  # (B, width of the dense features), normalised
    labels: Tensor  # (B, T) float32; 0 where unknown
    weights: Tensor  # (B, T) float32: the row's weight where the label is known and all parents happened, else 0
    rows: Tensor  # (B,) int64: position of the row in the data set, files in name order
    groups: Tensor | None = None  # (B,) int64: value of the group column, NO_GROUP where null
    oracle: Tensor | None = None  # (B, 2T) float32: true probabilities, then had all parents happened; NaN where a task has none
    extras: Tensor | None = None  # (B, T) float32: the columns that losses read beside the labels, 0 where a task has none
    domain: Tensor | None = None  # (B,) int64, where the head asked for it; 0 in padding
    step: int = 0  # global step that trains it: 0 is the run's first
    replaced_ids: int = 0  # ids outside their table, replaced by policy
    contradictions: int = 0  # labels left out because an earlier task's contradicts them
    error: str | None = None  # the reader failed: all rows are padding, and this is why

    def _map(self, move: Any) -> Batch:
        moved = {f.name: move(v) for f in fields(self) if hasattr(v := getattr(self, f.name), "to")}
        return replace(self, **moved)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        self._map(lambda t: (t.record_stream(stream), t)[1])
