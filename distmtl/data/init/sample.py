"""What the columns of a log hold, from a sample of its rows that is drawn by their numbers' hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.data.collate import alike, alike_type, is_list, is_string
from distmtl.data.dataset import Dataset
from distmtl.data.hashing import mix
from distmtl.errors import DistmtlError

SAMPLE_ROWS = 200_000
READ_ROWS = 3_000_000  # of a larger log, whole row groups at even distances
BATCH_ROWS = 32_768

Holds = Literal[
    "integer", "string", "number", "boolean", "time", "list of integer", "list of string", "list of number", "nothing", "something else"
]


@dataclass(frozen=True, eq=False)
class Column:
    """The values of a column in a sample, `low` and `high` those of the whole log where its footers know them."""

    name: str
    holds: Holds
    values: pa.Array
    share: float  # of all rows that are in the sample
    low: Any = None
    high: Any = None
    not_finite: int = 0  # NaN or infinite ones, null in `values`

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def nulls(self) -> int:
        return self.values.null_count

    @cached_property
    def known(self) -> pa.Array:
        return self.values.drop_null()

    @cached_property
    def counts(self) -> np.ndarray:
        """How often every value is there."""
        return pc.value_counts(self.known).field("counts").to_numpy()

    @property
    def distinct(self) -> int:
        return len(self.counts)

    @property
    def estimate(self) -> int:
        """Different values in the whole log: √(N/n)·f₁ + Σ_{j>1} f_j, f_j values being j times in n of N rows.

        GEE (Charikar et al. 2000), wrong by a factor of at most about √(N/n), which no estimator can better much.
        """
        once = int((self.counts == 1).sum())
        out = self.distinct - once + round(once / self.share**0.5)
        return out if self.low is None else min(out, self.high - self.low + 1)

    @property
    def unique(self) -> bool:
        """No value is there twice, and enough rows were seen for that to say something: two of 2 rows each would have met."""
        enough = len(self.known) * self.share >= 20
        return enough and self.distinct == len(self.known)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The known values as float64, times as microseconds."""
        kind = self.known.type
        if pa.types.is_temporal(kind):
            return instants(self.known).to_numpy(zero_copy_only=False).astype(np.float64)
        return self.known.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Of the lists, a null one's being 0."""
        return pc.list_value_length(self.values).fill_null(0).to_numpy(zero_copy_only=False)

    @property
    def elements(self) -> Column:
        """What the lists hold."""
        flat = self.values.flatten()
        flat = flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat
        holds: Holds = self.holds.removeprefix("list of ")  # type: ignore[assignment]
        return replace(self, holds=holds, values=flat)


def instants(times: pa.Array | pa.ChunkedArray) -> Any:
    """Times, dates or numbers as numbers that order the rows."""
    if pa.types.is_temporal(times.type):
        return times.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    return times


def schema_of(dataset: Dataset) -> pa.Schema:
    """One schema for all files.

    Raises:
        DistmtlError: a column has types in two files that do not go together, or is there twice.
    """
    out: dict[str, tuple[pa.DataType, str]] = {}
    for p, part in enumerate(dataset.parts):
        with dataset.open_part(p) as file:
            schema = file.schema_arrow
        for field in schema:
            if schema.names.count(field.name) > 1:
                raise DistmtlError(f"column {field.name!r} is {schema.names.count(field.name)} times in {part.path}; rename one of them")
            before, where = out.get(field.name, (pa.null(), part.path))
            kind = alike_type(field.type)
            pair = [pa.schema([(field.name, k)]) for k in (before, kind)]
            try:
                out[field.name] = pa.unify_schemas(pair, promote_options="permissive").field(0).type, where
            except pa.ArrowTypeError:
                raise DistmtlError(
                    f"column {field.name!r} has type {before} in {where}, but {kind} in {part.path}; write it with one type in all files"
                ) from None
    return pa.schema([(name, kind) for name, (kind, _) in out.items()])


def tables(dataset: Dataset, schema: pa.Schema, groups: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of some row groups, a batch at a time, and the number of each batch's first."""
    for g in groups:
        part, group = dataset.groups[g]
        row = int(dataset.group_starts[g])
        with dataset.open_part(part) as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                table = pa.concat_tables([schema.empty_table(), alike(pa.Table.from_batches([batch]))], promote_options="permissive")
                yield row, table
                row += len(batch)


def read_sample(dataset: Dataset, schema: pa.Schema) -> list[Column]:
    """Every column in at most about SAMPLE_ROWS rows, or in all."""
    count = len(dataset.groups)
    step = max(1, -(-dataset.rows // READ_ROWS))
    groups = range(0, count, min(step, count))
    read = int(dataset.group_rows[list(groups)].sum())
    every = np.uint64(max(1, -(-read // SAMPLE_ROWS)))
    taken = []
    for first, table in tables(dataset, schema, groups):
        chosen = mix(np.arange(first, first + len(table))) % every == 0
        taken.append(table if every == 1 else table.filter(pa.array(chosen)))
    sample = pa.concat_tables(taken)
    ranges, booleans = _ranges(dataset), _booleans(dataset)
    return [_column(name, sample, len(sample) / dataset.rows, ranges, booleans) for name in schema.names]


def _column(name: str, sample: pa.Table, share: float, ranges: dict[str, tuple[Any, Any]], booleans: set[str]) -> Column:
    values = sample[name].combine_chunks()
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    clean = finite(values)
    holds = "boolean" if name in booleans else holds_of(values.type)
    low, high = ranges.get(name, (None, None))
    if low is None and holds.removeprefix("list of ") == "integer":
        flat = values.flatten() if is_list(values.type) else values
        low, high = pc.min_max(flat).as_py().values() if len(flat) else (None, None)
    return Column(name, holds, clean, share, low, high, clean.null_count - values.null_count)


def finite(values: Any) -> Any:
    """NaN and infinite numbers as null."""
    if not pa.types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_finite(values), values, None)


def holds_of(kind: pa.DataType) -> Holds:
    if pa.types.is_null(kind):
        return "nothing"
    if pa.types.is_temporal(kind):
        return "time" if pa.types.is_timestamp(kind) or pa.types.is_date(kind) else "something else"
    if is_list(kind):
        inner = holds_of(alike_type(kind.value_type))
        return f"list of {inner}" if inner in ("integer", "string", "number") else "something else"  # type: ignore[return-value]
    if is_string(kind):
        return "string"
    if pa.types.is_integer(kind):
        return "integer"
    return "number" if pa.types.is_floating(kind) or pa.types.is_decimal(kind) else "something else"


def _booleans(dataset: Dataset) -> set[str]:
    return {f.name for f in dataset.schema if pa.types.is_boolean(f.type)}


def _ranges(dataset: Dataset) -> dict[str, tuple[Any, Any]]:
    """Least and largest integer of every column, where all row groups have statistics."""
    out: dict[str, tuple[Any, Any]] = {}
    unknown: set[str] = set()
    for p in range(len(dataset.parts)):
        with dataset.open_part(p) as file:
            for g in range(file.metadata.num_row_groups):
                for c in range(file.metadata.num_columns):
                    chunk = file.metadata.row_group(g).column(c)
                    path, statistics = chunk.path_in_schema, chunk.statistics
                    name = path.rsplit(".", 2)[0] if file.schema.column(c).max_repetition_level else path  # x.list.element
                    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                        if statistics is None or statistics.null_count != chunk.num_values:
                            unknown.add(name)
                        continue
                    low, high = out.get(name, (statistics.min, statistics.max))
                    out[name] = min(low, statistics.min), max(high, statistics.max)
    return {name: bounds for name, bounds in out.items() if name not in unknown}
