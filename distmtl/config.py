"""Every knob of a run, typed, frozen and checked against each other. config_file.py reads it from YAML."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)

Unit = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_\-]*$")]
Widths = tuple[PositiveInt, ...]
Precision = Literal["fp32", "bf16"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------- data


class DataConfig(Strict):
    """Where the rows are and in which order they are trained (docs/data.md)."""

    train: str = Field(description="Parquet file, folder of Parquet files, or glob.")
    validation: str | None = Field(None, description="Decides early stopping and the best checkpoint.")
    test: str | None = Field(None, description="Evaluated once, at the end, with the best checkpoint.")
    group: str | None = Field(None, description="Column whose values group the rows for GAUC (user or session id).")
    weight: str | None = Field(None, description="Column of non-negative sample weights.")
    num_streams: PositiveInt = Field(16, description="Equal cuts of an epoch; workers own whole streams, so it bounds their number.")
    shuffle: bool = Field(True, description="Shuffle row groups and rows within windows, anew every epoch.")
    shuffle_window: PositiveInt = Field(8192, description="Rows of a stream that are permuted together.")
    prefetch: PositiveInt = Field(2, description="Batches decoded ahead in the background.")


# ------------------------------------------------------------------------------------------------------------ features

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


class Embedded(Strict):
    name: Name = Field(description="Feature name; the Parquet column too, unless `column` says otherwise.")
    column: str | None = Field(None, description="Parquet column, where it differs from the name.")
    dim: PositiveInt = Field(16, description="Embedding width; a multiple of 4.")
    table: Name | None = Field(None, description="Table read; features with the same table share it. Defaults to the feature's name.")

    @property
    def table_name(self) -> str:
        return self.table or (f"{self.name}_table" if self.name in RESERVED else self.name)

    @property
    def source(self) -> str:
        return self.column or self.name

    @model_validator(mode="after")
    def _width(self):
        if self.dim % 4:
            raise ValueError(f"feature {self.name!r}: dim {self.dim} is not a multiple of 4, which FBGEMM needs")
        return self


class IdFeature(Embedded):
    """Integer or string ids, one per row or a list per row (a bag). A null is an empty bag."""

    kind: Literal["id"] = "id"
    rows: PositiveInt = Field(description="Rows of the table; ids are 0 … rows-1.")
    pooling: Literal["sum", "mean"] = Field("sum", description="How the ids of a list become one vector.")
    out_of_range: Literal["error", "hash", "clip"] = Field(
        "error", description="Ids outside the table: refuse, hash into it, or use its last row. Strings are always hashed."
    )


class BucketFeature(Embedded):
    """A number looked up by its bucket: row 0 for null, row i+1 for boundaries[i-1] <= x < boundaries[i]."""

    kind: Literal["bucket"]
    boundaries: tuple[float, ...] = Field(min_length=1, description="Increasing bucket edges.")
    dim: PositiveInt = 8

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
    name: Name
    column: str | None = None
    log: bool = Field(False, description="Take sign(x)·log(1+|x|) first; mean and std are those of the logarithm.")
    mean: float = 0.0
    std: PositiveFloat = 1.0

    @property
    def width(self) -> int:
        return 1

    @property
    def source(self) -> str:
        return self.column or self.name


class VectorFeature(Strict):
    """A fixed-size list of floats, such as a pretrained image or text embedding. A null becomes zeros."""

    kind: Literal["vector"]
    name: Name
    column: str | None = None
    width: PositiveInt = Field(description="Length of every list.")

    @property
    def source(self) -> str:
        return self.column or self.name


Feature = Annotated[IdFeature | BucketFeature | NumericFeature | VectorFeature, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------------ sharding

ShardingType = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]


class SgdTable(Strict):
    kind: Literal["sgd"]
    lr: PositiveFloat = 0.05


class AdagradTable(Strict):
    kind: Literal["adagrad"]
    lr: PositiveFloat = 0.05
    eps: PositiveFloat = 1e-8


class RowWiseAdagradTable(Strict):
    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.05
    eps: PositiveFloat = 1e-8


class AdamTable(Strict):
    """CUDA only: FBGEMM has no CPU kernel for it."""

    kind: Literal["adam"]
    lr: PositiveFloat = 1e-3
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


TableOptimizer = Annotated[SgdTable | AdagradTable | RowWiseAdagradTable | AdamTable, Field(discriminator="kind")]


class TableConfig(Strict):
    """What a table has of its own; everything else follows from `sharding` and `optimizer.tables`."""

    sharding: tuple[ShardingType, ...] | None = Field(None, description="Sharding types the planner may choose for this table.")
    optimizer: TableOptimizer | None = None
    init_scale: PositiveFloat | None = Field(None, description="Initial weights are uniform in ±init_scale.")


class ShardingConfig(Strict):
    """What TorchRec's planner may choose from."""

    types: tuple[ShardingType, ...] = Field(
        ("table_wise", "row_wise"), min_length=1, description="Allowed for every table without its own list."
    )
    row_wise_above_mb: NonNegativeFloat = Field(
        1.0, description="Smaller tables are never row-wise: their ids would cost more messages than the memory they spread."
    )
    init_scale: PositiveFloat = Field(0.05, description="Initial table weights are uniform in ±init_scale.")
    exchange: Precision = Field(
        "fp32", description="In which pooled vectors and their gradients travel between workers: bf16 halves the bytes, and costs rounding."
    )


# -------------------------------------------------------------------------------------------------------- model, tasks


class SharedBottomConfig(Strict):
    kind: Literal["shared_bottom"]
    bottom: Widths = Field((256, 128), min_length=1)
    dropout: Unit = 0.0


class MMoEConfig(Strict):
    """Ma et al. 2018: shared experts, one softmax gate per task."""

    kind: Literal["mmoe"] = "mmoe"
    num_experts: PositiveInt = 4
    expert: Widths = Field((256, 128), min_length=1)
    dropout: Unit = 0.0


class PLEConfig(Strict):
    """Tang et al. 2020: shared and task-specific experts, level by level. One level is CGC."""

    kind: Literal["ple"]
    num_levels: PositiveInt = 2
    shared_experts: NonNegativeInt = 2
    task_experts: NonNegativeInt = 2
    expert: Widths = Field((128,), min_length=1)
    dropout: Unit = 0.0

    @model_validator(mode="after")
    def _some_experts(self):
        if not self.shared_experts + self.task_experts:
            raise ValueError("a PLE needs experts: set shared_experts or task_experts above 0")
        if not self.shared_experts and self.num_levels > 1:
            raise ValueError("a PLE of several levels needs shared_experts above 0: its shared gate has nothing to pass on")
        return self


class CGCConfig(Strict):
    """PLE with a single level."""

    kind: Literal["cgc"]
    shared_experts: NonNegativeInt = 2
    task_experts: NonNegativeInt = 2
    expert: Widths = Field((256, 128), min_length=1)
    dropout: Unit = 0.0

    @model_validator(mode="after")
    def _some_experts(self):
        if not self.shared_experts + self.task_experts:
            raise ValueError("a CGC needs experts: set shared_experts or task_experts above 0")
        return self


class PluginHeadConfig(Strict):
    """A head from the user's own package: called as Target(width, num_tasks, **args), a module (B, width) → T tensors (B, H)."""

    kind: Literal["plugin"]
    target: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="package.module:Name")
    args: dict[str, Any] = {}


HeadConfig = Annotated[SharedBottomConfig | MMoEConfig | CGCConfig | PLEConfig | PluginHeadConfig, Field(discriminator="kind")]


class Task(Strict):
    name: Name
    label: str | None = Field(None, description="Label column; defaults to the task's name. A null label is unknown and masked.")
    weight: NonNegativeFloat = Field(1.0, description="λ of this task in the joint loss Σ λ·L.")
    tower: tuple[PositiveInt, ...] = Field((64,), description="Hidden widths of the task's tower.")

    @property
    def column(self) -> str:
        return self.label or self.name


class BinaryTask(Task):
    """Labels 0 or 1 (or false, true); binary cross-entropy on the logit."""

    kind: Literal["binary"] = "binary"
    true_probability: str | None = Field(
        None, description="Column with the true probability, where a data set knows it: gives best_possible_auc."
    )


class RegressionTask(Task):
    """A real label; loss ½(ŷ - y)²."""

    kind: Literal["regression"]
    bias: float = Field(0.0, description="Initial output: the label's mean saves the first steps.")


TaskConfig = Annotated[BinaryTask | RegressionTask, Field(discriminator="kind")]


class StaticWeighting(Strict):
    """The tasks' own weights, constant."""

    kind: Literal["static"] = "static"


WeightingConfig = StaticWeighting  # a union by `kind` as soon as there is a second one


# ----------------------------------------------------------------------------------------------------------- optimizer


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


# --------------------------------------------------------------------------------------------------------------- whole


class Config(Strict):
    """A run. Everything it depends on is here."""

    name: Name
    data: DataConfig
    features: tuple[Feature, ...] = Field(min_length=1)
    tables: dict[str, TableConfig] = {}
    sharding: ShardingConfig = ShardingConfig()
    model: HeadConfig = MMoEConfig()
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    weighting: WeightingConfig = StaticWeighting()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()

    @property
    def embedded(self) -> tuple[IdFeature | BucketFeature, ...]:
        """Features that read a table, in the order of the config."""
        return tuple(f for f in self.features if isinstance(f, IdFeature | BucketFeature))

    @property
    def dense(self) -> tuple[NumericFeature | VectorFeature, ...]:
        """Features used as numbers, in the order of the config."""
        return tuple(f for f in self.features if isinstance(f, NumericFeature | VectorFeature))

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.name}"

    def table_optimizer(self, table: str) -> SgdTable | AdagradTable | RowWiseAdagradTable | AdamTable:
        return getattr(self.tables.get(table), "optimizer", None) or self.optimizer.tables

    def init_scale(self, table: str) -> float:
        return getattr(self.tables.get(table), "init_scale", None) or self.sharding.init_scale

    @model_validator(mode="after")
    def _agree(self):
        mistakes = [*_clashes(self), *_sizes(self)]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def _clashes(config: Config) -> list[str]:
    """Names used twice, tables that disagree, columns that leak a label."""
    out: list[str] = []
    for what, names in (("feature", [f.name for f in config.features]), ("task", [t.name for t in config.tasks])):
        out += [
            f"{what} {n!r} is listed {names.count(n)} times; names must differ" for n in sorted({n for n in names if names.count(n) > 1})
        ]
    tables: dict[str, IdFeature | BucketFeature] = {}
    for f in config.embedded:
        first = tables.setdefault(f.table_name, f)
        if first.name != f.name and (first.rows, first.dim) != (f.rows, f.dim):
            out.append(
                f"table {f.table_name!r}: feature {f.name!r} wants {f.rows} rows x {f.dim} columns, feature {first.name!r} wants "
                f"{first.rows} x {first.dim}; give both the same size or different tables"
            )
    out += [f"table {n!r}: TorchRec cannot have a table of this name; choose another" for n in sorted(RESERVED & tables.keys())]
    for t in config.tables:
        if t not in tables:
            out.append(f"tables.{t}: no feature reads a table of this name{did_you_mean(t, tables)}")
    labels = {t.column: t.name for t in config.tasks}
    out += [
        f"feature {f.name!r} reads column {f.source!r}, the label of task {labels[f.source]!r}"
        for f in config.features
        if f.source in labels
    ]
    for name in tables:
        own = config.tables[name].sharding if name in config.tables else None
        allowed = own or config.sharding.types
        split = {"column_wise", "grid_shard"} & set(allowed)
        if split and config.table_optimizer(name).kind == "rowwise_adagrad" and (own or set(allowed) <= split):
            out.append(
                f"table {name!r}: {' and '.join(sorted(split))} cannot train with rowwise_adagrad, whose one momentum per row would differ "
                "in every column shard; choose adagrad or sgd, or another sharding type"
            )
    return out


def _sizes(config: Config) -> list[str]:
    out: list[str] = []
    streams, batch, workers = config.data.num_streams, config.train.global_batch_size, config.cluster.workers.max
    if batch % streams:
        out.append(
            f"train.global_batch_size {batch} is not divisible by data.num_streams {streams}; try {max(batch // streams, 1) * streams}"
        )
    if workers > streams:
        out.append(f"cluster.workers {workers} exceeds data.num_streams {streams}: a worker owns at least one stream; raise num_streams")
    if config.train.early_stopping and not config.data.validation:
        out.append("train.early_stopping needs data.validation: there is nothing to watch")
    if not any(t.weight for t in config.tasks):
        out.append("every task has weight 0: nothing would be trained")
    task, _, metric = config.train.monitor.rpartition(".")
    if task and task not in {t.name for t in config.tasks}:
        out.append(f"train.monitor {config.train.monitor!r}: no task {task!r}{did_you_mean(task, [t.name for t in config.tasks])}")
    if metric not in MONITORS:
        out.append(f"train.monitor {config.train.monitor!r}: {metric!r} is not one of {', '.join(MONITORS)}")
    else:
        kinds = {t.kind for t in config.tasks if not task or t.name == task}
        if metric in BINARY_ONLY and kinds and "binary" not in kinds or metric in REGRESSION_ONLY and kinds and "regression" not in kinds:
            out.append(f"train.monitor {config.train.monitor!r}: no task it covers has that metric")
    return out


BINARY_ONLY = ("auc", "gauc", "pr_auc", "logloss", "ne")
REGRESSION_ONLY = ("rmse", "mae")
MONITORS = ("loss", *BINARY_ONLY, *REGRESSION_ONLY)


def did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
