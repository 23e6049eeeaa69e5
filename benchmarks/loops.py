"""The loops that distmtl is measured against, on the same batches, model and optimizers. Each is one object; `train(batches)` trains.

InMemory   what is possible: raw FBGEMM tables, our head, fused Adam; no TorchRec, no reader, no framework
OverGloo   the same in two processes with half of the tables each: vectors and gradients over gloo, no ids
TorchRec   TorchRec as its examples use it: DistributedModelParallel, the experts a list of nn.Linear; `tuned` with our head
PyTorch    plain PyTorch as a good engineer writes it in an hour: nn.EmbeddingBag with sparse gradients
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed import DistributedModelParallel, TrainPipelineBase
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper

from benchmarks.limit import RawTables
from distmtl.batch import Batch
from distmtl.config import Config, MMoEConfig
from distmtl.model.embeddings import DenseColumns, embedding_tables
from distmtl.model.head import Head
from distmtl.model.kernels import Run, side_by_side
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense


class TextbookHead(nn.Module):
    """MMoE as it is usually written: every expert its own nn.Sequential, their outputs stacked."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        model = config.model
        assert isinstance(model, MMoEConfig) and config.interaction is None

        def mlp(into: int, layers: tuple[int, ...]) -> nn.Sequential:
            sizes = list(zip((into, *layers), layers, strict=False))
            return nn.Sequential(*(m for i, o in sizes for m in (nn.Linear(i, o), nn.ReLU())))

        self.experts = nn.ModuleList(mlp(width, model.expert) for _ in range(model.num_experts))
        self.gates = nn.ModuleList(nn.Linear(width, model.num_experts) for _ in config.tasks)
        self.towers = nn.ModuleList(nn.Sequential(mlp(model.expert[-1], t.tower), nn.Linear(t.tower[-1], 1)) for t in config.tasks)
        self.bf16 = config.train.precision == "bf16"

    def forward(self, features: Features) -> Tensor:
        x = features.x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            experts = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed = [(F.softmax(gate(x), dim=1).unsqueeze(2) * experts).sum(1) for gate in self.gates]
            return torch.cat([tower(m) for tower, m in zip(self.towers, mixed, strict=True)], dim=1).float()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).sum()


class InMemory:
    def __init__(self, config: Config, batches: list[Batch]):
        self.tables = RawTables(config, batches).tbe
        self.head = Head(config, Layout.of(config))
        self.dense = DenseColumns(config)
        initialise_dense(self.head, config.run.seed)
        self.optimizer = torch.optim.Adam([*self.dense.parameters(), *self.head.parameters()], lr=1e-3, fused=True)

    def train(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        pooled = self.tables(batch.sparse.values(), batch.sparse.offsets().long())
        dense, dtype = self.dense(batch.dense), torch.bfloat16 if self.head.bf16 else None
        vectors = side_by_side(pooled, [[Run(0, pooled.shape[1])]], None, dense, dtype)
        loss = loss_of(self.head(Features(vectors)), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OverGloo:
    """Two processes that hold every other feature's table, and have the ids of both processes' rows without asking for them (both times
    their own). Vectors go to the rows and their gradients back in one all-to-all each, in the head's precision, dense gradients
    into one all-reduce, which is awaited after the tables' update."""

    def __init__(self, config: Config, batches: list[Batch]):
        rank, self.rows = dist.get_rank(), len(batches[0].rows)
        assert len({sum(f.dim for f in config.embedded[half::2]) for half in (0, 1)}) == 1, "the halves are not as wide as each other"
        self.tables = RawTables(config, batches, [f.name for f in config.embedded[rank::2]])
        self.inputs = {b.step: _twice(*given, self.rows) for b, given in zip(batches, self.tables.inputs, strict=True)}
        self.head, self.dense = Head(config, Layout.of(config)), DenseColumns(config)
        initialise_dense(self.head, config.run.seed)
        self.dtype = torch.bfloat16 if self.head.bf16 else torch.float32
        parameters = [*self.dense.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        self.gradients, start = torch.zeros(sum(p.numel() for p in parameters)), 0
        for p in parameters:
            p.grad = self.gradients[start : start + p.numel()].view_as(p)
            start += p.numel()

    def train(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        pooled = self.tables.tbe(*self.inputs[batch.step])  # (2 B, width of this half)
        halves = _exchanged(pooled.detach().to(self.dtype)).view(2, self.rows, -1)
        x = torch.cat([*halves, self.dense(batch.dense).to(self.dtype)], dim=1).requires_grad_()
        loss = loss_of(self.head(Features((x,))), batch.labels)
        self.gradients.zero_()
        loss.backward()
        assert x.grad is not None
        summed = dist.all_reduce(self.gradients, async_op=True)
        width = pooled.shape[1]
        back = torch.cat([x.grad[:, :width], x.grad[:, width : 2 * width]])
        pooled.backward(_exchanged(back).view_as(pooled).float())
        summed.wait()
        self.optimizer.step()


def _exchanged(sent: Tensor) -> Tensor:
    """Half of it goes to the other of two processes."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received


def _twice(values: Tensor, offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The ids of every feature's rows, and once more."""
    lengths = offsets.diff().view(-1, rows)
    of_features = values.split(lengths.sum(1).tolist())
    twice = torch.cat([lengths, lengths], dim=1).flatten()
    return torch.cat([ids for of in of_features for ids in (of, of)]), torch.cat([twice.new_zeros(1), twice.cumsum(0)])


class TorchRec:
    class Model(nn.Module):
        def __init__(self, config: Config, head: nn.Module):
            super().__init__()
            self.tables, self.dense, self.head = embedding_tables(config), DenseColumns(config), head
            self.keys = [f.name for f in config.embedded]

        def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
            pooled = self.tables(batch.sparse).to_dict()
            vectors = (torch.cat([*(pooled[k] for k in self.keys), self.dense(batch.dense)], dim=1),)
            loss = loss_of(self.head(Features(vectors)), batch.labels)
            return loss, loss.detach()

    def __init__(self, config: Config, tuned: bool):
        head = Head(config, Layout.of(config)) if tuned else TextbookHead(config, Layout.of(config).width)
        model = self.Model(config, head)
        for table in model.tables.embedding_bags.values():
            apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, [table.weight], {"lr": 0.05})
        world = dist.get_world_size()
        constraints = {
            f.table_name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for f in config.embedded
        }
        planner = EmbeddingShardingPlanner(topology=Topology(world_size=world, compute_device="cpu"), constraints=constraints)
        sharders = [EmbeddingBagCollectionSharder()]
        plan = planner.collective_plan(model, sharders, dist.group.WORLD)
        self.model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
        dense = KeyedOptimizerWrapper(
            {k: p for k, p in self.model.named_parameters() if "embedding_bags" not in k}, lambda ps: torch.optim.Adam(ps, lr=1e-3)
        )
        self.optimizer = torchrec.optim.keyed.CombinedOptimizer([self.model.fused_optimizer, dense])

    def train(self, batches: Iterable[Batch]) -> None:
        pipeline, source = TrainPipelineBase(self.model, self.optimizer, torch.device("cpu")), iter(batches)
        with suppress(StopIteration):
            while True:
                pipeline.progress(source)


class PyTorch:
    def __init__(self, config: Config):
        sizes = {f.table_name: (f.table_rows, f.dim) for f in config.embedded}
        self.tables = nn.ModuleDict({k: nn.EmbeddingBag(*size, mode="sum", sparse=True) for k, size in sizes.items()})
        self.features = [(f.name, f.table_name) for f in config.embedded]
        self.dense, self.head = DenseColumns(config), TextbookHead(config, Layout.of(config).width)
        self.sparse = torch.optim.Adagrad(self.tables.parameters(), lr=0.05)
        self.adam = torch.optim.Adam([*self.dense.parameters(), *self.head.parameters()], lr=1e-3)

    def logits(self, batch: Batch) -> Tensor:
        jagged = batch.sparse.to_dict()
        pooled = [self.tables[table](jagged[name].values(), jagged[name].offsets()[:-1].long()) for name, table in self.features]
        return self.head(Features((torch.cat([*pooled, self.dense(batch.dense)], dim=1),)))

    def train(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        loss = loss_of(self.logits(batch), batch.labels)
        self.sparse.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        self.sparse.step()
        self.adam.step()
