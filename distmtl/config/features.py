"""Where the rows are, and what of them the model sees."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from distmtl.config.base import Name, Strict, Unit, Widths


class DataConfig(Strict):
    """Where the rows are and in which order they are trained (docs/data.md)."""

    train: str = Field(description="Parquet file, folder of Parquet files, or glob.")
    validation: str | None = Field(None, description="Decides early stopping and the best checkpoint.")
    test: str | None = Field(None, description="Evaluated once, at the end, with the best checkpoint.")
    group: str | None = Field(None, description="Column whose values group the rows for GAUC (user or session id).")
    weight: str | None = Field(None, description="Column of non-negative sample weights.")
    max_contradictions: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.001,
        description="Share of rows that may contradict themselves, a conversion without its click: left out, and refused where they "
        "are more than that, allowing for chance.",
    )
    num_streams: PositiveInt = Field(16, description="Equal cuts of an epoch; workers own whole streams, so it bounds their number.")
    shuffle: bool = Field(True, description="Shuffle row groups and rows within windows, anew every epoch.")
    shuffle_window: PositiveInt = Field(8192, description="Rows of a stream that are permuted together.")
    prefetch: PositiveInt = Field(2, description="Batches decoded ahead in the background.")
    threads: PositiveInt | None = Field(
        None,
        description="Threads that decode for one worker; default: 1 where it trains on CPU, on CUDA its share of the machine's cores less "
        "two, at most 8.",
    )


# TorchRec keeps tables in an nn.ModuleDict, whose own attributes cannot be keys; a feature of such a name reads NAME_table.
RESERVED = frozenset(
    (
        "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear", "compile", "cpu", "cuda", "double",
        "dump_patches", "eval", "extra_repr", "float", "forward", "get_buffer", "get_extra_state", "get_parameter",
        "get_submodule", "half", "ipu", "items", "keys", "load_state_dict", "modules", "mtia", "named_buffers", "named_children",
        "named_modules", "named_parameters", "parameters", "pop", "register_backward_hook", "register_buffer",
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_module", "register_parameter",
        "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule",
        "share_memory", "state_dict", "to", "to_empty", "train", "training", "type", "update", "values", "xpu", "zero_grad",
        "T_destination",
    )
)  # fmt: skip


NAME = "Feature name; the Parquet column too, unless `column` says otherwise."
COLUMN = "Parquet column, where it differs from the name."


class Embedded(Strict):
    name: Name = Field(description=NAME)
    column: str | None = Field(None, description=COLUMN)
    dim: PositiveInt = Field(16, description="Embedding width; a multiple of 4.")
    table: Name | None = Field(None, description="Table read; features with the same table share it. Defaults to the feature's name.")

    @property
    def table_name(self) -> str:
        return self.table or (f"{self.name}_table" if self.name in RESERVED else self.name)

    @property
    def source(self) -> str:
        return self.column or self.name

    @property
    def extra_rows(self) -> tuple[str, ...]:
        """What the table's rows after those of the ids stand for."""
        return ()

    @property
    def lookups(self) -> int:
        """Rows of the table that a row of the data reads: of a sequence the most there can be, of a bag nobody knows."""
        return 1

    @property
    def table_rows(self) -> int:
        """Rows of the table, the extra ones included."""
        return self.rows + len(self.extra_rows)  # type: ignore[attr-defined]  # a field or a property of every kind

    @model_validator(mode="after")
    def _width(self):
        if self.dim % 4:
            raise ValueError(f"feature {self.name!r}: dim {self.dim} is not a multiple of 4, which FBGEMM needs")
        return self


class Ids(Embedded):
    """Integer or string ids: 0 … rows-1 are rows of the table, strings are hashed to them."""

    rows: PositiveInt = Field(description="Rows of the table; ids are 0 … rows-1. Rows for oov and missing ids come on top.")
    out_of_range: Literal["error", "hash", "quotient", "clip", "oov"] = Field(
        "error",
        description="Ids outside the table: refuse, hash into it, use its last row, or one extra row of all such ids. With hashes: 2 "
        "there is quotient: every id reads the row of its remainder by half the rows and that of its quotient, and no two ids below "
        "rows²/4, rounded down, have the same pair. Strings are always hashed into the `rows`.",
    )
    hashes: PositiveInt = Field(
        1,
        description="Rows that an id reads. Above 1, with out_of_range: hash, every id, whatever it is, is hashed as often, each time by "
        "another hash, so that few share all their rows.",
    )
    id_dropout: Unit = Field(
        0.0, description="Share of the ids that training reads from the oov row, so that ids never seen find it trained (cold start)."
    )

    @property
    def extra_rows(self) -> tuple[str, ...]:
        return ("oov",) if self.out_of_range == "oov" else ()

    @property
    def lookups(self) -> int:
        return self.hashes

    @property
    def hashing(self) -> tuple[int, bool]:
        """What features of one table have alike: the rows of an id, and whether they are those of its remainder and quotient."""
        return self.hashes, self.out_of_range == "quotient"

    def row_of(self, extra: str) -> int:
        """Where the table holds an extra row."""
        return self.rows + self.extra_rows.index(extra)

    @field_validator("out_of_range", mode="before")
    @classmethod
    def _not_managed(cls, value: Any) -> Any:
        if value == "managed":
            raise ValueError(
                "managed collision (TorchRec's MCH: ids get rows as they come, the rarest lose theirs) is not built: a row's optimizer "
                "state cannot be reset on CPU, and which id has which row would hang on the number of workers; use hash with hashes: 2, "
                "or oov"
            )
        return value

    @model_validator(mode="after")
    def _drops_to_a_row(self):
        if self.id_dropout and self.out_of_range != "oov":
            raise ValueError(f"feature {self.name!r}: id_dropout replaces ids by the oov row; set out_of_range: oov")
        return self

    @model_validator(mode="after")
    def _hashes_all(self):
        if self.out_of_range == "quotient" and (self.hashes != 2 or self.rows < 2):
            raise ValueError(f"feature {self.name!r}: with out_of_range: quotient an id reads two rows of at least two; set hashes: 2")
        if self.hashes > 1 and self.out_of_range not in ("hash", "quotient"):
            raise ValueError(f"feature {self.name!r}: with hashes {self.hashes} every id is hashed; set out_of_range: hash")
        return self


class IdFeature(Ids):
    """Ids, one per row or a list per row (a bag)."""

    kind: Literal["id"] = "id"
    pooling: Literal["sum", "mean"] = Field("sum", description="How the ids of a list become one vector.")
    missing: Literal["empty", "row"] = Field("empty", description="A null or an empty list: no vector, or an extra row of its own.")

    @property
    def extra_rows(self) -> tuple[str, ...]:
        return (*super().extra_rows, *(("missing",) if self.missing == "row" else ()))


class SequenceFeature(Ids):
    """A list of ids per row, oldest first, and how its embeddings become one vector. A null is an empty list.

    Pooling: `sum`, `mean`; `attention`: Σ softmax(q·tanh(W·e))·e over a row's ids (Yang et al. 2016); `target`: Σ a(e, t)·e with t the
    embedding of `target` and a an MLP of (e, t, e-t, e⊙t), not normalised (DIN, Zhou et al. 2018). An empty list gives zeros.
    """

    kind: Literal["sequence"]
    max_length: PositiveInt = Field(description="Most ids in a list.")
    too_long: Literal["error", "newest", "oldest"] = Field(
        "error", description="Longer lists: refuse, or keep the last or first max_length."
    )
    pooling: Literal["sum", "mean", "attention", "target"] = Field("mean", description="How the list becomes one vector.")
    target: Name | None = Field(None, description="Id feature of the same dim that pooling target compares with; one id in every row.")
    attention: Widths = Field((32,), description="Hidden widths of the MLP of pooling target.")

    @property
    def lookups(self) -> int:
        return self.max_length * self.hashes

    @model_validator(mode="after")
    def _compared(self):
        if self.pooling != "target" and self.attention != (32,):
            raise ValueError(f"feature {self.name!r}: attention is of pooling target alone, not of {self.pooling}")
        if (self.pooling == "target") != (self.target is not None):
            raise ValueError(
                f"feature {self.name!r}: pooling target compares with a feature, the candidate item say; name it in target"
                if self.target is None
                else f"feature {self.name!r}: target {self.target!r} is of pooling target alone, not of {self.pooling}"
            )
        return self


class BucketFeature(Embedded):
    """A number looked up by its bucket: row 0 for null, row i+1 for boundaries[i-1] <= x < boundaries[i]."""

    kind: Literal["bucket"]
    boundaries: tuple[float, ...] = Field(min_length=1, description="Increasing bucket edges.")
    dim: PositiveInt = Field(8, description="Embedding width; a multiple of 4.")

    @property
    def rows(self) -> int:
        return len(self.boundaries) + 2

    @property
    def pooling(self) -> str:
        return "sum"

    @model_validator(mode="after")
    def _increasing(self):
        if any(b <= a for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"feature {self.name!r}: boundaries must increase")
        return self


class NumericFeature(Strict):
    """A number used as it is: (log1p if `log`) then (x - mean) / std. A null becomes the mean."""

    kind: Literal["numeric"]
    name: Name = Field(description=NAME)
    column: str | None = Field(None, description=COLUMN)
    log: bool = Field(False, description="Take sign(x)·log(1+|x|) first; mean and std are those of the logarithm.")
    mean: float = Field(0.0, description="Subtracted; a null counts as the mean.")
    std: PositiveFloat = Field(1.0, description="Divided by, after the mean is subtracted.")

    @property
    def width(self) -> int:
        return 1

    @property
    def columns(self) -> int:
        return 1

    @property
    def source(self) -> str:
        return self.column or self.name


class VectorFeature(Strict):
    """A fixed-size list of floats, such as a pretrained image or text embedding. A null becomes zeros."""

    kind: Literal["vector"]
    name: Name = Field(description=NAME)
    column: str | None = Field(None, description=COLUMN)
    width: PositiveInt = Field(description="Length of every list.")
    project: PositiveInt | None = Field(None, description="A learned linear layer down to so many columns; default: the list as it is.")

    @property
    def columns(self) -> int:
        """Of the feature vector."""
        return self.project or self.width

    @property
    def source(self) -> str:
        return self.column or self.name


Feature = Annotated[IdFeature | SequenceFeature | BucketFeature | NumericFeature | VectorFeature, Field(discriminator="kind")]
