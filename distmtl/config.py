"""Every knob of a run, validated. YAML plus dotted overrides in, one frozen `Config` out.

    config = load_config("configs/synthetic.yaml", ["train.epochs=2", "model.num_experts=8"])

Unknown keys are refused with a suggestion, alternatives carry a `kind`, and all mistakes of a file are reported at once.
Relative paths under `data` are relative to the YAML file; `run.dir` is relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from distmtl.errors import DistmtlError

Unit = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_\-]*$")]
Widths = tuple[PositiveInt, ...]


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
    log_every: PositiveInt = Field(50, description="Steps between progress lines.")
    eval_every: PositiveInt | None = Field(None, description="Steps between evaluations; default: at the end of every epoch.")
    save_every: PositiveInt | None = Field(None, description="Steps between checkpoints; default: at every evaluation.")
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


class ClusterConfig(Strict):
    workers: PositiveInt = Field(1, description="Processes; tables are sharded over them.")
    cpus_per_worker: PositiveInt = Field(1, description="CPU cores, and threads, of a worker.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where every worker can have one.")
    max_failures: NonNegativeInt = Field(3, description="Restarts from the newest checkpoint before giving up.")
    collective_timeout_s: PositiveInt = Field(300, description="A worker silent for this long counts as hung.")


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
            out.append(f"tables.{t}: no feature reads a table of this name{_did_you_mean(t, tables)}")
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
    streams, batch, workers = config.data.num_streams, config.train.global_batch_size, config.cluster.workers
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
        out.append(f"train.monitor {config.train.monitor!r}: no task {task!r}{_did_you_mean(task, [t.name for t in config.tasks])}")
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


# ---------------------------------------------------------------------------------------------------------------- load


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides, validate.

    Raises:
        DistmtlError: file missing or not YAML, or the list of every mistake in it.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DistmtlError(f"config {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DistmtlError(f"config {path} is not valid YAML: {_yaml_mistake(e)}") from None
    if not isinstance(raw, dict):
        found = "is empty; it" if raw is None else f"holds a {type(raw).__name__}, but"
        raise DistmtlError(f"config {path} {found} must hold a mapping (name: …, data: …)")
    for item in overrides:
        _override(raw, item)
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9_-]", "-", path.stem if path.stem[:1].isalpha() else f"_{path.stem}"))
    config = parse_config(raw, str(path))
    data = config.data.model_copy(update={k: _resolve(getattr(config.data, k), path.parent) for k in ("train", "validation", "test")})
    return config.model_copy(update={"data": data})


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validate a mapping, as `load_config` does for a file.

    Raises:
        DistmtlError: the list of every mistake.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        errors = e.errors()
        inner = {err["loc"][:1] for err in errors if len(err["loc"]) > 1}  # a list with a bad element is not also too short
        lines = [line for err in errors if err["type"] != "too_short" or err["loc"] not in inner for line in _sentence(err, raw)]
        raise DistmtlError(
            f"{where}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same object, every field spelled out."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def parse_yaml(text: str) -> Any:
    """YAML as it is meant: a key given twice is an error, and 1e-3 is a number.

    Raises:
        yaml.YAMLError: not YAML.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


for _yaml in (_Loader, _Dumper):  # YAML 1.1, PyYAML's, wants a dot and a sign: 1.0e-3
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _yaml_mistake(e: Exception) -> str:
    mark = getattr(e, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {e.problem}" if mark else " ".join(str(e).split())  # type: ignore[attr-defined]


def _override(raw: dict[str, Any], item: str) -> None:
    key, sep, value = item.partition("=")
    *parents, leaf = key.strip().split(".")
    if not sep or not all((*parents, leaf)):
        raise DistmtlError(f"override {item!r} is not section.key=value")
    node: Any = raw
    for i, part in enumerate(parents):
        node = _enter(node, part, ".".join(parents[:i]), item)
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as e:
        raise DistmtlError(f"override {item!r}: the value is not valid YAML: {_yaml_mistake(e)}") from None
    if isinstance(node, list):
        node[_index(node, leaf, ".".join(parents), item)] = parsed
    else:
        node[leaf] = parsed


def _enter(node: Any, part: str, where: str, item: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, where, item)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise DistmtlError(f"override {item!r}: {'.'.join(filter(None, (where, part)))} is a plain value and has no fields")
    return node[part]


def _index(node: list[Any], part: str, where: str, item: str) -> int:
    """An element of a list, by number or by its `name`."""
    names = [n.get("name") if isinstance(n, dict) else None for n in node]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise DistmtlError(f"override {item!r}: {where} has no element {part!r}{_did_you_mean(part, [n for n in names if n])}")


def _resolve(path: str | None, base: Path) -> str | None:
    if path is None or "://" in path or Path(path).is_absolute():
        return path
    return str((base / Path(path).expanduser()).resolve())


def _sentence(err: Any, raw: Any) -> list[str]:
    """One pydantic error as sentences with the key's place in the file."""
    place, around, members = _place(err["loc"], raw)
    where, kind, got = ".".join(place), err["type"], f"{err['input']!r:.80}"
    start = f"{where}: " if where else ""
    if kind == "extra_forbidden":
        elsewhere = [tag for tag, model in members.items() if place[-1] in model.model_fields]
        if elsewhere:
            return [f"{start}unknown key for this kind; it belongs to {' and '.join(elsewhere)}"]
        return [f"{start}unknown key{_elsewhere(place[-1], around)}"]
    if kind == "missing":
        return [f"{start}missing; it must be given"]
    if kind == "union_tag_invalid":
        return [f"{start}kind {err['ctx']['tag']!r} is not one of {', '.join(members)}{_did_you_mean(err['ctx']['tag'], members)}"]
    if kind == "union_tag_not_found":
        return [f"{start}kind is missing; it is one of {', '.join(members)}"]
    if kind == "value_error":
        lines = str(err["ctx"]["error"]).split("\n")
        return [line if line.startswith(("feature", "table", "task")) else start + line for line in lines]
    if kind == "string_pattern_mismatch":
        rule = "package.module:Name" if place[-1] == "target" else "letters, digits, _ and -, and not start with a digit or -"
        return [f"{start}must be {rule}, got {got}"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{start}must be a mapping (key: value), got {got}"]
    if kind == "tuple_type":
        return [f"{start}must be a list, got {got}"]
    if kind == "too_short":
        return [f"{start}must not be empty"]
    truth = kind == "string_type" and isinstance(err["input"], bool)
    hint = "; YAML takes yes, no, on and off for truth values: quote it" if truth else ""
    return [f"{start}{err['msg'][:1].lower()}{err['msg'][1:]}, got {got}{hint}"]


def _place(loc: tuple[Any, ...], raw: Any) -> tuple[list[str], list[str], dict[str, type[Strict]]]:
    """Of an error: its keys in the file (elements of a list by their name), the keys known beside it, and the kinds there are."""
    annotation: Any = Config
    place: list[str] = []
    around: list[str] = []
    union: dict[str, type[Strict]] = {}
    kinds: dict[str, type[Strict]] = {}
    for part in loc:
        members = _members(annotation)
        if len(members) > 1:  # pydantic puts the kind in between
            annotation, union = members.get(part), members
            continue
        model = next(iter(members.values()), None)
        around, kinds, union = list(model.model_fields) if model else [], union, {}
        if model:
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        else:  # of a list or a mapping
            annotation = next((a for a in reversed(get_args(annotation)) if a is not Ellipsis), None)
        raw = raw[part] if isinstance(raw, list) and isinstance(part, int) else raw.get(part) if isinstance(raw, dict) else None
        name = raw.get("name") if isinstance(part, int) and isinstance(raw, dict) else None
        place.append(name if isinstance(name, str) else str(part))
    return place, around, _members(annotation) or kinds


def _members(annotation: Any) -> dict[str, type[Strict]]:
    """The config classes that an annotation allows here, by their kind."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        kind = annotation.model_fields.get("kind")
        return {get_args(kind.annotation)[0] if kind else "": annotation}
    if annotation is None or get_origin(annotation) in (tuple, dict, Literal):
        return {}
    arguments = get_args(annotation)
    return {k: m for a in (arguments[:1] if get_origin(annotation) is Annotated else arguments) for k, m in _members(a).items()}


def _elsewhere(key: str, around: list[str]) -> str:
    """Where an unknown key probably belongs."""
    if near := _did_you_mean(key, around):
        return near
    for section, field in Config.model_fields.items():
        members = list(_members(field.annotation).values())
        if len(members) == 1 and key in members[0].model_fields and key != "kind":
            return f"; did you mean '{section}.{key}'?"
    return f"; known here: {', '.join(around)}"


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
