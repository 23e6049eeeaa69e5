"""How the tables are sharded and trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from distmtl.config.base import Precision, Strict, Unit

ShardingType = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]
TableMemory = Literal["device", "host", "cached"]
SEQUENCE_SHARDING: tuple[ShardingType, ...] = ("table_wise", "row_wise", "column_wise")  # what TorchRec has for sequences


EPS = "Added to the root in the denominator."
BETAS = "Share of the past in the running means of the gradient and of its square."


class SgdTable(Strict):
    """Stochastic gradient descent, without state."""

    kind: Literal["sgd"]
    lr: PositiveFloat = Field(0.05, description="Learning rate.")


class AdagradTable(Strict):
    """Duchi et al. 2011: a step size of its own for every weight, at the price of the tables' size once more."""

    kind: Literal["adagrad"]
    lr: PositiveFloat = Field(0.05, description="Learning rate.")
    eps: PositiveFloat = Field(1e-8, description=EPS)


class RowWiseAdagradTable(Strict):
    """Adagrad by the mean square of a row's gradient: one number of state per row."""

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: PositiveFloat = Field(0.05, description="Learning rate.")
    eps: PositiveFloat = Field(1e-8, description=EPS)


class AdamTable(Strict):
    """CUDA only: FBGEMM has no CPU kernel for it."""

    kind: Literal["adam"]
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    betas: tuple[Unit, Unit] = Field((0.9, 0.999), description=BETAS)
    eps: PositiveFloat = Field(1e-8, description=EPS)


TableOptimizer = Annotated[SgdTable | AdagradTable | RowWiseAdagradTable | AdamTable, Field(discriminator="kind")]


class TableConfig(Strict):
    """What a table has of its own; everything else follows from `sharding` and `optimizer.tables`."""

    sharding: tuple[ShardingType, ...] | None = Field(
        None, description="Sharding types the planner may choose for this table; default: `sharding.types`."
    )
    optimizer: TableOptimizer | None = Field(None, description="Optimizer of this table; default: `optimizer.tables`.")
    init_scale: PositiveFloat | None = Field(
        None, description="Initial weights are uniform in ±init_scale; default: `sharding.init_scale`."
    )
    memory: TableMemory = Field(
        "device",
        description="CUDA: where the table and its optimizer's state lie. `host` is read over the bus at every lookup; `cached` is host "
        "memory with rows lately used on the device. For tables larger than the device's memory. On CPU all lie in host memory.",
    )
    cache: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Share of its rows that `memory: cached` keeps on the device; default: 0.2."
    )

    @model_validator(mode="after")
    def _cache_is_of_cached(self):
        if self.cache is not None and self.memory != "cached":
            raise ValueError(f"cache is of memory cached alone, and memory is {self.memory}; set memory: cached, or leave cache out")
        return self


class ShardingConfig(Strict):
    """What TorchRec's planner may choose from."""

    types: tuple[ShardingType, ...] = Field(
        ("table_wise", "row_wise"), min_length=1, description="Allowed for every table without its own list."
    )
    row_wise_above_mb: NonNegativeFloat = Field(
        1.0, description="Smaller tables are never row-wise: their ids would cost more messages than the memory they spread."
    )
    init_scale: PositiveFloat = Field(0.05, description="Initial table weights are uniform in ±init_scale.")
    exchange: Precision | None = Field(
        None,
        description="In which embeddings and their gradients travel between workers: bf16 halves the bytes. Default: pooled ones in "
        "`train.precision`, in which the head reads them, those of lists in fp32, in which they are pooled.",
    )
