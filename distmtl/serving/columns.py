"""What a value of every column that a model reads may be: requests are checked against it, and OpenAPI tells it to clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa

from distmtl.config import BucketFeature, Config, IdFeature, Ids, NumericFeature, SequenceFeature, VectorFeature
from distmtl.data.collate import Collator, inputs_of_tasks
from distmtl.data.schema import OF, Kind, arrow_type

INT64 = -(2**63), 2**64 - 1  # signed and unsigned
FLOAT64 = 1.7976931348623157e308
FLOAT32 = 3.4e38
MAX_STRING = 1024  # characters of a string id


@dataclass(frozen=True)
class Column:
    """A column of the Parquet files that the model was trained on.

    Args:
        item: what it holds, of a list its elements.
        lengths: least and most elements of a list; None where it holds no lists.
        bounds: least and most of its numbers.
        nullable: null stands for unknown.
        typical: a value in the middle of its numbers, where a feature knows one.
    """

    name: str
    item: Kind
    lengths: tuple[int, int] | None
    bounds: tuple[float, float]
    nullable: bool
    typical: float | None = None

    @property
    def type(self) -> pa.DataType:
        return arrow_type(self.item) if self.lengths is None else pa.list_(arrow_type(self.item))


def columns(config: Config, kinds: dict[str, Kind], max_list: int) -> dict[str, Column]:
    """The columns that rows to be scored have, in the Collator's order. Of several features that read a column all must be content.

    Args:
        kinds: column → what it holds (Manifest.columns).
        max_list: most elements of a list that no feature bounds.
    """
    collator = Collator(config, labelled=False)
    return {name: _column(name, config, collator, kinds[name], max_list) for name in collator.columns}


def _column(name: str, config: Config, collator: Collator, kind: Kind, max_list: int) -> Column:
    low, high = INT64 if kind.endswith("integer") else (-FLOAT64, FLOAT64)
    least, most, nullable, typical = 0, max_list, True, None
    for f in (f for f in config.features if f.source == name):
        if f.name in collator.one_each and not (isinstance(f, IdFeature) and f.missing == "row"):
            nullable, least = False, 1
        if f.name in collator.one_each:
            most = 1
        match f:
            case Ids():
                if f.out_of_range == "error":
                    low, high = max(low, 0), min(high, f.rows - 1)
                if isinstance(f, SequenceFeature) and f.too_long == "error":
                    most = min(most, f.max_length)
            case VectorFeature():
                least, most, low, high = f.width, f.width, max(low, -FLOAT32), min(high, FLOAT32)
            case NumericFeature(log=log, mean=mean, std=std):
                typical = float(f"{math.copysign(math.expm1(min(abs(mean), 80.0)), mean) if log else mean:.3g}")
                if not log:
                    low, high = max(low, -FLOAT32 * std), min(high, FLOAT32 * std)
            case BucketFeature(boundaries=edges):
                typical = edges[len(edges) // 2]
    if name in inputs_of_tasks(config):
        low = max(low, 0)
    lists = kind.startswith(OF)
    return Column(name, kind.removeprefix(OF), (least, most) if lists else None, (low, high), nullable, typical)  # type: ignore[arg-type]
