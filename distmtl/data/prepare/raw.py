"""Reading raw files: find them, take every column as strings, refuse what is not whole."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from distmtl.errors import DistmtlError


def find(source: Path, names: list[str], data_set: str) -> Path:
    """The first of `names` in a folder.

    Raises:
        DistmtlError: none of them is there.
    """
    for name in names:
        if (source / name).is_file():
            return source / name
    raise DistmtlError(f"{' or '.join(names)} is not in {source}; download {data_set} and give its folder as the source")


def read(path: Path, columns: list[str], delimiter: str, rows: int | None = None) -> pa.Table:
    """A file without a header, every column as strings without surrounding spaces; .gz and .bz2 are decompressed.

    Raises:
        DistmtlError: it is truncated, or has lines of another number of columns, or not `rows` rows.
    """
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            text = stream.read().replace(b"::", b"\t") if delimiter == "\t" else stream.read()
        table = csv.read_csv(
            io.BytesIO(text),
            read_options=csv.ReadOptions(column_names=columns, encoding="latin-1", use_threads=False),
            parse_options=csv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, OSError) as e:
        raise DistmtlError(f"{path} cannot be read as {len(columns)} columns: {str(e).splitlines()[0]:.200}; download it again") from None
    if rows is not None and table.num_rows != rows:
        raise DistmtlError(f"{path} has {table.num_rows:,} rows, the published file has {rows:,}; download it again")
    return pa.table([pc.utf8_trim_whitespace(c) for c in table.columns], names=columns)


def numbers(column: pa.ChunkedArray, what: str) -> np.ndarray:
    """Strings → float64.

    Raises:
        DistmtlError: one of them is no number.
    """
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as e:
        raise DistmtlError(f"{what} holds something that is not a number: {str(e).splitlines()[0]:.200}") from None


def edges(x: np.ndarray, count: int) -> list[float]:
    """At most `count` bucket boundaries: every distinct number above 0 (0 and below share a bucket), or quantiles of them."""
    above = x[x > 0]
    distinct = np.unique(above) if len(above) else np.ones(1)
    if len(distinct) > count:
        distinct = np.unique(np.quantile(above, np.linspace(0, 1, count + 1)[:-1], method="lower"))
    return [float(e) for e in distinct]
