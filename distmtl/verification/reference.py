"""The same steps in plain PyTorch, in one process, without TorchRec: training written a second time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import JaggedTensor

from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.model.embeddings import DenseColumns
from distmtl.model.experts import Experts
from distmtl.model.head import Head
from distmtl.model.home import NormalisedExperts
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import Terms
from distmtl.model.sequences import SequencePooling
from distmtl.model.weighting import make_weighting
from distmtl.optim import dense_optimizer
from distmtl.verification.runs import ShortRun, State


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
    balance, shared, owners = make_weighting(config), Shared(head), torch.tensor(terms.owners)
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
