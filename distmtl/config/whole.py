"""Config: a run, its sections checked against each other."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from typing import get_args

from pydantic import Field, model_validator

from distmtl.config.base import Name, Precision, Strict, did_you_mean
from distmtl.config.features import (
    RESERVED,
    BucketFeature,
    DataConfig,
    Feature,
    IdFeature,
    Ids,
    NumericFeature,
    SequenceFeature,
    VectorFeature,
)
from distmtl.config.heads import (
    AITMConfig,
    DotConfig,
    ESCM2Config,
    ESMMConfig,
    HeadConfig,
    HoMEConfig,
    InteractionConfig,
    MMoEConfig,
    Network,
    PEPNetConfig,
    SingleTaskConfig,
    STARConfig,
    STEMConfig,
)
from distmtl.config.tables import (
    SEQUENCE_SHARDING,
    AdagradTable,
    AdamTable,
    RowWiseAdagradTable,
    SgdTable,
    ShardingConfig,
    TableConfig,
)
from distmtl.config.tasks import BinaryTask, CalibrationConfig, DelayedFeedback, LognormalTask, Space, TaskConfig
from distmtl.config.tracking import TrackingConfig
from distmtl.config.training import (
    ClusterConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from distmtl.config.weighting import BanditWeighting, GradientWeighting, StaticWeighting, WeightingConfig

MONITORS = ("loss", *dict.fromkeys(m for kind in get_args(get_args(TaskConfig)[0]) for m in kind.metrics))


class Config(Strict):
    """A run. Everything it depends on is here."""

    name: Name = Field(description="Name of the run, and of its directory runs/<name>; default: the file's.")
    data: DataConfig = Field(description="Where the rows are, and in which order they are trained.")
    features: tuple[Feature, ...] = Field(min_length=1, description="What the model sees of a row.")
    tables: dict[str, TableConfig] = Field({}, description="Table → what it has of its own; tables follow from the features.")
    sharding: ShardingConfig = Field(ShardingConfig(), description="How tables may be cut over the workers.")
    interaction: InteractionConfig | None = Field(None, description="Feature crosses, before the head.")
    model: HeadConfig = Field(MMoEConfig(), description="The head: what the tasks share, and how.")
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="What is predicted.")
    weighting: WeightingConfig = Field(StaticWeighting(), description="How the tasks' losses are balanced.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="What updates the weights.")
    train: TrainConfig = Field(TrainConfig(), description="How long, in which steps, and what is kept.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="How metrics are computed.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="The processes that train.")
    run: RunConfig = Field(RunConfig(), description="Run directory and seed.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the run's figures go besides.")

    @property
    def embedded(self) -> tuple[IdFeature | SequenceFeature | BucketFeature, ...]:
        """Features that read a table, in the order of the config."""
        return tuple(f for f in self.features if isinstance(f, IdFeature | SequenceFeature | BucketFeature))

    @property
    def sequences(self) -> tuple[SequenceFeature, ...]:
        return tuple(f for f in self.features if isinstance(f, SequenceFeature))

    @property
    def sequence_tables(self) -> frozenset[str]:
        """Tables whose every id gives a vector of its own (TorchRec's EmbeddingCollection): of sequence features and their targets."""
        targets = {f.target for f in self.sequences}
        return frozenset(f.table_name for f in self.embedded if isinstance(f, SequenceFeature) or f.name in targets)

    @property
    def dense(self) -> tuple[NumericFeature | VectorFeature, ...]:
        """Features used as numbers, in the order of the config."""
        return tuple(f for f in self.features if isinstance(f, NumericFeature | VectorFeature))

    @property
    def domain(self) -> str | None:
        """The feature that is a row's domain."""
        return self.model.domain if isinstance(self.model, STARConfig) else None

    @property
    def network(self) -> HeadConfig | Network:
        """What the tasks share below their towers: the head itself, or what an entire-space head is built on."""
        return self.model.network if isinstance(self.model, ESMMConfig | ESCM2Config) else self.model

    @property
    def copies(self) -> int:
        """Embeddings that a row of a table holds, each as wide as its features' dim: with STEM one per task and a shared one."""
        return len(self.tasks) + 1 if isinstance(self.model, STEMConfig) else 1

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.name}"

    @property
    def exchange(self) -> Precision:
        """In which pooled vectors and their gradients travel between workers."""
        return self.sharding.exchange or self.train.precision

    def place_of(self, name: str) -> int:
        """Place of a task among the tasks."""
        return next(t for t, task in enumerate(self.tasks) if task.name == name)

    def space(self, task: TaskConfig) -> Space:
        """The rows a task is trained on, and what its output means (Task.space)."""
        if task.space or not task.parents:
            return task.space or "labelled"
        implied: dict[str, Space] = {"esmm": "entire", "escm2": "entire", "aitm": "joint"}
        return implied.get(self.model.kind, "observed")

    def conditions(self, task: TaskConfig) -> tuple[str, ...]:
        """The parents that must have happened: none in space labelled, where they only pass something on."""
        return () if self.space(task) == "labelled" else task.parents

    @property
    def by_descent(self) -> list[int]:
        """Places of the tasks, parents before their children."""
        names = [t.name for t in self.tasks]
        return [names.index(n) for n in TopologicalSorter({t.name: t.parents for t in self.tasks}).static_order()]

    @property
    def tables_read(self) -> dict[str, tuple[int, int]]:
        """Table → its rows and columns."""
        return {f.table_name: (f.table_rows, f.dim * self.copies) for f in self.embedded}

    @property
    def calibrations(self) -> dict[str, CalibrationConfig]:
        """Task → how it is calibrated, of those that are."""
        return {t.name: t.calibration for t in self.tasks if isinstance(t, BinaryTask) and t.calibration}

    def table_optimizer(self, table: str) -> SgdTable | AdagradTable | RowWiseAdagradTable | AdamTable:
        return getattr(self.tables.get(table), "optimizer", None) or self.optimizer.tables

    def init_scale(self, table: str) -> float:
        return getattr(self.tables.get(table), "init_scale", None) or self.sharding.init_scale

    @model_validator(mode="after")
    def _agree(self):
        mistakes = [
            *_clashes(self),
            *_of_sequences(self),
            *_descent(self),
            *_named_by_head(self),
            *_interaction(self),
            *_calibrated(self),
            *_weighted(self),
            *_sizes(self),
        ]
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
    tables: dict[str, Ids | BucketFeature] = {}
    for f in config.embedded:
        first = tables.setdefault(f.table_name, f)
        if first.name != f.name and (first.rows, first.dim) != (f.rows, f.dim):
            out.append(
                f"table {f.table_name!r}: feature {f.name!r} wants {f.rows} rows x {f.dim} columns, feature {first.name!r} wants "
                f"{first.rows} x {first.dim}; give both the same size or different tables"
            )
        elif first.extra_rows != f.extra_rows:
            out.append(
                f"table {f.table_name!r}: feature {f.name!r} wants {' and '.join(f.extra_rows) or 'no'} rows on top, {first.name!r} "
                f"{' and '.join(first.extra_rows) or 'none'}; give both the same out_of_range and missing, or different tables"
            )
        elif (one := getattr(first, "hashing", (1, False))) != (other := getattr(f, "hashing", (1, False))):
            reads, read = (f"{n} rows" + " by remainder and quotient" * quotient for n, quotient in (other, one))
            out.append(
                f"table {f.table_name!r}: an id of feature {f.name!r} reads {reads}, of {first.name!r} {read}; give both the same "
                "hashes and out_of_range, or different tables"
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


def _of_sequences(config: Config) -> list[str]:
    """Targets that sequences cannot be compared with, and sharding types that their tables cannot have."""
    features, out = {f.name: f for f in config.features}, []
    for f in config.sequences:
        target = features.get(f.target or "")
        if f.target and not isinstance(target, IdFeature):
            out.append(f"feature {f.name!r}: target {f.target!r} is no id feature{did_you_mean(f.target, features)}")
        elif isinstance(target, IdFeature) and target.dim != f.dim:
            out.append(f"feature {f.name!r} has dim {f.dim}, its target {target.name!r} {target.dim}; give both the same")
    for name in sorted(config.sequence_tables):
        allowed = getattr(config.tables.get(name), "sharding", None) or config.sharding.types
        if not set(allowed) & {*SEQUENCE_SHARDING}:
            out.append(f"table {name!r} is read by a sequence or its target: it needs a sharding type of {', '.join(SEQUENCE_SHARDING)}")
    return out


def _descent(config: Config) -> list[str]:
    """Parents that are unknown, in a circle, or cannot be parents."""
    tasks = {t.name: t for t in config.tasks}
    out = []
    for t in config.tasks:
        out += [f"task {t.name!r}: no task {p!r} to be its parent{did_you_mean(p, tasks)}" for p in t.parents if p not in tasks]
        out += [f"task {t.name!r}: parent {p!r} is listed {n} times; once is enough" for p, n in Counter(t.parents).items() if n > 1]
        if t.space in ("observed", "entire", "joint") and not t.parents:
            out.append(f"task {t.name!r}: space {t.space} is about its parents, and it has none; name them in parents")
    if out:
        return out
    try:
        list(TopologicalSorter({t.name: t.parents for t in config.tasks}).static_order())
    except CycleError as e:
        return [f"tasks: {' → '.join(reversed(e.args[1]))} is a circle of parents; a task cannot come before itself"]
    for t in config.tasks:
        space = config.space(t)
        if space == "labelled":
            continue
        out += [
            f"task {t.name!r}: its parent {p!r} is of kind {tasks[p].kind}, but space {space} needs a binary one; or set space: labelled"
            for p in t.parents
            if not isinstance(tasks[p], BinaryTask)
        ]
        if space in ("entire", "joint") and (not isinstance(t, BinaryTask) or t.delay or _reweighted(t) or t.kept_negatives < 1):
            out.append(
                f"task {t.name!r}: space {space} is of probabilities: it needs kind binary without delay, focal, pos_weight and "
                "kept_negatives, or space: observed"
            )
        before = [tasks[p] for p in _before(config, t) if p != t.name]
        if space in ("entire", "joint"):
            out += [
                f"task {p.name!r}: its delay makes a negative of what may yet happen, which space {space} of task {t.name!r} would take "
                "for final; leave it out, or use observed there"
                for p in before
                if isinstance(p, BinaryTask) and p.delay
            ]
        if space == "joint":
            out += [
                f"task {p.name!r}: with kept_negatives, nothing constant corrects task {t.name!r} of space joint; use entire or "
                "observed there"
                for p in before
                if isinstance(p, BinaryTask) and p.kept_negatives < 1
            ]
            if isinstance(t, BinaryTask) and t.true_probability_entire:
                out.append(f"task {t.name!r}: true_probability_entire is of the task given its parents, which space joint does not predict")
        if space == "entire" or space == "joint" and isinstance(config.model, AITMConfig) and config.model.calibrator:
            out += [
                f"task {p.name!r}: its focal or pos_weight bends P({p.name}), which space {space} of task {t.name!r} "
                f"{'multiplies' if space == 'entire' else 'is held below'}; leave it out"
                for p in before
                if _reweighted(p)
            ]
    if isinstance(config.model, ESMMConfig | ESCM2Config) and not any(config.space(t) == "entire" for t in config.tasks):
        out.append(f"model {config.model.kind}: no task has space entire; name the parents of the conversion task (parents: [click])")
    if isinstance(config.model, AITMConfig) and not any(t.parents for t in config.tasks):
        out.append("model aitm: no task has parents, so none has anything to pass on; name them (parents: [click]) or choose single_task")
    if isinstance(config.model, AITMConfig) and config.model.calibrator and not any(config.space(t) == "joint" for t in config.tasks):
        out.append("model.calibrator keeps a joint task below its parents, and no task has space joint; set it to 0")
    return out


def _reweighted(task: TaskConfig) -> bool:
    """Whether its loss makes its logit another than that of its labels."""
    return isinstance(task, BinaryTask) and bool(task.focal or task.pos_weight != 1.0)


def _waits(task: TaskConfig) -> bool:
    """Whether the time until it happens is part of its loss."""
    return isinstance(task, BinaryTask) and isinstance(task.delay, DelayedFeedback)


def _before(config: Config, task: TaskConfig) -> dict[str, None]:
    """Names of a task and all that must have happened before it."""
    parents = [config.tasks[config.place_of(p)] for p in config.conditions(task)]
    return {task.name: None} | {name: None for p in parents for name in _before(config, p)}


def _named_by_head(config: Config) -> list[str]:
    """Features and tasks that the head names and the config lacks, and what it cannot go with."""
    model, out = config.model, []
    features = {f.name: f for f in config.features}
    if isinstance(model, STARConfig):
        feature = features.get(model.domain)
        if not isinstance(feature, IdFeature):
            out.append(f"model.domain {model.domain!r} is no id feature{did_you_mean(model.domain, features)}")
        elif len(config.features) == 1:
            out.append(f"model star: its main network leaves the domain {model.domain!r} out, and there is no other feature; add some")
        elif feature.hashes > 1:
            out.append(f"model.domain {model.domain!r}: a domain is one row of its table, not {feature.hashes}; leave its hashes out")
    if isinstance(model, STEMConfig) and config.interaction:
        out.append("interaction: model stem has embeddings per task, which no interaction crosses; leave it out or choose another model")
    if isinstance(model, PEPNetConfig):
        named = (*model.domain_features, *model.gate_features)
        out += [f"model pepnet: no feature {n!r}{did_you_mean(n, features)}" for n in named if n not in features]
    if isinstance(model, HoMEConfig) and model.groups:
        names, listed = {t.name for t in config.tasks}, [n for group in model.groups for n in group]
        out += [f"model.groups: no task {n!r}{did_you_mean(n, names)}" for n in listed if n not in names]
        out += [
            f"model.groups: task {n!r} is in {listed.count(n)} groups; it must be in one" for n in sorted(names) if listed.count(n) != 1
        ]
    return out


def _interaction(config: Config) -> list[str]:
    """Embeddings that have no dot product."""
    if not isinstance(config.interaction, DotConfig):
        return []
    if len(config.embedded) < 2:
        return ["interaction dot needs two embedded features or more: there is no pair to multiply"]
    (usual, _), *_ = Counter(f.dim for f in config.embedded).most_common(1)
    odd = [f"{f.name!r} has {f.dim}" for f in config.embedded if f.dim != usual]
    return [f"interaction dot: embeddings need one dim, but {', '.join(odd)}, and the others {usual}; make them equal"] if odd else []


def _calibrated(config: Config) -> list[str]:
    """What calibrations need and the config lacks."""
    out, sliced = [], {f.name: getattr(f, "hashes", 1) for f in config.embedded if not isinstance(f, SequenceFeature)}
    for task, calibration in config.calibrations.items():
        if not config.data.validation:
            out.append(f"task {task!r}: calibration is fitted on the validation split; set data.validation")
        if calibration.slices and calibration.slices not in sliced:
            hint = did_you_mean(calibration.slices, sliced)
            out.append(f"task {task!r}: calibration.slices {calibration.slices!r} is no id or bucket feature{hint}")
        elif calibration.slices and sliced[calibration.slices] > 1:
            out.append(f"task {task!r}: calibration.slices {calibration.slices!r} has hashes, so that no row of its table is one value's")
    return out


def _weighted(config: Config) -> list[str]:
    """What a weighting method needs and the config lacks."""
    method, head = config.weighting, config.model
    if isinstance(method, StaticWeighting):
        return []
    if sum(t.weight > 0 for t in config.tasks) < 2:
        return [f"weighting {method.kind} balances tasks, and only one has a weight above 0; add a task, or leave weighting out"]
    if isinstance(method, BanditWeighting) and not config.data.validation:
        return ["weighting bandit is rewarded by the loss on the validation split; set data.validation"]
    out = []
    if method.of_positive_losses:
        out += [
            f"task {t.name!r}: its loss, a density's, may fall below 0, where weighting {method.kind} means nothing; choose rlw, bandit, "
            "or a weighting of gradients such as pcgrad"
            for t in config.tasks
            if t.weight and (isinstance(t, LognormalTask) or _waits(t))
        ]
    if not isinstance(method, GradientWeighting):
        return out
    at_features = method.cut == "features" or not config.network.shares
    if method.cut == "network" and at_features or isinstance(head, SingleTaskConfig) and method.cut != "features":
        out.append(
            f"weighting {method.kind} compares the tasks' gradients in the network that they share, and {config.network.kind} has none; "
            "choose another model, or weighting.cut: features, which balances the embeddings that they share"
        )
    elif at_features and not config.embedded:
        out.append(f"weighting {method.kind} compares the tasks' gradients at the embeddings, and no feature has any; leave weighting out")
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
    covered = [t for t in config.tasks if task in ("", t.name)]
    if not covered:
        out.append(f"train.monitor {config.train.monitor!r}: no task {task!r}{did_you_mean(task, [t.name for t in config.tasks])}")
    if metric not in MONITORS:
        out.append(f"train.monitor {config.train.monitor!r}: {metric!r} is not one of {', '.join(MONITORS)}")
    elif metric != "loss" and covered and not any(metric in t.metrics for t in covered):
        out.append(f"train.monitor {config.train.monitor!r}: no task it covers has that metric")
    elif metric.endswith("gauc") and not config.data.group:
        out.append(f"train.monitor {config.train.monitor!r}: gauc needs data.group, the column of the groups")
    elif metric.startswith("joint_") and not any(config.space(t) == "entire" for t in covered):
        out.append(f"train.monitor {config.train.monitor!r}: joint_ metrics are of tasks of space entire, and no task it covers is one")
    elif metric.startswith("entire_") and not any(getattr(t, "true_probability_entire", None) for t in covered):
        out.append(f"train.monitor {config.train.monitor!r}: no task it covers has a true_probability_entire, which entire_auc needs")
    return out
