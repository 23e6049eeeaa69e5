"""Before training: schema, types, id ranges and label values of a data set against the config, every mistake at once.

Types and columns are checked in every file, id ranges and null counts from every row group's statistics (free: they are in
the footers), values in a sample of rows. What slips through is caught row by row when it is read.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.config import BinaryTask, Config, IdFeature, VectorFeature
from distmtl.data.collate import ROW, Collator, is_list, is_string
from distmtl.data.dataset import Dataset
from distmtl.errors import DistmtlError

SAMPLE_ROWS = 4096
SAMPLE_PARTS = 4


def check_dataset(dataset: Dataset, config: Config, split: str) -> None:
    """Compare a data set with the config.

    Raises:
        DistmtlError: every mistake, by file, column and value.
    """
    collator = Collator(config, oracle=split != "train", locate=dataset.locate)
    mistakes: dict[str, None] = {}
    nulls = dict.fromkeys([t.column for t in config.tasks], 0)
    for p, part in enumerate(dataset.parts):
        with dataset.open_part(p) as file:
            found = _schema_mistakes(file.schema_arrow, collator, config, part.path)
            if not found:
                found = _range_mistakes(file, config, part.path, nulls)
            if not found and p % max(len(dataset.parts) // SAMPLE_PARTS, 1) == 0:
                found = collator.mistakes(_sample(file, dataset, p, collator.columns))
        mistakes.update(dict.fromkeys(found))
    if not mistakes:
        for task in config.tasks:
            if nulls[task.column] == dataset.rows:
                mistakes[f"label {task.column!r}: all {dataset.rows} rows are null; task {task.name!r} would have nothing to learn"] = None
    if mistakes:
        lines = list(mistakes)
        more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise DistmtlError(f"data.{split} {dataset.path}: {len(lines)} mistake(s)\n" + "\n".join(f"  - {m}" for m in lines[:20]) + more)


def _schema_mistakes(schema: pa.Schema, collator: Collator, config: Config, path: str) -> list[str]:
    out = []
    for name in collator.columns:
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"it has {', '.join(schema.names[:12])}{' …' if len(schema.names) > 12 else ''}"
            )
            out.append(f"column {name!r} is missing in {path}; {hint}")
    if out:
        return out
    wanted = [(f.source, f"feature {f.name!r}", *_wanted(f)) for f in config.features]
    wanted += [(t.column, f"label of task {t.name!r}", _is_number, "a number or boolean") for t in config.tasks]
    if config.data.weight:
        wanted.append((config.data.weight, "data.weight", _is_number, "a number"))
    if config.data.group:
        wanted.append((config.data.group, "data.group", lambda k: _is_integer(k) or is_string(k), "an integer or string"))
    for name, what, fits, words in wanted:
        kind = _plain(schema.field(name).type)
        if not fits(kind):
            out.append(f"column {name!r} in {path} has type {kind}, but {what} needs {words}")
    return out


def _wanted(feature: Any) -> tuple[Any, str]:
    if isinstance(feature, IdFeature):
        return (lambda k: _is_integer(_inner(k)) or is_string(_inner(k))), "integers or strings, or lists of them"
    if isinstance(feature, VectorFeature):
        return (lambda k: is_list(k) and pa.types.is_floating(_inner(k))), "lists of floats"
    return _is_number, "a number"


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _inner(kind: pa.DataType) -> pa.DataType:
    return _plain(kind.value_type) if is_list(kind) else kind


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)


def _range_mistakes(file: pq.ParquetFile, config: Config, path: str, nulls: dict[str, int]) -> list[str]:
    """From the statistics of every row group; adds up the nulls of every label."""
    ids = {f.source: f for f in config.embedded if isinstance(f, IdFeature) and f.out_of_range == "error"}
    binary = {t.column: t for t in config.tasks if isinstance(t, BinaryTask)}
    out: dict[str, None] = {}
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            name, statistics = column.path_in_schema.split(".")[0], column.statistics
            if statistics is None:
                continue
            if name in nulls and statistics.has_null_count:
                nulls[name] += statistics.null_count
            if not statistics.has_min_max or not isinstance(statistics.min, int | float | bool):
                continue
            low, high = statistics.min, statistics.max
            if name in ids and (low < 0 or high >= ids[name].rows):
                bad = low if low < 0 else high
                out[
                    f"feature {ids[name].name!r}: id {bad} in {path}, row group {g}, is outside its table's 0 … {ids[name].rows - 1}; "
                    "raise rows, or set out_of_range to hash or clip"
                ] = None
            if name in binary and (low < 0 or high > 1):
                out[
                    f"label {name!r}: {low if low < 0 else high} in {path}, row group {g}; a binary label is 0 or 1, or null where unknown"
                ] = None
    return list(out)


def _sample(file: pq.ParquetFile, dataset: Dataset, part: int, columns: list[str]) -> pa.Table:
    batch = next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=columns, use_threads=False), None)
    table = file.schema_arrow.empty_table().select(columns) if batch is None else pa.Table.from_batches([batch])
    start = int(dataset.group_starts[dataset.groups.index((part, 0))]) if dataset.parts[part].group_rows else 0
    return table.append_column(ROW, pa.array(np.arange(start, start + table.num_rows)))
