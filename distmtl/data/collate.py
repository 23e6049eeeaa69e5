"""Arrow columns → Rows, checked. Training, evaluation and serving all read rows through here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.batch import NO_GROUP
from distmtl.config import (
    BinaryTask,
    BucketFeature,
    Config,
    IdFeature,
    Ids,
    LognormalTask,
    MulticlassTask,
    NumericFeature,
    OrdinalTask,
    QuantileTask,
    SequenceFeature,
    TaskConfig,
    VectorFeature,
    WatchTimeTask,
)
from distmtl.data.hashing import hash_strings, into_rows, into_table, remainder_and_quotient
from distmtl.data.id_dropout import kept_ids
from distmtl.data.rows import Bag, Rows
from distmtl.errors import DistmtlError

ROW = "__row__"  # the reader adds a row's number in the data set under this name
Each = Callable[..., Iterator[Any]]  # as `map`: results in order, the first exception of them raised


class Collator:
    """Columns of a table, checked, as arrays.

    Args:
        config: features, tasks, weight and group columns.
        oracle: columns of true probabilities that may be read; tasks whose column is not among them have none.
        locate: row number → where that row is, for error messages.
        training: ids are dropped (Ids.id_dropout).
        labelled: False where rows are to be scored: their labels are not read, and all count for every task.
    """

    def __init__(
        self,
        config: Config,
        *,
        oracle: Collection[str] = (),
        locate: Callable[[int], str] = "row {}".format,
        training: bool = False,
        labelled: bool = True,
    ):
        self.config, self.locate, self.training, self.labelled = config, locate, training, labelled
        self.keys = [f.name for f in config.embedded]
        self.one_each = {f.target: f"the target of {f.name!r}" for f in config.sequences} | {config.domain: "the head's domain"}
        self.dense_width = sum(f.width for f in config.dense)
        known = [getattr(t, name, None) for name in ("true_probability", "true_probability_entire") for t in config.tasks]
        self.oracles = [c if c in oracle else None for c in known]
        if not any(self.oracles):
            self.oracles = []
        self.extras = [t.extra for t in config.tasks] if any(t.extra for t in config.tasks) else []
        if not labelled:
            self.oracles, self.extras = [], inputs_of_tasks(config)
        targets = [t.column for t in config.tasks] + [config.data.group, config.data.weight, *self.oracles] if labelled else []
        self.columns = list(dict.fromkeys(c for c in [*(f.source for f in config.features), *targets, *self.extras] if c))

    def __call__(self, table: pa.Table, order: np.ndarray | None = None, epoch: int = 0, each: Each = map) -> Rows:
        """The table's rows, permuted, as an epoch trains them; the columns of features by `each`.

        Raises:
            DistmtlError: a value that must not be trained, with its column and place.
        """
        n, tasks = table.num_rows, len(self.config.tasks)
        column = lambda name: _whole(table[name])  # noqa: E731  # not all at once: it copies
        numbers = column(ROW).to_numpy()
        at = lambda i: self.locate(int(numbers[i]))  # noqa: E731

        def permuted(values: np.ndarray) -> np.ndarray:
            return values if order is None else values.take(order, axis=0)

        def put(values: np.ndarray, out: np.ndarray) -> None:
            if order is None:
                out[:] = values
            elif out.flags.c_contiguous and out.dtype == values.dtype:
                np.take(values, order, axis=0, out=out, mode="clip")  # "raise" would buffer
            else:
                out[:] = permuted(values)

        bags: dict[int, Bag] = {}
        single = np.empty((len(self.keys), n), dtype=np.int64)

        def put_ids(f: int) -> np.ndarray | None:
            feature = self.config.embedded[f]
            ids, lengths, outside = self._ids(column(feature.source), feature, at)
            if self.training and isinstance(feature, Ids) and feature.id_dropout:
                ids = kept_ids(ids, lengths, numbers, feature, (self.config.run.seed, epoch))
            if lengths is None:
                put(ids, single[f])
            else:
                bags[f] = Bag.of(ids, lengths, order)
            return outside

        replaced = np.zeros(n, dtype=np.int64)
        for outside in each(put_ids, range(len(self.keys))):
            if outside is not None:
                replaced += permuted(outside)
        dense, start = np.empty((n, self.dense_width), dtype=np.float32), 0
        for number in self.config.dense:
            put(_dense(column(number.source), number, at), dense[:, start : start + number.width])
            start += number.width

        labels, weights = np.zeros((n, tasks), dtype=np.float32), np.ones((n, tasks), dtype=np.float32)
        contradicting = np.zeros(n, dtype=np.int64)
        if self.labelled:
            weight = _weight(column(self.config.data.weight), self.config.data.weight, at) if self.config.data.weight else np.float32(1)
            for t, task in enumerate(self.config.tasks):
                label, known = _label(column(task.column), task, at)
                labels[:, t], weights[:, t] = label, known * weight
            contradicting = self._after_their_parents(labels, weights, at)
        extras = self._extras(column, weights, at)
        groups, oracle, extras = (None if a is None else permuted(a) for a in (self._groups(column), self._oracle(column, n), extras))
        domain = single[self.keys.index(self.config.domain)] if self.config.domain else None
        return Rows(
            single,
            bags,
            dense,
            permuted(labels),
            permuted(weights),
            permuted(numbers),
            replaced,
            permuted(contradicting),
            groups,
            oracle,
            extras,
            domain,
        )

    def _ids(
        self, array: pa.Array, feature: Ids | BucketFeature, at: Callable[[int], str]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """As _embedded, with missing rows; and of a feature that something needs one id of in every row, just that."""
        ids, lengths, outside = _embedded(array, feature, at)
        if isinstance(feature, IdFeature) and feature.missing == "row":
            ids, lengths = _with_missing(ids, lengths, feature)
        if lengths is None or feature.name not in self.one_each:
            return ids, lengths, outside
        given = -(-lengths // feature.lookups)  # the missing row is a single one
        if (given != 1).any():
            i = _first(given != 1)
            raise DistmtlError(
                f"feature {feature.name!r}: {given[i]} values at {at(i)}; {self.one_each[feature.name]}: every row has exactly one"
            )
        return ids, lengths if (lengths > 1).any() else None, outside

    def _after_their_parents(self, labels: np.ndarray, weights: np.ndarray, at: Callable[[int], str]) -> np.ndarray:
        """Leave out labels of tasks that could not happen because one before them did not. (n,) how many of these say they did.

        Raises:
            DistmtlError: more of them than data.max_contradictions.
        """
        config, contradicting = self.config, np.zeros(len(labels), dtype=np.int64)
        never: dict[int, np.ndarray] = {}
        for t in config.by_descent:
            task = config.tasks[t]
            parents = [config.place_of(p) for p in config.conditions(task)]
            if not parents:
                continue
            impossible = np.zeros(len(labels), dtype=bool)
            for p in parents:
                impossible |= (weights[:, p] > 0) & (labels[:, p] < 0.5) | never.get(p, False)
            never[t] = impossible
            wrong = impossible & (weights[:, t] > 0) & (labels[:, t] > 0.5) & isinstance(task, BinaryTask)
            expected = config.data.max_contradictions * len(labels)
            if wrong.sum() > math.ceil(expected + 4 * math.sqrt(expected)):  # these are few rows of many: four deviations for chance
                raise DistmtlError(
                    f"label {task.column!r}: {wrong.sum()} of {len(labels)} rows have {task.name} without {' and '.join(task.parents)}, "
                    f"such as {at(_first(wrong))}; mend the labels, raise data.max_contradictions ({config.data.max_contradictions:g}) to "
                    "leave them out, or set the task's space to labelled"
                )
            contradicting += wrong
            weights[impossible, t] = 0
        return contradicting

    def _extras(self, column: Callable[[str], pa.Array], weights: np.ndarray, at: Callable[[int], str]) -> np.ndarray | None:
        if not self.extras:
            return None
        out = np.zeros(weights.shape, dtype=np.float32)
        for t, name in enumerate(self.extras):
            if not name:
                continue
            array = column(name)
            out[:, t] = _floats(array, pa.float32())
            _no_nan(out[:, t], f"column {name!r}", at)
            wrong = out[:, t] < 0
            if isinstance(self.config.tasks[t], BinaryTask):  # a delay that nobody knows; a duration may be unknown
                wrong |= array.is_null().to_numpy(zero_copy_only=False) & (weights[:, t] > 0)
            if wrong.any():
                i = _first(wrong)
                raise DistmtlError(f"column {name!r}: {array[i]} at {at(i)}; task {self.config.tasks[t].name!r} needs a number ≥ 0")
        return out

    def mistakes(self, table: pa.Table) -> list[str]:
        """What `__call__` would refuse, every column's first mistake instead of the first column's."""
        column = lambda name: _whole(table[name])  # noqa: E731  # not all at once: it copies
        numbers = column(ROW).to_numpy()
        at = lambda i: self.locate(int(numbers[i]))  # noqa: E731
        checks: list[Callable[[], object]] = [lambda f=f: self._ids(column(f.source), f, at) for f in self.config.embedded]  # type: ignore[misc]
        checks += [lambda f=f: _dense(column(f.source), f, at) for f in self.config.dense]  # type: ignore[misc]
        checks += [lambda t=t: _label(column(t.column), t, at) for t in self.config.tasks]  # type: ignore[misc]
        if self.config.data.weight:
            checks.append(lambda: _weight(column(self.config.data.weight or ""), self.config.data.weight or "", at))
        out = []
        for check in checks:
            try:
                check()
            except DistmtlError as e:
                out.append(str(e))
        if not out:  # what columns say together
            try:
                self(table)
            except DistmtlError as e:
                out.append(str(e))
        return out

    def padding(self) -> Rows:
        """No rows at all: what a batch of padding alone is made of."""
        no = lambda *width: np.zeros((0, *width), dtype=np.float32)  # noqa: E731
        none, tasks = np.zeros(0, dtype=np.int64), len(self.config.tasks)
        groups, oracle = none if self.config.data.group else None, no(2 * tasks) if self.oracles else None
        extras, domain = no(tasks) if self.extras else None, none if self.config.domain else None
        single = np.zeros((len(self.keys), 0), dtype=np.int64)
        return Rows(single, {}, no(self.dense_width), no(tasks), no(tasks), none, none, none, groups, oracle, extras, domain)

    def _groups(self, column: Callable[[str], pa.Array]) -> np.ndarray | None:
        if not self.config.data.group or not self.labelled:
            return None
        values = column(self.config.data.group)
        if is_string(values.type):
            out = hash_strings(values.fill_null(""))
        else:
            out = values.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), NO_GROUP, out) if values.null_count else out

    def _oracle(self, column: Callable[[str], pa.Array], n: int) -> np.ndarray | None:
        if not self.oracles:
            return None
        out = np.full((n, len(self.oracles)), np.nan, dtype=np.float32)
        for t, name in enumerate(self.oracles):
            if name:
                out[:, t] = column(name).to_numpy(zero_copy_only=False)
        return out


def inputs_of_tasks(config: Config) -> list[str | None]:
    """Of every task, the column beside the features without which it predicts nothing: a video's duration. [] where there is none."""
    columns = [t.extra if isinstance(t, QuantileTask) else None for t in config.tasks]
    return columns if any(columns) else []


def is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def alike(table: pa.Table) -> pa.Table:
    """The table with types that files may mix, and Arrow would not, made one: dictionaries decoded, truth values and uint64 as integers."""
    for i, field in enumerate(table.schema):
        if (kind := alike_type(field.type)) != field.type:
            table = table.set_column(i, field.name, pc.cast(table.column(i), kind, safe=False))
    return table


def alike_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return alike_type(kind.value_type)
    return pa.int8() if pa.types.is_boolean(kind) else pa.int64() if pa.types.is_uint64(kind) else kind


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.array([], column.type)
    return _plain(array)


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def _embedded(
    array: pa.Array, feature: Ids | BucketFeature, at: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Table rows of every id, ids per row (None: one each), and how many of each row's the policy replaced (None: none)."""
    if isinstance(feature, BucketFeature):
        return _buckets(array, feature, at), None, None
    lengths: np.ndarray | None = None
    n = len(array)
    if is_list(array.type):
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        array = _plain(array.flatten())
        if array.null_count:
            row = _row_of(_first(array.is_null().to_numpy(zero_copy_only=False)), lengths)
            raise DistmtlError(f"feature {feature.name!r}: a null inside a list at {at(row)}; leave it out of the list")
        if isinstance(feature, SequenceFeature) and n and lengths.max() > feature.max_length:
            array, lengths = _cut(array, lengths, feature, at)
    elif array.null_count:
        lengths = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)
        array = array.drop_null()
    if is_string(array.type):
        try:
            ids = hash_strings(array)
        except UnicodeDecodeError as e:
            raise DistmtlError(f"feature {feature.name!r}: {e.object!r:.80} is not UTF-8 text, in the rows from {at(0)} on") from None
    else:
        whole = array if array.type == pa.int64() else array.cast(pa.int64(), safe=False)  # a uint64 beyond int64 becomes negative
        ids = whole.to_numpy(zero_copy_only=False)
    if feature.hashes > 1:
        lengths = feature.hashes * (np.ones(n, dtype=np.int32) if lengths is None else lengths)
        quotient = feature.out_of_range == "quotient"
        rows = remainder_and_quotient(ids, feature.rows) if quotient else into_rows(ids, feature.rows, feature.hashes)
        return rows.reshape(-1), lengths, None
    if is_string(array.type):
        return into_table(ids, feature.rows), lengths, None
    if not len(ids) or ids.view(np.uint64).max() < feature.rows:  # a negative one is huge as unsigned
        return ids, lengths, None
    outside = (ids < 0) | (ids >= feature.rows)
    if feature.out_of_range == "error":
        first = _first(outside)
        raise DistmtlError(
            f"feature {feature.name!r}: id {array[first]} at {at(_row_of(first, lengths))} is outside its table's 0 … {feature.rows - 1}; "
            "raise rows, or set out_of_range to hash, clip or oov"
        )
    ids = ids.copy()
    match feature.out_of_range:
        case "hash":
            ids[outside] = into_table(ids[outside], feature.rows)
        case "clip":
            ids[outside] = feature.rows - 1
        case "oov":
            ids[outside] = feature.row_of("oov")
    return ids, lengths, np.bincount(_row_of(np.flatnonzero(outside), lengths), minlength=n)


def _with_missing(ids: np.ndarray, lengths: np.ndarray | None, feature: IdFeature) -> tuple[np.ndarray, np.ndarray | None]:
    """The same, and one id, the missing row, where a row has none."""
    if lengths is None or lengths.all():
        return ids, lengths
    filled = np.maximum(lengths, 1)
    out = np.full(filled.sum(), feature.row_of("missing"))
    out[np.repeat(lengths > 0, filled)] = ids
    return out, None if len(out) == len(filled) else filled


def _cut(ids: pa.Array, lengths: np.ndarray, feature: SequenceFeature, at: Callable[[int], str]) -> tuple[pa.Array, np.ndarray]:
    """The ids and lengths of lists that are no longer than the feature allows."""
    if feature.too_long == "error":
        row = _first(lengths > feature.max_length)
        raise DistmtlError(
            f"feature {feature.name!r}: a list of {lengths[row]} ids at {at(row)}, but max_length is {feature.max_length}; raise it, "
            "or set too_long to newest or oldest"
        )
    kept = np.minimum(lengths, feature.max_length)
    left_out = lengths - kept if feature.too_long == "newest" else np.zeros_like(lengths)
    before = np.repeat(np.cumsum(lengths) - lengths + left_out - (np.cumsum(kept) - kept), kept)
    return ids.take(pa.array(np.arange(len(before)) + before)), kept


def _row_of(ids: Any, lengths: np.ndarray | None) -> Any:
    """The rows that the ids at some positions belong to."""
    return ids if lengths is None else np.repeat(np.arange(len(lengths)), lengths)[ids]


def _buckets(array: pa.Array, feature: BucketFeature, at: Callable[[int], str]) -> np.ndarray:
    known = array.is_valid().to_numpy(zero_copy_only=False)
    x = _floats(array)
    _no_nan(x, f"feature {feature.name!r}", at)
    return np.where(known, np.searchsorted(np.asarray(feature.boundaries), x, side="right") + 1, 0)


def _dense(array: pa.Array, feature: NumericFeature | VectorFeature, at: Callable[[int], str]) -> np.ndarray:
    """(n, width) float32, or (n, 1) normalised."""
    if isinstance(feature, VectorFeature):
        return _vectors(array, feature, at)
    plain = not feature.log and feature.mean == 0.0 and feature.std == 1.0
    x = normalised = _floats(array, array.type if plain and pa.types.is_float32(array.type) else pa.float64())
    if not plain:
        normalised = ((np.sign(x) * np.log1p(np.abs(x)) if feature.log else x) - feature.mean) / feature.std
    if array.null_count:
        normalised = np.where(array.is_valid().to_numpy(zero_copy_only=False), normalised, 0.0)
    with np.errstate(over="ignore"):
        out = normalised.astype(np.float32, copy=False)
    if not np.isfinite(out).all():
        _no_nan(x, f"feature {feature.name!r}", at)
        i = _first(~np.isfinite(out))
        raise DistmtlError(
            f"feature {feature.name!r}: {array[i]} at {at(i)} is {normalised[i]:g} after normalisation, beyond float32; use log: true"
        )
    return out[:, None]


def _floats(array: pa.Array, kind: pa.DataType = pa.float64()) -> np.ndarray:  # noqa: B008
    """Numbers with 0 where null; large integers are rounded."""
    numbers = array.cast(kind, safe=False)
    return (numbers.fill_null(0) if array.null_count else numbers).to_numpy(zero_copy_only=False)


def _vectors(array: pa.Array, feature: VectorFeature, at: Callable[[int], str]) -> np.ndarray:
    if pa.types.is_null(array.type):
        return np.zeros((len(array), feature.width), dtype=np.float32)
    known = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    wrong = known & (lengths != feature.width)
    if wrong.any():
        i = _first(wrong)
        raise DistmtlError(f"feature {feature.name!r}: a vector of {int(lengths[i])} numbers at {at(i)}, but width is {feature.width}")
    values = array.flatten().cast(pa.float32())
    flat = values.to_numpy(zero_copy_only=False)
    if not np.isfinite(flat).all():
        row = int(np.flatnonzero(known)[_first(~np.isfinite(flat)) // feature.width])
        raise DistmtlError(f"feature {feature.name!r}: a NaN, infinite or null number in the vector at {at(row)}; clean the column")
    out = np.zeros((len(array), feature.width), dtype=np.float32)
    out[known] = flat.reshape(-1, feature.width)
    return out


def _label(array: pa.Array, task: TaskConfig, at: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels with 0 where unknown, and where they are known."""
    known = array.is_valid().to_numpy(zero_copy_only=False)
    y = _floats(array, pa.float32())
    _no_nan(y, f"label {task.column!r}", at)
    if (rule := label_rule(task)) is None:
        return y, known
    low, high, words = rule
    wrong = (y < low) | (y > high)
    if high < np.inf:
        wrong |= y != np.floor(y)
    if wrong.any():
        i = _first(wrong)
        raise DistmtlError(f"label {task.column!r}: {y[i]:g} at {at(i)}; {words}, or null where unknown")
    return y, known


def label_rule(task: TaskConfig) -> tuple[float, float, str] | None:
    """The least and the largest label of a task, and the rule in words; whole numbers where there is a largest. None: any number."""
    match task:
        case BinaryTask():
            return 0, 1, "a binary label is 0 or 1"
        case OrdinalTask():
            return 0, task.levels - 1, f"an ordinal label of {task.levels} levels is 0 … {task.levels - 1}"
        case MulticlassTask():
            return 0, task.classes - 1, f"a label of {task.classes} classes is 0 … {task.classes - 1}"
        case WatchTimeTask() | QuantileTask() | LognormalTask():
            return 0, np.inf, f"a label of kind {task.kind} is at least 0"
    return None


def _weight(array: pa.Array, column: str, at: Callable[[int], str]) -> np.ndarray:
    known = array.is_valid().to_numpy(zero_copy_only=False)
    w = _floats(array, pa.float32())
    bad = ~known | ~np.isfinite(w) | (w < 0)
    if bad.any():
        i = _first(bad)
        raise DistmtlError(f"weight {column!r}: {w[i] if known[i] else 'null'} at {at(i)}; a sample weight is a finite number ≥ 0")
    return w


def _no_nan(x: np.ndarray, what: str, at: Callable[[int], str]) -> None:
    if not np.isfinite(x).all():
        i = _first(~np.isfinite(x))
        raise DistmtlError(f"{what}: {x[i]} at {at(i)}; write null where a number is unknown, and nothing infinite")
