"""A column's values → the feature it could be, and why; or why it is left out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from distmtl.config import RESERVED
from distmtl.data.init.sample import Column

MOST_ROWS = 20_000_000  # of a table, in a first config
SPARSE = 4  # a table may have so many times more rows than there are ids,
SMALL = 50_000  # or so many rows, which cost little
LEVELS = 20  # of an integer that measures, up to which every one has a row
FEW = 1000  # ids, up to which a table of ten times as many rows costs nothing
BUCKETS = 16
SKEWED = 2.0  # skewness, above which the logarithm of numbers ≥ 0 is taken
OFTEN_NULL = 0.05  # then a null says something, and gets a row of its own
LONG_TEXT = 50  # characters on average
LOOKED_AT = 1000  # texts, to see what they are shaped like,
MOST = 0.9  # and how many of them must be
_YEAR, _MONTH, _DAY = r"(19|20)\d\d", r"(0?[1-9]|1[0-2])", r"(0?[1-9]|[12]\d|3[01])"
_DAYS_FIRST = rf"({_DAY}[-/.]{_MONTH}|{_MONTH}[-/.]{_DAY})[-/.]{_YEAR}|({_DAY}/{_MONTH}|{_MONTH}/{_DAY})/\d\d"
DATE = rf"^({_YEAR}[-/.]{_MONTH}[-/.]{_DAY}|{_DAYS_FIRST})([T ]\d{{1,2}}:\d\d|$)"
ISO_DATE = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d|$)"
NUMBER = r"^[-+]?\s*[$€£¥₹]?\s*[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?\s*[$€£¥₹%]?$"
DECIMAL_COMMA = r"^[-+]?\d+,\d{1,2}$"
SEPARATORS = ("|", ";", ",")

ID = re.compile(r"(^|_)(ids?|uuid|key|code|hash|sku|asin|zip)$|Id$|ID$")
AMOUNT = re.compile(
    r"(^|_)(num|nb|n|count|counts|cnt|total|sum|price|amount|cost|age|score|rating|rate|ratio|length|width|height|size|duration|"
    r"seconds|secs|minutes|hours|days|ms|views|clicks|plays|likes|rank|distance|weight|quantity|qty|revenue|salary)(_|$)",
    re.IGNORECASE,
)
HISTORY = re.compile(r"hist|seq|recent|last|past|prev|viewed|watched|clicked|bought|purchased|liked|sess", re.IGNORECASE)
VISIT = re.compile(r"^(session|visit|request|query|search|impression|event|log|trace|transaction)_?(id|key|uuid|hash)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Guess:
    """What a column becomes: a feature as the config has it, or nothing; and why, in one sentence."""

    column: str
    feature: dict[str, Any] | None
    why: str


def guess(column: Column, name: str) -> Guess:
    """The feature called `name` that a column could be; of text that holds something else, how to write it better."""
    found = _guess(column, name)
    better = _written_better(column) if column.holds == "string" and column.distinct > 1 else None
    return replace(found, why=f"{found.why}; {better}") if better else found


def _guess(column: Column, name: str) -> Guess:
    why_not = left_out(column)
    if why_not:
        return Guess(column.name, None, why_not)
    at = {"name": name} if name == column.name else {"name": name, "column": column.name}
    holds = column.holds
    if holds == "boolean":
        return Guess(column.name, {"kind": "bucket", **at, "boundaries": [0.5], "dim": 4}, "null, false or true, a row of its own each")
    if holds == "number" or _is_amount(column):
        feature, why = _number(column)
        return Guess(column.name, {"kind": feature.pop("kind"), **at, **feature}, why)
    if holds == "list of number":
        width = int(column.lengths.max())
        feature = {"kind": "vector", **at, "width": width, **({"project": 32} if width > 64 else {})}
        why = f"every list has {width} numbers" + ("; a learned layer brings them down to 32" if width > 64 else "")
        return Guess(column.name, feature, why)
    if holds.startswith("list of "):
        ids, why = ids_of(column.elements)
        return Guess(column.name, {**_list(column, at, ids)}, f"{_lengths(column)}; {why}")
    ids, why = ids_of(column)
    if column.nulls / column.rows > OFTEN_NULL:
        ids["missing"] = "row"
        why += f"; {_percent(column.nulls / column.rows)} null, which get a row of their own"
    return Guess(column.name, {"kind": "id", **at, **ids}, why)


def left_out(column: Column) -> str | None:
    """Why a column can be no feature."""
    holds = column.holds
    if holds == "nothing" or column.nulls == column.rows:
        return "every value is null"
    if holds == "something else":
        return f"type {column.values.type} is none that a feature can have"
    if holds.startswith("list of "):
        return _list_left_out(column)
    if column.distinct == 1:
        return f"constant: always {_short(column.known[0].as_py())}" + (" or null" if column.nulls else "")
    if holds == "string" and _share(column, DATE) >= MOST:
        how = "" if _share(column, ISO_DATE) >= MOST else ", year first (2024-12-31; pandas: to_datetime with dayfirst or format)"
        return f"a time as text such as {_short(column.known[0].as_py())}; write it as a timestamp{how}, and the splits can follow it"
    if holds == "string" and pc.mean(pc.utf8_length(column.known)).as_py() > LONG_TEXT:
        return "long text; give the model an embedding of it, as a list of floats"
    if holds in ("integer", "string") and column.unique and not _is_amount(column):
        return f"no value is there twice in {column.rows:,} rows: it numbers the rows"
    if holds in ("integer", "string") and VISIT.search(column.name):
        return "names a visit, which will not come again"
    return None


def _list_left_out(column: Column) -> str | None:
    if not len(column.elements.values):
        return "every list is empty"
    if column.elements.nulls:
        return "there are nulls inside its lists; leave them out of the lists"
    if column.holds != "list of number":
        return None
    lengths = column.lengths[column.values.is_valid().to_numpy(zero_copy_only=False)]
    if lengths.min() != lengths.max():
        return f"lists of {lengths.min()} to {lengths.max()} floats; a vector needs one length"
    if not pc.all(pc.is_finite(column.elements.values)).as_py():
        return "there are NaN or infinite numbers inside its lists; clean them"
    return None


def ids_of(column: Column) -> tuple[dict[str, Any], str]:
    """rows, dim and what happens to ids outside the table."""
    d = column.estimate
    seen = f"{column.distinct:,} ids"
    if column.share < 1 and d != column.distinct:
        seen = f"about {_two_digits(d):,} ids, {column.distinct:,} of them in the sample"
    low, high, dense = column.low, column.high, max(SPARSE * d, SMALL)
    if column.holds == "integer" and low is not None and low >= 0 and high < min(dense, MOST_ROWS):
        rows = roomy(1.25 * (high + 1))
        return {"rows": rows, "dim": width(d), "out_of_range": "oov"}, f"{seen}, {low:,} to {high:,}; later ones share the row oov"
    many = d > FEW
    rows = roomy((2 if many else 10) * d)
    why = f"{seen}, {_span(column, dense)}hashed to {'two' if many else 'one'} of {min(rows, MOST_ROWS):,} rows{' each' if many else ''}"
    if low is not None and low > 0 and high - low < min(dense, MOST_ROWS):
        why += f"; subtract {low:,} from them, and each has a row of its own"
    if rows > MOST_ROWS:
        rows, why = MOST_ROWS, f"{why}; raise rows where there is memory"
    return {"rows": rows, "dim": width(d), "out_of_range": "hash", **({"hashes": 2} if many else {})}, why


def _span(column: Column, dense: int) -> str:
    """What ids are, and why a row for every number up to the largest will not do. `dense`: below it most numbers may be ids."""
    if column.holds == "string" or column.low is None:
        return "strings, " if column.holds == "string" else ""
    why = f"of {column.high + 1:,} rows most would never be read"
    if column.low < 0:
        why = "no table has rows below 0"
    elif column.high < dense:
        why = f"{column.high + 1:,} rows are many for a first config"
    return f"{column.low:,} to {column.high:,}: {why}, so they are "


def width(ids: int) -> int:
    """6·⁴√ids (Wang et al. 2017, Deep & Cross), as a multiple of 4 between 4 and 32."""
    return min(32, max(4, 4 * round(6 * ids**0.25 / 4)))


def roomy(n: float) -> int:
    """The next number of two digits and zeros."""
    unit = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return math.ceil(n / unit) * unit


def share_tables(guesses: dict[str, Guess], columns: dict[str, Column]) -> None:
    """Lists whose ids are those of another column, by name and by value, read its table."""
    for name, guessed in guesses.items():
        if not guessed.feature or not columns[name].holds.startswith("list of ") or guessed.feature["kind"] == "vector":
            continue
        listed = columns[name].elements
        for other, single in guesses.items():
            stem = re.sub(r"_?ids?$", "", other, flags=re.IGNORECASE)
            if len(stem) < 3 or stem not in name or not single.feature or single.feature["kind"] != "id" or "table" in single.feature:
                continue
            one = columns[other]
            if one.holds != listed.holds or pc.mean(pc.is_in(pc.unique(listed.known), value_set=pc.unique(one.known))).as_py() < 0.5:
                continue
            wider = max((one, listed), key=lambda c: c.estimate)
            bounds = [(c.low, c.high) for c in (one, listed) if c.low is not None]
            low, high = (min(b[0] for b in bounds), max(b[1] for b in bounds)) if bounds else (None, None)
            ids, why = ids_of(Column(other, one.holds, wider.values, wider.share, low, high))
            first = {k: v for k, v in single.feature.items() if k in ("kind", "name", "column")}
            table = f"{first['name']}_table" if first["name"] in RESERVED else first["name"]
            at = {k: v for k, v in guessed.feature.items() if k in ("name", "column")} | {"table": table}
            guesses[other] = Guess(other, {**first, **ids}, why)
            guesses[name] = Guess(name, _list(columns[name], at, ids), f"{_lengths(columns[name])}; ids of {other}, so it reads that table")
            break


def _list(column: Column, at: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    if not HISTORY.search(column.name):
        return {"kind": "id", **at, **ids, "pooling": "mean"}
    longest = max(1, math.ceil(np.quantile(column.lengths, 0.99)))
    return {"kind": "sequence", **at, **ids, "max_length": longest, "too_long": "newest"}


def _lengths(column: Column) -> str:
    shape = "a sequence by its name, oldest first" if HISTORY.search(column.name) else "a bag: their order says nothing"
    most = math.ceil(np.quantile(column.lengths, 0.99))
    return f"{shape}; 99 % of the lists have at most {most} ids, the longest seen {column.lengths.max():,}"


def _number(column: Column) -> tuple[dict[str, Any], str]:
    """A number as it is, or its bucket where null says something."""
    x = column.numbers
    null = column.nulls / column.rows
    if null > OFTEN_NULL:
        edges = sorted({round_to(e, 4) for e in np.quantile(x, np.linspace(0, 1, BUCKETS + 1)[1:-1])})
        edges = [e for e in edges if e > x.min()] or [float(x.max())]
        return {"kind": "bucket", "boundaries": edges, "dim": 8}, f"{_percent(null)} null, which is row 0; {len(edges) + 1} quantiles"
    log = bool(x.min() >= 0) and _skewness(x) > SKEWED and _skewness(np.log1p(x)) < _skewness(x)
    y = np.log1p(x) if log else x
    std = round_to(y.std(), 4) or 1.0
    feature = {"kind": "numeric", **({"log": True} if log else {}), "mean": round_to(y.mean(), 4), "std": std}
    span = f"{_short(round_to(x.min(), 4))} to {_short(round_to(x.max(), 4))}"
    return feature, f"{span}" + (f"; skewness {_skewness(x):.0f}, so its logarithm is taken" if log else "")


def _skewness(x: np.ndarray) -> float:
    """E((x - μ)³) / σ³."""
    centred = x - x.mean()
    return float((centred**3).mean() / max((centred**2).mean(), 1e-300) ** 1.5)


def _is_amount(column: Column) -> bool:
    """Integers that count or measure by their name, and are more than a few."""
    return column.holds == "integer" and column.distinct > LEVELS and bool(AMOUNT.search(column.name)) and not ID.search(column.name)


def _share(column: Column, regex: str) -> float:
    """Of its texts, those that are shaped so."""
    return pc.mean(pc.match_substring_regex(column.known[:LOOKED_AT], regex)).as_py()


def _written_better(column: Column) -> str | None:
    """What texts that are numbers or lists should be written as."""
    texts = column.known[:LOOKED_AT].to_pylist()
    if _share(column, DECIMAL_COMMA) >= MOST:
        return f"numbers with a decimal comma, such as {texts[0]!r:.40}: write plain numbers (pandas: read_csv(…, decimal=','))"
    if _share(column, NUMBER) >= MOST:
        numbers = [text for text in texts if re.fullmatch(NUMBER, text)]
        signed = [n for n in numbers if re.search(r"[$€£¥₹%]", n)] or [n for n in numbers if "," in n]
        if signed and (len(signed) < len(numbers) or not all("," in n for n in signed)):  # 100,110,120 in every row may be three ids
            plain = re.sub(r"[^\d.+-]", "", signed[0])
            share = _percent(len(signed) / len(texts))
            return f"{share} look like numbers with signs or commas, such as {signed[0]!r:.40}: write plain numbers, {plain}"
    for separator in SEPARATORS:
        lists = [parts for text in texts if len(parts := [part.strip() for part in text.split(separator)]) > 1]
        if 2 * len(lists) > len(texts) and (separator == "|" or _change_places(lists)):
            example = next(text for text in texts if separator in text)
            return (
                f"{_percent(len(lists) / len(texts))} look like lists, such as {example!r:.40}: write lists to Parquet "
                f"(pandas: .str.split({separator!r})), and each part is an id"
            )
    return None


def _change_places(lists: list[list[str]]) -> bool:
    """Whether parts come first here and later there: of "Paris, France" neither is in the other's place."""
    first, later = {parts[0] for parts in lists}, [part for parts in lists for part in parts[1:]]
    return 2 * sum(part in first for part in later) > len(later)


def round_to(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def _two_digits(n: int) -> int:
    return int(round_to(n, 2))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.4g} %"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value!r:.40}"
