"""The parity gate: train the same few steps in several ways and compare; export, and compare. Run it on your own config before a big run.

Everything is computed on this machine's CPU by forked ranks, on the first rows of the config's own training data, dropout off.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import JaggedTensor

from distmtl import checkpoint
from distmtl.batch import Batch
from distmtl.config import Config, Ids, StaticWeighting, TableConfig
from distmtl.config_file import parse_config
from distmtl.data.dataset import open_dataset
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group, quieten
from distmtl.distributed.ranks import run_ranks
from distmtl.distributed.sharding import local_shards
from distmtl.evaluation import evaluate
from distmtl.exporting.writer import export
from distmtl.loop import Training, train
from distmtl.model.embeddings import DenseColumns
from distmtl.model.experts import Experts
from distmtl.model.head import Head
from distmtl.model.home import NormalisedExperts
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import Terms
from distmtl.model.sequences import SequencePooling
from distmtl.model.weighting import weighting
from distmtl.optim import dense_optimizer
from distmtl.progress import Progress
from distmtl.serving.comparison import compare, ways_apart
from distmtl.storage import place

STEPS = 6
MAX_TABLE_ROWS = 100_000  # larger tables are shrunk, their ids hashed into them
MAX_BATCH = 2048
LOSS_TOLERANCE = 1e-5
WEIGHTING_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-6
EXPORT_TOLERANCE = 1e-5
State = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison: what differed most, and by how much it may."""

    name: str
    compared: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # NaN does not pass


def verify(config: Config, workers: int = 2, say: Callable[[str], None] = print) -> list[Check]:
    """Run every check that applies to the config; says what it does, and what it changed in the config to do it.

    Raises:
        DistmtlError: the config or its data are unsound.
    """
    quieten()
    torch.set_num_threads(1)  # forked ranks inherit no thread pool
    with tempfile.TemporaryDirectory() as folder:
        small, changes = shrink(config, folder)
        for change in changes:
            say(f"for this check {change}")
        checks = []
        for check in _checks(small, workers, Path(folder)):
            word = "ok  " if check.passed else "FAIL"
            say(f"{word} {check.name}: {check.compared} differ by {check.difference:.1e} (allowed {check.tolerance:.0e})")
            checks.append(check)
        return checks


def shrink(config: Config, folder: str) -> tuple[Config, list[str]]:
    """The config as it is verified, and in words what was changed."""
    changes, features = [], []
    for feature in config.features:
        if isinstance(feature, Ids) and feature.rows > MAX_TABLE_ROWS:
            changes.append(
                f"table {feature.table_name!r} has {MAX_TABLE_ROWS:,} rows instead of {feature.rows:,}, and ids are hashed into it"
                + (", none dropped" if feature.id_dropout else "")
            )
            feature = feature.model_copy(update={"rows": MAX_TABLE_ROWS, "out_of_range": "hash", "id_dropout": 0.0})
        features.append(feature)
    batch, streams = config.train.global_batch_size, config.data.num_streams
    if batch > MAX_BATCH:
        batch = max(MAX_BATCH // streams, 1) * streams
        changes.append(f"the global batch has {batch} rows instead of {config.train.global_batch_size}")
    raw = config.model_dump(mode="json")
    raw["features"] = [f.model_dump(mode="json") for f in features]
    for network in (raw["model"], raw["model"].get("network", {})):
        if network.get("dropout"):
            network["dropout"] = 0.0
            changes.append("dropout is off")
    raw["optimizer"]["schedule"] = {"warmup_steps": 0, "decay": "none"}
    raw["train"] |= {
        "global_batch_size": batch,
        "steps": STEPS,
        "eval_every": STEPS,
        "save_every": STEPS,
        "log_every": 1,
        "early_stopping": None,
        "keep": 9,
    }
    raw["data"] |= {"validation": config.data.validation or config.data.test, "test": None}
    raw["cluster"] |= {"device": "cpu", "workers": 1}
    raw["run"]["dir"] = folder
    del raw["tracking"]  # these are no runs to look at
    return parse_config(raw), list(dict.fromkeys(changes))


def _checks(config: Config, workers: int, folder: Path) -> Iterator[Check]:
    one = run_ranks(short_run, 1, config)
    losses, weights, _ = unsharded_run(config, one)
    plain = "of plain PyTorch and of TorchRec on 1 worker"
    yield Check("unsharded = sharded", f"losses {plain}", _apart(losses, one[0].losses), LOSS_TOLERANCE)
    if not isinstance(config.weighting, StaticWeighting):
        off = _apart(weights, one[0].weighting) / float(weights.abs().max())
        yield Check(f"weighting {config.weighting.kind}", f"tasks' weights {plain}", off, WEIGHTING_TOLERANCE)
    many = run_ranks(short_run, workers, config)
    yield Check(f"1 = {workers} workers", "losses", _apart(one[0].losses, many[0].losses), LOSS_TOLERANCE)
    yield Check(
        f"{workers} workers agree", "dense gradients of the last step", max(_apart(many[0].gradients, r.gradients) for r in many), 0.0
    )
    for sharding in allowed_types(config, workers):
        forced = config.model_copy(update={"tables": {t: _table(config, t, sharding) for t in {f.table_name for f in config.embedded}}})
        ranks = run_ranks(short_run, workers, forced)
        yield Check(f"{sharding} on {workers} workers", "losses, to 1 worker's", _apart(one[0].losses, ranks[0].losses), LOSS_TOLERANCE)

    whole, parts = (_in(config, folder / name) for name in ("whole", "parts"))
    first = parts.model_copy(
        update={"train": parts.train.model_copy(update={"steps": STEPS // 2, "eval_every": STEPS // 2, "save_every": STEPS // 2})}
    )
    result = run_ranks(_train, workers, whole)[0]
    run_ranks(_train, workers, first)
    half = run_ranks(loaded_state, workers, parts)[0]
    yield Check(
        f"resharded, {workers} workers to 1",
        "weights and optimizer state on loading",
        _states(half, run_ranks(loaded_state, 1, parts)[0]),
        0.0,
    )
    run_ranks(_train, workers, parts)
    states = [run_ranks(loaded_state, workers, c)[0] for c in (whole, parts)]
    yield Check("uninterrupted = resumed", "weights and optimizer state at the end", _states(*states), 0.0)
    if config.data.validation:
        again = run_ranks(_evaluate, 1, whole)[0]
        pairs = [(a, again["validation"][t].get(m)) for t, values in result["metrics"]["validation"].items() for m, a in values.items()]
        apart = [math.inf if a is None or b is None else abs(a - b) for a, b in pairs if (a, b) != (None, None)]
        yield Check("train's metrics = evaluate's", "metrics of the checkpoint", max(apart), METRIC_TOLERANCE)
    of_export, of_ways = run_ranks(_exported, 1, whole, str(folder / "export"))[0]
    yield Check("checkpoint = export", "predictions of the training code and of Predictor", of_export, EXPORT_TOLERANCE)
    yield Check("export = predict = serve", "predictions of Arrow rows, Parquet and a JSON request", of_ways, EXPORT_TOLERANCE)


def _exported(config: Config, folder: str) -> tuple[float, float]:
    """The largest difference of a prediction: from the checkpoint's, and between the ways to ask an export."""
    export(config.run_dir, folder, say=lambda text: None)
    data = config.data.validation or config.data.train
    of_export = max(c.difference for c in compare(config.run_dir, folder, data, rows=MAX_BATCH))
    return of_export, ways_apart(folder, open_dataset(data), f"{folder}-predictions")


def allowed_types(config: Config, workers: int) -> list[str]:
    """Sharding types that are right on one host for every table's optimizer."""
    rowwise = any(config.table_optimizer(f.table_name).kind == "rowwise_adagrad" for f in config.embedded)
    return ["table_wise", "row_wise"] + ([] if rowwise or workers < 2 else ["column_wise"])


@dataclass(frozen=True)
class ShortRun:
    """What a rank saw in STEPS steps."""

    losses: Tensor  # (STEPS, K)
    weighting: Tensor  # (STEPS, T) λ
    batches: list[Batch]
    before: State  # all parameters, whole, before the first step
    after: State
    gradients: Tensor  # flat dense gradient of the last step
    sharding: dict[str, str]  # table → sharding type


def short_run(config: Config, steps: int = STEPS) -> ShortRun:
    """The first steps on this rank, nothing written."""
    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        before = _whole(training.model.state_dict())
        batches = list(training.reader.batches(0, steps))
        training.model.train()
        source = iter(batches)
        numbers = [training.pipeline.progress(source) for _ in range(len(batches))]
        losses, weights = (torch.stack([getattr(n, name) for n in numbers]) for name in ("losses", "weighting"))
        after, sharding = _whole(training.model.state_dict()), {t.table: t.kind for t in training.planned}
        return ShortRun(losses, weights, batches, before, after, training.optimizers.gradients.clone(), sharding)


def unsharded_run(config: Config, ranks: list[ShortRun]) -> tuple[Tensor, Tensor, State]:
    """(steps, K) losses and (steps, T) λ of the same steps in one process without TorchRec (F.embedding_bag, table optimizers written
    out, tasks' gradients side by side), parameters and state afterwards."""
    weights = {n: v.clone() for n, v in ranks[0].before.items()}
    tables = {f.table_name: weights[_weight(config, f)].requires_grad_() for f in config.embedded}
    columns, pooling, head = DenseColumns(config), SequencePooling(config), Head(config, Layout.of(config))
    # under the names of MultiTaskModel
    model = nn.ModuleDict({"features": nn.ModuleDict({"dense": columns}), "pooling": pooling, "head": head})
    model.load_state_dict({name: weights[f"model.{name}"] for name in model.state_dict()})
    dense, terms = dense_optimizer(config.optimizer, list(model.parameters())), Terms(config)
    momentum = {name: torch.zeros_like(table) for name, table in tables.items()}
    balance, shared, owners = weighting(config), Shared(head), torch.tensor(terms.owners)
    losses, weightings = [], []
    for step in range(len(ranks[0].batches)):
        batches = [rank.batches[step] for rank in ranks]
        outputs = head(_beside([_features(config, batch, tables, columns, pooling) for batch in batches]))
        sums = totals = torch.zeros(len(terms.names))
        for batch, of_rank in zip(batches, outputs.split([len(b.rows) for b in batches]), strict=True):
            errors, counts = terms(of_rank, batch)
            sums, totals = sums + (errors * counts).sum(0), totals + counts.sum(0)
        means = torch.where(totals > 0, sums / totals.clamp(min=1e-30), 0.0)
        losses.append(means.detach().double())
        model.zero_grad()
        for table in tables.values():
            table.grad = None
        weighed = means * torch.tensor(terms.coefficients)
        of_tasks = weighed.new_zeros(len(config.tasks)).index_add(0, owners, weighed)
        present = (totals[: len(config.tasks)] > 0) & torch.tensor([t.weight > 0 for t in config.tasks])
        gram = shared.gram(of_tasks) if config.weighting.reads_gradients else None
        weightings.append(balance(batches[0].step, of_tasks.detach().double(), present, gram))
        above = shared.above(list(model.parameters())) if balance.surgery else []  # what only a task's own, unweighted loss trains
        own = torch.autograd.grad(of_tasks.sum(), above, retain_graph=True, allow_unused=True) if above else []
        (of_tasks * weightings[-1].float()).sum().backward()
        for parameter, gradient in zip(above, own, strict=True):
            parameter.grad = gradient
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        dense.step()
        for name, table in tables.items():
            _step_table(config.table_optimizer(name), table, momentum[name])
    after = {n: w.detach() for n, w in weights.items()}
    after |= {f"model.{n}": v for n, v in model.state_dict().items()} | {f"loss.weighting.{n}": v for n, v in balance.state_dict().items()}
    return torch.stack(losses), torch.stack(weightings), after


class Shared:
    """What the tasks share in a head, seen as it computes: outputs of the experts that its cut mixes, or the points of the cut."""

    def __init__(self, head: Head):
        self.head, self.experts = head, list[Tensor]()
        for module in head.modules():
            if module is head.cut or isinstance(module, Experts | NormalisedExperts):
                module.register_forward_hook(self._passed)

    def _passed(self, module: nn.Module, args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        if module is self.head.cut:
            mixed = len(args) == 2 and args[1] is not None
            self.points, self.outputs = outputs, list(self.experts if mixed else outputs)
        else:
            self.experts = outputs

    def gram(self, losses: Tensor) -> Tensor:
        """(T, T) float64: products of the losses' gradients, every one a vector over all rows and outputs."""
        found = [torch.autograd.grad(loss, self.outputs, retain_graph=True, materialize_grads=True) for loss in losses.unbind()]
        vectors = torch.stack([torch.cat([g[:, : self.head.cut.columns].flatten() for g in of_loss]).double() for of_loss in found])
        return vectors @ vectors.T

    def above(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those that the cut's points do not depend on."""
        reached = torch.autograd.grad([p.sum() for p in self.points], parameters, retain_graph=True, allow_unused=True)
        return [p for p, gradient in zip(parameters, reached, strict=True) if gradient is None]


def _features(config: Config, batch: Batch, tables: dict[str, Tensor], columns: nn.Module, pooling: nn.Module) -> Features:
    """A rank's rows as the head sees them."""
    ids = {f.name: batch.sparse[f.name] for f in config.embedded}
    lists = {
        f.name: JaggedTensor(F.embedding(ids[f.name].values(), tables[f.table_name]), lengths=ids[f.name].lengths())
        for f in config.embedded
        if f.table_name in config.sequence_tables
    }
    weighed = pooling([lists])
    parts = [
        F.embedding_bag(ids[f.name].values(), tables[f.table_name], ids[f.name].offsets()[:-1], mode=f.pooling)
        if f.pooling in ("sum", "mean")
        else weighed[f.name]
        for f in config.embedded
    ]
    copies = [[part[:, c * f.dim : (c + 1) * f.dim] for f, part in zip(config.embedded, parts, strict=True)] for c in range(config.copies)]
    dense = columns(batch.dense)
    return Features(tuple(torch.cat([*copy, dense], dim=1) for copy in copies), batch.domain, (batch.weights > 0).any(1))


def _beside(ranks: list[Features]) -> Features:
    """All ranks' rows: what is normalised, is over all of them."""
    domains = [f.domain for f in ranks if f.domain is not None]
    vectors = tuple(torch.cat(parts) for parts in zip(*(f.vectors for f in ranks), strict=True))
    return Features(vectors, torch.cat(domains) if domains else None, torch.cat([f.real for f in ranks if f.real is not None]))


def _weight(config: Config, feature: Any) -> str:
    """The name of the table that a feature reads."""
    listed = feature.table_name in config.sequence_tables
    kind = f"sequences.{feature.dim * config.copies}.embeddings" if listed else "embeddings.embedding_bags"
    return f"model.{kind}.{feature.table_name}.weight"


def _step_table(optimizer: Any, table: Tensor, momentum: Tensor) -> None:
    """One step of FBGEMM's SGD, Adagrad or row-wise Adagrad (Gupta et al. 2014: one momentum per row), written out."""
    with torch.no_grad():
        g = table.grad
        assert g is not None
        if optimizer.kind == "sgd":
            table -= optimizer.lr * g
            return
        momentum += g.square() if optimizer.kind == "adagrad" else g.square().mean(1, keepdim=True)
        table -= optimizer.lr * g / (momentum.sqrt() + optimizer.eps)


def loaded_state(config: Config) -> State:
    """What a run that continues from the newest checkpoint begins with: weights and optimizer state, whole."""
    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        found, _ = checkpoint.newest(place(config.run_dir) / "checkpoints")
        assert found is not None
        checkpoint.load(found, training.model, training.optimizers)
        fused = training.optimizers.fused.state_dict()["state"]
        state = _whole(training.model.state_dict()) | _whole({f"{n}/{k}": v for n, values in fused.items() for k, v in values.items()})
        return state | {f"{n}/{k}": v for n, values in training.optimizers.dense_state().items() for k, v in values.items()}


def _whole(state: dict[str, Any]) -> State:
    """A state dict with its sharded tensors put together from all ranks."""
    mine = [(name, tuple(value.size()), None, None) for name, value in state.items() if hasattr(value, "local_shards")]
    shards = [(name, None, tensor.clone(), offsets) for name, tensor, offsets in local_shards(state)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [*mine, *shards])
    whole = {n: v.detach().clone() for n, v in state.items() if not hasattr(v, "local_shards")}
    for rank in everyone:
        whole |= {name: torch.zeros(size) for name, size, tensor, _ in rank if tensor is None and name not in whole}
    for name, _, tensor, offsets in (s for rank in everyone for s in rank if s[2] is not None):
        whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=False))] = tensor
    return whole


def _train(config: Config) -> dict[str, Any]:
    return train(config, report=lambda record: None)


def _evaluate(config: Config) -> dict[str, Any]:
    return evaluate(config.run_dir, split="validation")


def _in(config: Config, folder: Path) -> Config:
    shutil.rmtree(folder, ignore_errors=True)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def _table(config: Config, table: str, sharding: Any) -> TableConfig:
    return config.tables.get(table, TableConfig()).model_copy(update={"sharding": (sharding,)})


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _states(a: State, b: State) -> float:
    """The largest difference; infinite where one has what the other lacks."""
    return max(_apart(a[k], b[k]) for k in a) if a.keys() == b.keys() else float("inf")
