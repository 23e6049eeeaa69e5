"""What a column holds, in words that outlive a Parquet file: a model remembers of every column that it reads whether it held strings."""

from __future__ import annotations

from typing import Literal, get_args

import pyarrow as pa

from distmtl.config import Config
from distmtl.data.collate import Collator, alike_type, is_list, is_string

Kind = Literal["integer", "string", "number", "list of integer", "list of string", "list of number"]
OF = "list of "
ARROW = {"integer": pa.int64(), "string": pa.string(), "number": pa.float64()}


def kind_of(kind: pa.DataType) -> Kind:
    """The word for an Arrow type that a feature may have."""
    kind = alike_type(kind)
    if is_list(kind):
        return get_args(Kind)[3 + get_args(Kind).index(kind_of(kind.value_type))]
    return "string" if is_string(kind) else "integer" if pa.types.is_integer(kind) else "number"


def kinds_of(schema: pa.Schema, columns: list[str]) -> dict[str, Kind]:
    """Column → what it holds."""
    return {name: kind_of(schema.field(name).type) for name in columns}


def served_columns(config: Config) -> list[str]:
    """The columns that a row needs to be scored."""
    return Collator(config, labelled=False).columns


def arrow_type(kind: Kind) -> pa.DataType:
    """The Arrow type in which values of such a column are given to a model."""
    return pa.list_(ARROW[kind.removeprefix(OF)]) if kind.startswith(OF) else ARROW[kind]
