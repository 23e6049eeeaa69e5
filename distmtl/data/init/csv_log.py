"""CSV to Parquet, a block at a time: first which type every column has throughout, then the same columns with these types."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from csv import reader as csv_reader
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from distmtl.data.output import ROW_GROUP_ROWS
from distmtl.errors import DistmtlError

NULLS = ["", "NULL", "null", "NA", "N/A", "n/a", "NaN", "nan", "None", "\\N"]
BLOCK_BYTES = 4 << 20  # also the longest line
# In the order in which they are tried; the first that every value of a column can be read as is its type. Text is the last resort.
TYPES: dict[str, pa.DataType] = {
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "time": pa.timestamp("us"),
    "time with zone": pa.timestamp("us", "UTC"),
}
NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
CODE = r"^0[0-9xX]|^-?\d{19,}$"  # 007, 0x1f, or beyond int64: as a number it would be another text, or rounded
MOSTLY = 0.9  # of the values are numbers: then the others are mistakes


@dataclass
class _Column:
    name: str
    types: list[str] = field(default_factory=lambda: list(TYPES))  # still possible
    values: int = 0
    numbers: int = 0
    decimals: int = 0
    stranger: tuple[str, int] | None = None  # the first value that is no number, and its row

    def see(self, strings: pa.Array, first_row: int) -> None:
        """Strike the types that a block's values are not of."""
        known = strings.drop_null()
        if not len(known):
            return
        self.types = [t for t in self.types if _cast(known, t) is not None]
        number = "integer" in self.types or "number" in self.types
        if number and pc.any(pc.match_substring_regex(known, CODE)).as_py():
            self.types = [t for t in self.types if t not in ("integer", "number")]
        self.values += len(known)
        if number:
            self.numbers += len(known)
            self.decimals += "integer" not in self.types
        elif "boolean" not in self.types:
            is_number = pc.match_substring_regex(strings, NUMBER)
            self.numbers += pc.sum(is_number).as_py() or 0
            self.decimals += pc.any(pc.and_(is_number, pc.match_substring(strings, "."))).as_py() or False
            if self.stranger is None and (at := pc.index(is_number, False).as_py()) >= 0:
                self.stranger = strings[at].as_py(), first_row + at

    @property
    def type(self) -> str | None:
        return self.types[0] if self.types and self.values else None


def to_parquet(paths: list[Path], out: Path, left_out: Collection[str] = ()) -> pa.Schema:
    """One Parquet file with the columns of CSV files that have the same header.

    Raises:
        DistmtlError: lines of another number of columns (counted), text that is not UTF-8, a column of decimal numbers and a few
            other values, headers that differ, no rows.
    """
    names, delimiter = header(paths[0])
    for path in paths[1:]:
        if (other := header(path)[0]) != names:
            odd = sorted({*names} ^ {*other}) or "another order"
            raise DistmtlError(f"{path} has other columns than {paths[0]} ({odd}); give files of one header")
    columns = [_Column(name) for name in names]
    rows = 0
    for path in paths:
        before = rows
        for block in _blocks(path, names, delimiter):
            for column, strings in zip(columns, block):
                column.see(strings, rows - before + 2)  # line 1 is the header
            rows += len(block[0])
    if not rows:
        raise DistmtlError(f"{paths[0]} holds no rows below its header; nothing can be guessed")
    for column in columns:
        if column.name not in left_out:
            _refuse_mixed(column, paths)

    schema = pa.schema([(c.name, TYPES.get(c.type or "", pa.string())) for c in columns])
    with pq.ParquetWriter(out, schema) as writer:
        for path in paths:
            for block in _blocks(path, names, delimiter):
                arrays = [_cast(a, c.type) if c.type else a for a, c in zip(block, columns)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP_ROWS)
    return schema


def _cast(strings: pa.Array, kind: str) -> pa.Array | None:
    """Text read as a type; None if some of it is of another."""
    if kind == "boolean":
        lower = pc.utf8_lower(strings)
        spelled = pc.is_in(lower, value_set=pa.array(["true", "false", None]))
        return pc.equal(lower, "true") if pc.all(spelled).as_py() else None
    try:
        return strings.cast(TYPES[kind])
    except pa.ArrowInvalid:
        return None


def _refuse_mixed(column: _Column, paths: list[Path]) -> None:
    """Numbers with decimals and a little text. Integers with text may well be ids."""
    if column.type is None and column.decimals and column.stranger and column.numbers >= MOSTLY * column.values:
        text, line = column.stranger
        where = paths[0] if len(paths) == 1 else f"the {len(paths)} files"
        raise DistmtlError(
            f"column {column.name!r} of {where} holds numbers, but {column.values - column.numbers:,} of {column.values:,} values "
            f"are none, such as {text!r:.60} in line {line}; mend them, leave them empty, or add --leave-out {column.name}"
        )


def header(path: Path) -> tuple[list[str], str]:
    """The names that a file's first line gives its columns, and the sign between them: whichever of , tab ; | is there most."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            line = stream.read(BLOCK_BYTES).split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        raise DistmtlError(f"{path}: line 1 is not UTF-8 text; write the file again as UTF-8") from None
    except (OSError, pa.ArrowException) as e:
        raise DistmtlError(f"{path} cannot be read: {str(e).splitlines()[0]}") from None
    delimiter = max(",\t;|", key=line.count)
    names = next(csv_reader([line], delimiter=delimiter), [])
    if not line.strip() or all(re.match(NUMBER, name) for name in names):
        raise DistmtlError(f"{path}: its first line must name the columns, and is {line!r:.60}; add a header")
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise DistmtlError(f"{path}: column {twice!r} is {names.count(twice)} times in its header; which one is meant cannot be told")
    return names, delimiter


def _blocks(path: Path, header: list[str], delimiter: str) -> Iterator[list[pa.Array]]:
    """The columns of some thousand rows after the other, as text without surrounding spaces."""
    wrong: list[csv.InvalidRow] = []

    def count(row: csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        reader = csv.open_csv(
            path,
            csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),  # with threads no line has a number
            csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=count),
            csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), null_values=NULLS, strings_can_be_null=True),
        )
        for batch in reader:
            yield [pc.utf8_trim_whitespace(column) for column in batch.columns]
    except pa.ArrowInvalid as e:
        why = str(e).splitlines()[0]
        if found := re.search(r"column #(\d+): Row #(\d+).*invalid UTF8", why):
            where = f"line {found[2]}, column {header[int(found[1])]!r},"
            raise DistmtlError(f"{path}: {where} is not UTF-8 text; write the file again as UTF-8") from None
        hint = "; is a quote never closed?" if "straddl" in why else ""
        raise DistmtlError(f"{path} cannot be read as CSV: {why:.200}{hint}") from None
    if wrong:
        first = wrong[0]
        raise DistmtlError(
            f"{path}: {len(wrong):,} line{'s do' if len(wrong) > 1 else ' does'} not have the header's {len(header)} columns, the first is "
            f"line {first.number} with {first.actual_columns}: {first.text!r:.60}; mend them, quote text with {delimiter!r} in it"
        )
