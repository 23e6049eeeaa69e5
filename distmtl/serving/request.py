"""A request's JSON → rows for the Predictor. Every value is looked at, and whatever is wrong is told: of every column one sentence.

    {"context": {column: value}, "candidates": {column: [value, …]}, "fusion": {…}, "version": "name"}

Columns have their Parquet names. Each is given once: in `context`, for all candidates, or in `candidates`, a list of one value each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.config import did_you_mean
from distmtl.errors import DistmtlError
from distmtl.serving.columns import FLOAT64, INT64, MAX_STRING, Column
from distmtl.serving.fusion import AnyFusion, LinearFusion, ProductFusion

MISTAKES = 20  # that are told at once
MAX_SPREAD = 64 << 20  # bytes of a column of the context, once for every candidate
KEYS = ("context", "candidates", "fusion", "version")
PRICE = Column("price", "number", None, (5e-324, FLOAT64), False)
TYPES = {"integer": (int,), "string": (str,), "number": (float, int)}  # of Python's json; bool is a type of its own here
WORDS = {"integer": "an integer", "string": "a string", "number": "a number"}


class BadRequest(DistmtlError):
    """What the client has to mend.

    Args:
        status: 400 where it is no request, 413 where it is too large, 422 where its values are wrong.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Of a request."""

    candidates: int = 1024
    list: int = 1024  # elements, where no feature bounds them
    body_kb: int = 1024


@dataclass(frozen=True)
class Request:
    """N candidates, ready to be scored."""

    table: pa.Table
    fusion: AnyFusion
    price: np.ndarray | None


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object, whose keys are ours.

    Raises:
        BadRequest: it is none.
    """
    try:
        raw = _quickly(body)
        if raw is None:
            raw = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except BadRequest:
        raise
    except UnicodeDecodeError:
        raise BadRequest(400, "the body is not UTF-8 text") from None
    except RecursionError:
        raise BadRequest(400, "the body is nested too deeply") from None
    except ValueError as e:
        raise BadRequest(400, f"the body is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise BadRequest(422, 'the body is not an object; send {"context": {…}, "candidates": {…}}')
    for key in raw:
        if key not in KEYS:
            raise BadRequest(422, f"unknown key {_shown(key)}{did_you_mean(key, KEYS)}; a request has {', '.join(KEYS)}")
    for key in ("context", "candidates"):
        if not isinstance(raw.setdefault(key, {}), dict):
            raise BadRequest(422, f"{key} is {_what(raw[key])}; give an object of columns")
    return raw


def _quickly(body: bytes) -> dict[str, Any] | None:
    """A third of the time of Python's json. None where that has to look closer: orjson keeps the last of two equal keys, but then the body
    has a colon that no key stands before."""
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return raw if isinstance(raw, dict) and body.count(b":") == _keys(raw) else None


def _keys(value: Any) -> int:
    """Of an object and those in it; none is looked for in lists."""
    return len(value) + sum(map(_keys, value.values())) if isinstance(value, dict) else 0


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRequest(400, f"key {_shown(next(k for k in keys if keys.count(k) > 1))} is given twice")
    return out


def _no_constant(text: str) -> None:
    raise BadRequest(400, f"{text} is no JSON number; write null where a number is unknown")


def parse_rows(raw: dict[str, Any], columns: dict[str, Column], fusion: AnyFusion, limits: Limits) -> Request:
    """
    Raises:
        BadRequest: columns are missing, given twice, unknown, or one of their values is none of theirs; all of them at once.
    """
    context, candidates = raw["context"], raw["candidates"]
    prices = {PRICE.name: PRICE}
    if isinstance(fusion, ProductFusion) and fusion.price:
        prices[fusion.price] = Column(fusion.price, PRICE.item, PRICE.lengths, PRICE.bounds, PRICE.nullable)
    known = prices | columns
    unknown = ((place, name) for place in ("context", "candidates") for name in raw[place] if name not in known)
    wrong = [
        BadRequest(422, f"{place}: the model reads no {_shown(name)}{did_you_mean(name, known)}")
        for place, name in islice(unknown, MISTAKES)
    ]
    n = 0
    try:
        n = _count(candidates, limits)
    except BadRequest as e:
        wrong.append(e)
    arrays: dict[str, pa.Array] = {}
    everywhere = pa.array(np.zeros(n, dtype=np.int32))
    for name, column in known.items():
        try:
            if name in context and name in candidates:
                raise BadRequest(422, f"{_shown(name)} is given in context and in candidates; give it once")
            if name in context:
                once = _array([context[name]], column, f"context.{name}")
                if once.nbytes * n > MAX_SPREAD:
                    raise BadRequest(413, f"context.{name} has {once.nbytes:,} bytes, and there are {n} candidates; send fewer at once")
                arrays[name] = once.take(everywhere)
            elif name in candidates:
                if not isinstance(candidates[name], list):
                    raise BadRequest(422, f"candidates.{name} is {_what(candidates[name])}; give a list, one value for each candidate")
                arrays[name] = _array(candidates[name], column, f"candidates.{name}")
            elif name in columns:
                raise BadRequest(422, f"{_shown(name)} is missing; give it in context, or in candidates for each")
        except BadRequest as e:
            wrong.append(e)
    if wrong:
        raise BadRequest(wrong[0].status, " | ".join(map(str, wrong[:MISTAKES])))
    return Request(pa.table({name: arrays[name] for name in columns}), fusion, _price(fusion, arrays))


def _count(candidates: dict[str, Any], limits: Limits) -> int:
    if not candidates:
        raise BadRequest(422, "candidates has no column; give those that differ between candidates")
    lengths = {name: len(values) for name, values in candidates.items() if isinstance(values, list)}
    first = next(iter(lengths), "")
    for name, length in lengths.items():
        if length != lengths[first]:
            raise BadRequest(422, f"candidates.{name} has {length} values, and candidates.{first} {lengths[first]}; give one each")
    if (n := lengths.get(first, 0)) > limits.candidates:
        raise BadRequest(422, f"{n} candidates, and a request may have {limits.candidates}; send several requests")
    return n


def _array(values: list[Any], column: Column, where: str) -> pa.Array:
    """The values, of which every one is what the column holds."""
    at = lambda i: where if where.startswith("context") else f"{where}[{i}]"  # noqa: E731
    if column.lengths is None:
        return _scalars(values, column, at)
    lists = [value for value in values if value is not None] if column.nullable else values
    lengths = list(map(len, lists)) if set(map(type, lists)) <= {list} else []
    if len(lengths) < len(lists) or (lists and not column.lengths[0] <= min(lengths) <= max(lengths) <= column.lengths[1]):
        _refuse_list(values, column, at)
    item = Column(column.name, column.item, None, column.bounds, False)
    flat = _scalars(list(chain.from_iterable(lists)), item, lambda k: f"{at(_list_of(k, values))}: an element")
    if len(lists) < len(values):
        lengths = [0 if value is None else len(value) for value in values]
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    null = pa.array([value is None for value in values]) if len(lists) < len(values) else None
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=null)


def _refuse_list(values: list[Any], column: Column, at: Callable[[int], str]) -> None:
    least, most = column.lengths or (0, 0)
    for i, value in enumerate(values):
        if value is None and column.nullable:
            continue
        if not isinstance(value, list):
            raise BadRequest(422, f"{at(i)} is {_what(value)}; give a list{' or null' if column.nullable else ''}")
        if not least <= len(value) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise BadRequest(422, f"{at(i)} is a list of {len(value)}; give {wanted} elements")


def _scalars(values: list[Any], column: Column, at: Callable[[int], str]) -> pa.Array:
    allowed = {*TYPES[column.item], *([type(None)] if column.nullable else [])}
    found = set(map(type, values))
    if not found <= allowed:
        i = next(i for i, value in enumerate(values) if type(value) not in allowed)
        if column.item == "integer" and type(values[i]) is float and abs(values[i]) >= 2**63:  # orjson's float of a longer integer
            raise BadRequest(422, f"{at(i)} is {_shown(values[i])}; give {_between(column)}")
        raise BadRequest(422, f"{at(i)} is {_what(values[i])}; give {WORDS[column.item]}{' or null' if column.nullable else ''}")
    if column.item == "string":
        return _strings(values, column, at)
    low, high = column.bounds
    if not (column.item == "number" and int in found):  # Arrow takes no large integer for a float
        try:
            array = pa.array(values, column.type)
        except (OverflowError, pa.ArrowInvalid):  # an integer of more than 63 bits
            pass
        else:
            ends = pc.min_max(array).as_py()
            if ends["min"] is None or low <= ends["min"] <= ends["max"] <= high:
                return array
    for i, value in enumerate(values):
        if value is not None and not low <= value <= high:
            raise BadRequest(422, f"{at(i)} is {_shown(value)}; give {_between(column)}")
    return pa.array([value if value is None else _as(column, value) for value in values], column.type)


def _as(column: Column, value: float) -> float:
    """An unsigned integer becomes negative, as in training."""
    if column.item == "number":
        return float(value)
    return value if value < 2**63 else value - 2**64


def _strings(values: list[Any], column: Column, at: Callable[[int], str]) -> pa.Array:
    if max((len(v) for v in values if v is not None), default=0) > MAX_STRING:
        i = next(i for i, value in enumerate(values) if value is not None and len(value) > MAX_STRING)
        raise BadRequest(422, f"{at(i)} has {len(values[i])} characters, and may have {MAX_STRING}")
    try:
        return pa.array(values, column.type)
    except UnicodeError:
        raise BadRequest(422, f"{column.name}: a string has half of a surrogate pair, which is no text") from None


def _between(column: Column) -> str:
    low, high = column.bounds
    if column is PRICE or low == PRICE.bounds[0]:
        return "a finite number above 0"
    if (low, high) == INT64:
        return "an integer of 64 bits"
    return f"{WORDS[column.item]} from {low:g} to {high:g}" if column.item == "number" else f"{WORDS[column.item]} from {low} to {high}"


def _list_of(element: int, values: list[Any]) -> int:
    """Which list the element of that number is in."""
    ends = np.cumsum([0 if value is None else len(value) for value in values])
    return int(np.searchsorted(ends, element, side="right"))


def _price(fusion: AnyFusion, arrays: dict[str, pa.Array]) -> np.ndarray | None:
    """(n,) float64, where the formula multiplies by it."""
    if isinstance(fusion, LinearFusion) or not fusion.price:
        return None
    if fusion.price not in arrays:
        raise BadRequest(422, f"{_shown(fusion.price)} is missing: the fusion multiplies by it; give it in candidates")
    array = arrays[fusion.price]
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise BadRequest(422, f"fusion.price: {_shown(fusion.price)} holds no numbers")
    price = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if not (price > 0).all():
        i = int(np.flatnonzero(~(price > 0))[0])
        raise BadRequest(422, f"{fusion.price} of candidate {i} is {array[i]}; the fusion multiplies by it: give a number above 0")
    return price


def _what(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a string"
    return f"the number {_shown(value)}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}…"
