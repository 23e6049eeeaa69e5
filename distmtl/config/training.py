"""How it is trained, measured and run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_serializer, model_validator

from distmtl.config.base import Precision, Strict, Unit
from distmtl.config.tables import BETAS, EPS, RowWiseAdagradTable, TableOptimizer


class AdamDense(Strict):
    """Kingma and Ba 2015."""

    kind: Literal["adam"]
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    betas: tuple[Unit, Unit] = Field((0.9, 0.999), description=BETAS)
    eps: PositiveFloat = Field(1e-8, description=EPS)


class AdamWDense(Strict):
    """Loshchilov and Hutter 2019: Adam with weight decay beside the gradient."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="Learning rate.")
    betas: tuple[Unit, Unit] = Field((0.9, 0.999), description=BETAS)
    eps: PositiveFloat = Field(1e-8, description=EPS)
    weight_decay: NonNegativeFloat = Field(1e-2, description="Share of a weight, times the learning rate, that a step takes away.")


class AdagradDense(Strict):
    """Duchi et al. 2011."""

    kind: Literal["adagrad"]
    lr: PositiveFloat = Field(1e-2, description="Learning rate.")
    eps: PositiveFloat = Field(1e-10, description=EPS)


class SgdDense(Strict):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    lr: PositiveFloat = Field(1e-2, description="Learning rate.")
    momentum: Unit = Field(0.0, description="Share of the last update that goes on.")


DenseOptimizer = Annotated[AdamWDense | AdamDense | AdagradDense | SgdDense, Field(discriminator="kind")]


class ScheduleConfig(Strict):
    """A factor on every learning rate, tables included: linear warm-up, then decay to `final` at the last step."""

    warmup_steps: NonNegativeInt = Field(0, description="Steps in which the factor rises from near 0 to 1.")
    decay: Literal["none", "linear", "cosine"] = Field("none", description="How the factor falls after that.")
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="Factor at the last step.")


class OptimizerConfig(Strict):
    """What updates the weights."""

    tables: TableOptimizer = Field(RowWiseAdagradTable(), description="Of the tables, inside backward.")
    dense: DenseOptimizer = Field(AdamWDense(), description="Of all other weights.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rates over time.")
    clip_norm: PositiveFloat | None = Field(None, description="Clip the dense gradient to this norm.")


# --------------------------------------------------------------------------------------------------------------- train


class EarlyStopping(Strict):
    """The end of a run that no longer gets better on the validation split."""

    patience: PositiveInt = Field(2, description="Stop after this many evaluations without a new best.")


class NonFiniteConfig(Strict):
    """What a non-finite loss does. `skip` leaves that step's update out, at most `limit` times in a run."""

    policy: Literal["raise", "skip"] = Field("raise", description="End the run, or leave the step's update out.")
    limit: PositiveInt = Field(10, description="Updates that may be left out in a run.")


class ProfileConfig(Strict):
    """Trace of some steps by torch.profiler, written to <run>/profile."""

    first_step: PositiveInt = Field(20, description="First step of the trace.")
    steps: PositiveInt = Field(5, description="Steps of the trace.")


class TrainConfig(Strict):
    """How long, in which steps, and what is kept."""

    global_batch_size: PositiveInt = Field(4096, description="Rows of a step over all workers.")
    epochs: PositiveInt = Field(1, description="Passes over the training rows.")
    steps: PositiveInt | None = Field(None, description="Stop after this many steps, even within an epoch.")
    precision: Precision = Field(
        "fp32", description="Precision of the head's layers: bf16 runs them under autocast; weights, tables and losses stay float32."
    )
    log_every: PositiveInt = Field(50, description="Steps between progress lines.")
    eval_every: PositiveInt | None = Field(None, description="Steps between evaluations; default: at the end of every epoch.")
    save_every: PositiveInt | None = Field(None, description="Steps between checkpoints; default: at every evaluation.")
    save_in_background: bool = Field(
        True, description="Training goes on while a checkpoint is written, for a second copy of the tables in host memory."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints kept, besides the best.")
    monitor: str = Field("loss", description="What best means on the validation set: loss, METRIC (mean over tasks) or TASK.METRIC.")
    early_stopping: EarlyStopping | None = Field(None, description="Stop when `monitor` no longer improves; default: never.")
    non_finite: NonFiniteConfig = Field(NonFiniteConfig(), description="What a loss that is not finite does.")
    profile: ProfileConfig | None = Field(None, description="Trace some steps; default: none.")


class EvaluationConfig(Strict):
    """How metrics are computed."""

    batch_size: PositiveInt = Field(16384, description="Rows of an evaluation step over all workers, about.")
    exact_rows: PositiveInt = Field(
        5_000_000,
        description="AUC, PR-AUC and GAUC are exact up to this many rows, then from a histogram (with its bound) or sampled groups.",
    )


class Workers(Strict):
    """A plain number, or {min: …, max: …}: as many as the cluster has places for, fewer or more while the run goes on."""

    min: PositiveInt = Field(description="Fewest workers that it trains on.")
    max: PositiveInt = Field(description="Most workers that it trains on.")

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
    """The processes that train, and how long they are waited for."""

    workers: Workers = Field(Workers(min=1, max=1), description="Processes, a number or {min, max}; tables are sharded over them.")
    cpus_per_worker: PositiveInt = Field(1, description="CPU cores, and threads, of a worker.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where every worker can have one.")
    max_failures: NonNegativeInt = Field(3, description="Failures without a new checkpoint in between before giving up.")
    collective_timeout_s: PositiveInt = Field(300, description="A worker silent for this long counts as hung.")
    place_timeout_s: PositiveInt = Field(1800, description="Give up when the cluster has no places for `workers` for this long.")
    resize_every_s: PositiveInt = Field(60, description="With {min, max}: how often to look for places of further workers.")


class RunConfig(Strict):
    """Where a run leaves what it leaves, and what is drawn in it."""

    dir: str | None = Field(None, description="Run directory; default runs/<name>.")
    seed: NonNegativeInt = Field(0, lt=2**31, description="Seeds initial weights, order of rows and dropout.")
