"""MultiTaskModel: batch → outputs. TrainModel: with the joint loss, as the train pipeline wants it."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedTensor

from distmtl.batch import Batch
from distmtl.config import Config
from distmtl.model.embeddings import FeatureVector, embedding_tables, sequence_tables
from distmtl.model.head import Head
from distmtl.model.layout import Layout
from distmtl.model.loss import JointLoss, StepNumbers
from distmtl.model.sequences import SequencePooling


class MultiTaskModel(nn.Module):
    """forward: Batch → outputs (B, O). A spine without branches on data: the train pipeline traces it."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.embeddings = embedding_tables(config) or NoTables()
        self.sequences = sequence_tables(config)
        self.pooling = SequencePooling(config).to(device)
        self.features = FeatureVector(config).to(device)
        self.head = Head(config, Layout.of(config)).to(device)

    def forward(self, batch: Batch) -> Tensor:
        pooled, rows = self.embeddings(batch.sparse), [tables(batch.sparse) for tables in self.sequences.values()]  # not waited for
        self.head.postpone()
        sequences = self.pooling(rows)
        return self.head(self.features(pooled, sequences, batch.sparse, batch.dense, batch.domain, batch.weights))


class NoTables(nn.Module):
    """In place of the tables of bags where no feature reads one."""

    def forward(self, ids: Any) -> KeyedTensor:
        return KeyedTensor(keys=[], length_per_key=[], values=torch.empty(0, 0))


class TrainModel(nn.Module):
    """forward: Batch → loss of this rank, StepNumbers"""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.model = MultiTaskModel(config, device)
        self.loss = JointLoss(config, self.model.head.cut, self.model.features.guard).to(device)

    def forward(self, batch: Batch) -> tuple[Tensor, StepNumbers]:
        return self.loss(self.model(batch), batch)


def initialise_dense(model: nn.Module, seed: int) -> None:
    """Draw dense weights anew by (seed, module name), on CPU: they depend on neither the order of building, the layout nor the device."""
    for name, module in model.named_modules():
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if hasattr(module, "reset_parameters") and device.type != "meta":  # where tables are, until they are sharded
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                module.to("cpu").reset_parameters()
                module.to(device)
