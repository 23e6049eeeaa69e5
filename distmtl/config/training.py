"""How it is trained, measured and run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_serializer, model_validator

from distmtl.config.base import Precision, Strict, Unit
from distmtl.config.tables import RowWiseAdagradTable, TableOptimizer


class AdamDense(Strict):
    kind: Literal["adam"]
    lr: PositiveFloat = 1e-3
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdamWDense(Strict):
    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2


class AdagradDense(Strict):
    kind: Literal["adagrad"]
    lr: PositiveFloat = 1e-2
    eps: PositiveFloat = 1e-10


class SgdDense(Strict):
    kind: Literal["sgd"]
    lr: PositiveFloat = 1e-2
    momentum: Unit = 0.0


DenseOptimizer = Annotated[AdamWDense | AdamDense | AdagradDense | SgdDense, Field(discriminator="kind")]


class ScheduleConfig(Strict):
    """A factor on every learning rate, tables included: linear warm-up, then decay to `final` at the last step."""

    warmup_steps: NonNegativeInt = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="Factor at the last step.")


class OptimizerConfig(Strict):
    tables: TableOptimizer = RowWiseAdagradTable()
    dense: DenseOptimizer = AdamWDense()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: PositiveFloat | None = Field(None, description="Clip the dense gradient to this norm.")


# --------------------------------------------------------------------------------------------------------------- train


class EarlyStopping(Strict):
    patience: PositiveInt = Field(2, description="Stop after this many evaluations without a new best.")


class NonFiniteConfig(Strict):
    """What a non-finite loss does. `skip` leaves that step's update out, at most `limit` times in a run."""

    policy: Literal["raise", "skip"] = "raise"
    limit: PositiveInt = 10


class ProfileConfig(Strict):
    """Trace of some steps by torch.profiler, written to <run>/profile."""

    first_step: PositiveInt = 20
    steps: PositiveInt = 5


class TrainConfig(Strict):
    global_batch_size: PositiveInt = Field(4096, description="Rows of a step over all workers.")
    epochs: PositiveInt = 1
    steps: PositiveInt | None = Field(None, description="Stop after this many steps, even within an epoch.")
    precision: Precision = Field(
        "fp32", description="Of the head's layers: bf16 runs them under autocast; weights, tables and losses stay float32."
    )
    log_every: PositiveInt = Field(50, description="Steps between progress lines.")
    eval_every: PositiveInt | None = Field(None, description="Steps between evaluations; default: at the end of every epoch.")
    save_every: PositiveInt | None = Field(None, description="Steps between checkpoints; default: at every evaluation.")
    save_in_background: bool = Field(
        True, description="Training goes on while a checkpoint is written, for a second copy of the tables in host memory."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints kept, besides the best.")
    monitor: str = Field("loss", description="What best means on the validation set: loss, METRIC (mean over tasks) or TASK.METRIC.")
    early_stopping: EarlyStopping | None = None
    non_finite: NonFiniteConfig = NonFiniteConfig()
    profile: ProfileConfig | None = None


class EvaluationConfig(Strict):
    batch_size: PositiveInt = Field(16384, description="Rows of an evaluation step over all workers, about.")
    exact_rows: PositiveInt = Field(
        5_000_000,
        description="AUC, PR-AUC and GAUC are exact up to this many rows, then from a histogram (with its bound) or sampled groups.",
    )


class Workers(Strict):
    """A plain number, or {min: …, max: …}: as many as the cluster has places for, fewer or more while the run goes on."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if not isinstance(value, int):
            return value
        if isinstance(value, bool) or value < 1:
            raise ValueError(f"must be a number of at least 1, or {{min: …, max: …}}, got {value}")
        return {"min": value, "max": value}

    @model_validator(mode="after")
    def _ordered(self):
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}")
        return self

    @model_serializer
    def _short(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


class ClusterConfig(Strict):
    workers: Workers = Field(Workers(min=1, max=1), description="Processes, a number or {min, max}; tables are sharded over them.")
    cpus_per_worker: PositiveInt = Field(1, description="CPU cores, and threads, of a worker.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where every worker can have one.")
    max_failures: NonNegativeInt = Field(3, description="Failures without a new checkpoint in between before giving up.")
    collective_timeout_s: PositiveInt = Field(300, description="A worker silent for this long counts as hung.")
    place_timeout_s: PositiveInt = Field(1800, description="Give up when the cluster has no places for `workers` for this long.")
    resize_every_s: PositiveInt = Field(60, description="With {min, max}: how often to look for places of further workers.")


class RunConfig(Strict):
    dir: str | None = Field(None, description="Run directory; default runs/<name>.")
    seed: NonNegativeInt = Field(0, lt=2**31, description="Seeds initial weights, order of rows and dropout.")
