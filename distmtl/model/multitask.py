"""MultiTaskModel: batch → logits. TrainModel: with the joint loss, as the train pipeline wants it."""

from __future__ import annotations

import importlib
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedTensor

from distmtl.batch import Batch
from distmtl.config import CGCConfig, Config, MMoEConfig, PLEConfig, PluginHeadConfig, RegressionTask, SharedBottomConfig
from distmtl.errors import DistmtlError
from distmtl.model.embeddings import FeatureVector, embedding_tables
from distmtl.model.experts import Tower
from distmtl.model.loss import JointLoss, StepNumbers
from distmtl.model.mmoe import MMoE
from distmtl.model.ple import PLE
from distmtl.model.shared_bottom import SharedBottom


class Head(nn.Module):
    """Sharing network and towers: everything between feature vector and logits, without a table inside.

    forward: (B, width) → logits (B, T), float32 in either precision
    """

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.bf16 = config.train.precision == "bf16"
        self.sharing = sharing_network(config, width)
        dropout = getattr(config.model, "dropout", 0.0)
        self.towers = nn.ModuleList(
            Tower(self.sharing.output_width, t.tower, dropout, t.bias if isinstance(t, RegressionTask) else 0.0) for t in config.tasks
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return torch.stack([tower(h) for tower, h in zip(self.towers, self.sharing(x), strict=True)], dim=1)


def sharing_network(config: Config, width: int) -> Any:
    """The head that `model.kind` names. It has `output_width`, and maps (B, width) to T tensors (B, output_width)."""
    model, tasks = config.model, len(config.tasks)
    match model:
        case SharedBottomConfig():
            return SharedBottom(width, tasks, model.bottom, model.dropout)
        case MMoEConfig():
            return MMoE(width, tasks, model.num_experts, model.expert, model.dropout)
        case CGCConfig():
            return PLE(width, tasks, 1, model.shared_experts, model.task_experts, model.expert, model.dropout)
        case PLEConfig():
            return PLE(width, tasks, model.num_levels, model.shared_experts, model.task_experts, model.expert, model.dropout)
        case PluginHeadConfig():
            return _plugin(model, width, tasks)


def _plugin(model: PluginHeadConfig, width: int, tasks: int) -> Any:
    module, _, name = model.target.partition(":")
    try:
        network = getattr(importlib.import_module(module), name)(width=width, num_tasks=tasks, **model.args)
        network.output_width  # noqa: B018  # towers are built on it
        buffers = sorted(n for n, _ in network.named_buffers() if n in network.state_dict())
    except Exception as e:  # the user's own code: anything can happen, and a retry would not mend it
        raise DistmtlError(f"model.target {model.target!r} cannot be built with args {model.args}: {type(e).__name__}: {e}") from e
    if buffers:
        raise DistmtlError(
            f"model.target {model.target!r} keeps state outside its parameters ({', '.join(buffers[:3])}), which would differ "
            "between workers; use LayerNorm instead of BatchNorm, or persistent=False"
        )
    return network


class MultiTaskModel(nn.Module):
    """forward: Batch → logits (B, T). A spine without branches on data: the train pipeline traces it."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.embeddings = embedding_tables(config) or NoTables()
        self.features = FeatureVector(config)
        self.head = Head(config, self.features.width).to(device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embeddings(batch.sparse)
        return self.head(self.features(pooled, batch.sparse, batch.dense))


class NoTables(nn.Module):
    """In place of the tables where no feature reads one."""

    def forward(self, ids: Any) -> KeyedTensor:
        return KeyedTensor(keys=[], length_per_key=[], values=torch.empty(0, 0))


class TrainModel(nn.Module):
    """forward: Batch → loss of this rank, StepNumbers"""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.model = MultiTaskModel(config, device)
        self.loss = JointLoss(config.tasks).to(device)

    def forward(self, batch: Batch) -> tuple[Tensor, StepNumbers]:
        return self.loss(self.model(batch), batch)


def initialise_dense(model: nn.Module, seed: int) -> None:
    """Draw dense weights anew by (seed, module name): they depend on neither the order of building nor the layout."""
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters") and not isinstance(module, EmbeddingBagCollection):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                module.reset_parameters()
