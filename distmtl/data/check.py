"""Before training: schema, types, id ranges and label values of a data set against the config, every mistake at once.

Types and columns are checked in every file, id ranges and null counts from every row group's statistics (free: they are in
the footers), values in a sample of rows. What slips through is caught row by row when it is read. Of rows to be scored, columns
and types alone: a bad value costs one row, not all. There, ids may be floats that are whole, as pandas has integers with nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.config import BinaryTask, Config, IdFeature, Ids, SequenceFeature, VectorFeature, did_you_mean
from distmtl.data.collate import ROW, Collator, alike_type, is_list, is_string, label_rule
from distmtl.data.dataset import Dataset
from distmtl.data.schema import OF, Kind, kind_of
from distmtl.errors import DistmtlError

SAMPLE_ROWS = 4096
SAMPLE_PARTS = 4
PANDAS = "pandas makes floats of integers with nulls: write .astype('Int64')"


def check_dataset(dataset: Dataset, config: Config, split: str | None) -> None:
    """Compare a data set with the config.

    Args:
        split: train, validation or test; None is data that the config does not know, which may lack true probabilities.

    Raises:
        DistmtlError: every mistake, by file, column and value.
    """
    binary = [t for t in config.tasks if isinstance(t, BinaryTask)]
    named = [c for t in binary for c in (t.true_probability, t.true_probability_entire) if c]
    oracle = [] if split == "train" else [c for c in named if split or c in dataset.columns]
    collator = Collator(config, oracle=oracle, locate=dataset.locate)
    unknown = {t.column for t in config.tasks}  # labels without a known value so far
    kinds: dict[str, tuple[pa.DataType, str]] = {}  # every column's type so far, and a file that has it

    def look(file: pq.ParquetFile, p: int, path: str) -> list[str]:
        found = list(_schema_mistakes(file.schema_arrow, collator, path, kinds).values()) or _range_mistakes(file, config, path, unknown)
        if not found and p % max(len(dataset.parts) // SAMPLE_PARTS, 1) == 0:
            found = collator.mistakes(_sample(file, dataset, p, collator.columns))
        return found

    mistakes = _of_files(dataset, look)
    if not mistakes and split == "train":
        for task in config.tasks:
            if task.column in unknown:
                mistakes.append(f"label {task.column!r}: all {dataset.rows} rows are null; task {task.name!r} would have nothing to learn")
    _refuse(mistakes, f"{f'data.{split}' if split else 'data'} {dataset.path}")


def check_to_score(dataset: Dataset, config: Config, columns: Mapping[str, Kind], kept: Iterable[str]) -> None:
    """Compare a data set's columns with those that a model was trained on.

    Args:
        columns: what the model's columns held then.
        kept: further columns that must be there.

    Raises:
        DistmtlError: every mistake, by file and column.
    """
    collator = Collator(config, labelled=False)
    kinds: dict[str, tuple[pa.DataType, str]] = {}

    def look(file: pq.ParquetFile, _: int, path: str) -> list[str]:
        return _mistakes_to_score(file.schema_arrow, collator, columns, path, kinds, kept)

    _refuse(_of_files(dataset, look), f"data {dataset.path}")


def check_table_to_score(schema: pa.Schema, collator: Collator, columns: Mapping[str, Kind]) -> None:
    """The same of a table in memory.

    Raises:
        DistmtlError: every mistake, by column.
    """
    _refuse(_mistakes_to_score(schema, collator, columns, "the table", {}), "rows to score")


def _mistakes_to_score(
    schema: pa.Schema,
    collator: Collator,
    columns: Mapping[str, Kind],
    path: str,
    kinds: dict[str, tuple[pa.DataType, str]],
    kept: Iterable[str] = (),
) -> list[str]:
    whole = [f.with_type(pa.int64()) if columns.get(f.name) == "integer" and pa.types.is_floating(f.type) else f for f in schema]
    return list((_schema_mistakes(pa.schema(whole), collator, path, kinds, kept) | _held_otherwise(schema, columns, path)).values())


def _of_files(dataset: Dataset, look: Callable[[pq.ParquetFile, int, str], list[str]]) -> list[str]:
    """The mistakes that `look` finds in files, each once; it is given the file, its number and its path."""
    mistakes: dict[str, None] = {}
    for p, part in enumerate(dataset.parts):
        try:
            with dataset.open_part(p) as file:
                found = look(file, p, part.path)
        except (pa.ArrowException, OSError) as e:
            found = [f"{part.path} cannot be read: {str(e).splitlines()[0]}"]
        mistakes.update(dict.fromkeys(found))
    return list(mistakes)


def _refuse(mistakes: list[str], what: str) -> None:
    if mistakes:
        more = f"\n  … and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
        count = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)}"
        raise DistmtlError(f"{what}: {count}\n" + "\n".join(f"  - {m}" for m in mistakes[:20]) + more)


def _schema_mistakes(
    schema: pa.Schema, collator: Collator, path: str, kinds: dict[str, tuple[pa.DataType, str]], kept: Iterable[str] = ()
) -> dict[str, str]:
    """Column → what is wrong: missing, of a wrong type, or of one that does not go together with the files' before."""
    config, out = collator.config, dict[str, str]()
    for name in dict.fromkeys([*collator.columns, *kept]):
        if name not in schema.names:
            names = f"; it has {', '.join(schema.names[:12])}{' …' if len(schema.names) > 12 else ''}"
            out[name] = f"column {name!r} is missing in {path}{did_you_mean(name, schema.names) or names}"
        elif schema.names.count(name) > 1:
            out[name] = f"column {name!r} is {schema.names.count(name)} times in {path}; which one is meant cannot be told"
    wanted = [(f.source, f"feature {f.name!r}", *_wanted(f)) for f in config.features]
    if collator.labelled:
        wanted += [(t.column, f"label of task {t.name!r}", _is_number, "a number or boolean") for t in config.tasks]
    if config.data.weight and collator.labelled:
        wanted.append((config.data.weight, "data.weight", _is_number, "a number"))
    if config.data.group and collator.labelled:
        wanted.append((config.data.group, "data.group", lambda k: _is_integer(k) or is_string(k), "integers or strings"))
    wanted += [(c, "true_probability", _is_number, "a number") for c in collator.oracles if c]
    wanted += [(c, f"task {t.name!r}", _is_number, "a number") for c, t in zip(collator.extras, config.tasks, strict=False) if c]
    for name, what, fits, words in wanted:
        if name in out:
            continue
        kind = _plain(schema.field(name).type)
        if not (fits(kind) or pa.types.is_null(kind)):
            mend = f"; {PANDAS}" if pa.types.is_floating(kind) and words.startswith("integers") else ""
            out[name] = f"column {name!r} in {path} has type {kind}, but {what} needs {words}{mend}"
            continue
        before, first = kinds.setdefault(name, (kind, path))
        pair = [pa.schema([(name, alike_type(k))]) for k in (before, kind)]
        try:
            kinds[name] = pa.unify_schemas(pair, promote_options="permissive").field(name).type, path if pa.types.is_null(before) else first
        except pa.ArrowTypeError:
            out[name] = f"column {name!r} has type {before} in {first}, but {kind} in {path}; use one type"
    return out


def _held_otherwise(schema: pa.Schema, columns: Mapping[str, Kind], path: str) -> dict[str, str]:
    """Columns of strings that were none in training, of lists that were none, or the other way round: a string's hash, or that of "a|b"
    for [a, b], would stand for another row of the table."""
    out = {}
    for name, then in columns.items():
        kind = schema.field(name).type if schema.names.count(name) == 1 else pa.null()
        known = is_string(_inner(_plain(kind))) or _is_number(_inner(_plain(kind)))  # of other types a feature's needs say more
        now = kind_of(kind) if known else then
        if (now.startswith(OF), now.endswith("string")) != (then.startswith(OF), then.endswith("string")):
            words = [f"{'lists of ' * k.startswith(OF)}{k.removeprefix(OF)}s" for k in (now, then)]
            out[name] = (
                f"column {name!r} in {path} holds {words[0]}, but the model was trained on {words[1]} in it; write it as it was then"
            )
    return out


def _wanted(feature: Any) -> tuple[Any, str]:
    if isinstance(feature, IdFeature):
        return (lambda k: _is_integer(_inner(k)) or is_string(_inner(k))), "integers or strings, or lists of them"
    if isinstance(feature, SequenceFeature):
        return (lambda k: is_list(k) and (_is_integer(_inner(k)) or is_string(_inner(k)))), "lists of integers or strings"
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


def _range_mistakes(file: pq.ParquetFile, config: Config, path: str, unknown: set[str]) -> list[str]:
    """From the statistics of every row group; takes the labels it finds a value of out of `unknown`."""
    ids: dict[str, Ids] = {}  # of a column's features, the one with the smallest table
    for f in config.embedded:
        if isinstance(f, Ids) and f.out_of_range == "error" and (f.source not in ids or f.rows < ids[f.source].rows):
            ids[f.source] = f
    rules = {t.column: rule for t in config.tasks if (rule := label_rule(t))}
    out: dict[str, None] = {}
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            path_in_file, statistics = column.path_in_schema, column.statistics
            name = path_in_file.rsplit(".", 2)[0] if file.schema.column(c).max_repetition_level else path_in_file  # x.list.element
            if name in unknown and group.num_rows:
                nulls = statistics.null_count if statistics and statistics.has_null_count else None
                if nulls is None:  # without statistics only the values tell
                    nulls = file.read_row_group(g, [name], use_threads=False)[name].null_count
                if nulls < group.num_rows:
                    unknown.discard(name)
            if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int | float | bool):
                continue
            low, high = statistics.min, statistics.max
            if name in ids and (low < 0 or high >= ids[name].rows):
                bad = low if low < 0 else high
                out[
                    f"feature {ids[name].name!r}: id {bad} in {path}, row group {g}, is outside its table's 0 … {ids[name].rows - 1}; "
                    "raise rows, or set out_of_range to hash, clip or oov"
                ] = None
            if name in rules:
                least, most, words = rules[name]
                if low < least or high > most:
                    out[f"label {name!r}: {low if low < least else high} in {path}, row group {g}; {words}, or null where unknown"] = None
    return list(out)


def _sample(file: pq.ParquetFile, dataset: Dataset, part: int, columns: list[str]) -> pa.Table:
    batch = next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=columns, use_threads=False), None)
    table = file.schema_arrow.empty_table().select(columns) if batch is None else pa.Table.from_batches([batch])
    start = int(dataset.group_starts[dataset.groups.index((part, 0))]) if dataset.parts[part].group_rows else 0
    return table.append_column(ROW, pa.array(np.arange(start, start + table.num_rows)))
