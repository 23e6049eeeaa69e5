"""Head: everything between feature vectors and outputs; and which one a config asks for."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmtl.config import (
    AITMConfig,
    CGCConfig,
    Config,
    DBMTLConfig,
    ESCM2Config,
    HoMEConfig,
    MMoEConfig,
    OMoEConfig,
    PEPNetConfig,
    PLEConfig,
    PluginHeadConfig,
    SharedBottomConfig,
    SingleTaskConfig,
    STARConfig,
    STEMConfig,
)
from distmtl.errors import DistmtlError
from distmtl.model.aitm import AITM
from distmtl.model.dbmtl import DBMTL
from distmtl.model.experts import Experts, Output, Tower
from distmtl.model.home import HoME
from distmtl.model.interaction import interaction
from distmtl.model.kinds import output_layer
from distmtl.model.layout import Features, Layout
from distmtl.model.mmoe import MMoE
from distmtl.model.omoe import OMoE
from distmtl.model.pepnet import PEPNet
from distmtl.model.ple import PLE
from distmtl.model.shared_bottom import SharedBottom
from distmtl.model.single_task import SingleTask
from distmtl.model.star import STAR
from distmtl.model.stem import STEM
from distmtl.model.weighting import Cut


class Head(nn.Module):
    """Feature crosses, sharing network and towers, without a table inside.

    forward: Features → outputs (B, O): every task's (kinds.places), then one imputed error per task of space entire under ESCM²-DR;
    float32 in either precision
    """

    def __init__(self, config: Config, layout: Layout):
        super().__init__()
        self.bf16 = config.train.precision == "bf16"
        self.interaction, layout = interaction(config, layout)
        self.sharing = sharing_network(config, layout)
        self.at_features = getattr(config.weighting, "cut", "auto") == "features" or not hasattr(self.sharing, "cut")
        self.cut: Cut = Cut(columns=sum(f.dim for f in config.embedded)) if self.at_features else self.sharing.cut
        if self.at_features and hasattr(self.sharing, "cut"):
            self.sharing.cut.compares = False
        self.mixture: Cut | None = getattr(self.sharing, "cut", None)  # that has the gates of the last training step, if there are any
        width, dropout = self.sharing.output_width, getattr(config.network, "dropout", 0.0)
        self.towers = nn.ModuleList(Tower(width, t.tower, output_layer(t, width_of(t, width)), dropout) for t in config.tasks)
        self.postponed = [m for m in self.sharing.modules() if isinstance(m, Experts) and m.weights[0].shape[2] == layout.width]
        self.imputed = imputed(config)
        self.imputation = nn.ModuleList(
            Tower(width, t.tower, Output(width_of(t, width)), dropout) for t in (config.tasks[i] for i in self.imputed)
        )

    def postpone(self) -> None:
        """To be called when a batch's lookups are under way to other ranks, before they are waited for: gradients of the weights that read
        feature vectors can then be found while those vectors' gradients are on their way back (kernels.Late)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for experts in self.postponed:
                experts.postpone()

    def forward(self, features: Features) -> Tensor:
        with torch.autocast(features.x.device.type, torch.bfloat16, enabled=self.bf16):
            if self.at_features:
                features = replace(features, vectors=tuple(self.cut(features.vectors)))
            if self.interaction:
                features = replace(features, vectors=(self.interaction(features.x),))
            shared = self.sharing(features)
            outputs = [tower(h) for tower, h in zip(self.towers, shared, strict=True)]
            outputs += [tower(shared[t]) for tower, t in zip(self.imputation, self.imputed, strict=True)]
        return self.cut.beside(outputs)


def width_of(task: Any, width: int) -> int:
    """Of what a tower's last layer reads."""
    return (width, *task.tower)[-1]


def imputed(config: Config) -> list[int]:
    """The tasks whose error a tower of its own imputes (ESCM²-DR)."""
    if not isinstance(config.model, ESCM2Config) or config.model.method != "dr":
        return []
    return [t for t, task in enumerate(config.tasks) if config.space(task) == "entire"]


def descent(config: Config) -> dict[int, list[int]]:
    """Places of every task's parents, parents before their children."""
    return {t: [config.place_of(p) for p in config.tasks[t].parents] for t in config.by_descent}


def sharing_network(config: Config, layout: Layout) -> Any:
    """The network that `model.kind` names. It has `output_width`, and maps Features to T tensors (B, output_width)."""
    model, width, tasks = config.network, layout.width, len(config.tasks)
    match model:
        case SingleTaskConfig():
            return SingleTask(width, tasks, model.bottom, model.dropout)
        case SharedBottomConfig():
            return SharedBottom(width, tasks, model.bottom, model.dropout)
        case OMoEConfig():
            return OMoE(width, tasks, model.num_experts, model.expert, model.dropout)
        case MMoEConfig():
            return MMoE(width, tasks, model.num_experts, model.expert, model.dropout)
        case CGCConfig():
            return PLE(width, tasks, 1, model.shared_experts, model.task_experts, model.expert, model.dropout)
        case PLEConfig():
            return PLE(width, tasks, model.num_levels, model.shared_experts, model.task_experts, model.expert, model.dropout)
        case AITMConfig():
            return AITM(width, descent(config), model.bottom, model.dropout)
        case DBMTLConfig():
            return DBMTL(width, descent(config), model.bottom, model.task, model.relation, model.detach_parents, model.dropout)
        case STEMConfig():
            return STEM(width, tasks, model.shared_experts, model.task_experts, model.expert, model.dropout)
        case HoMEConfig():
            groups = [[config.place_of(name) for name in group] for group in model.groups] or [list(range(tasks))]
            return HoME(width, groups, model.experts, model.expert, model.feature_rank, model.momentum)
        case STARConfig():
            return STAR(layout, model.domain, tasks, model.bottom, model.auxiliary, model.momentum)
        case PEPNetConfig():
            embedded, gated = sum(f.dim for f in config.embedded), (model.domain_features, model.gate_features)
            return PEPNet(layout, embedded, *gated, tasks, model.tower, model.gate_hidden, model.dropout)
        case PluginHeadConfig():
            return Plugin(model, width, tasks)


class Plugin(nn.Module):
    """A user's own network: (B, width) → T tensors (B, output_width).

    Raises:
        DistmtlError: it cannot be built, or keeps state that is no parameter.
    """

    def __init__(self, model: PluginHeadConfig, width: int, tasks: int):
        super().__init__()
        module, _, name = model.target.partition(":")
        try:
            self.network = getattr(importlib.import_module(module), name)(width=width, num_tasks=tasks, **model.args)
            self.output_width = self.network.output_width  # towers are built on it
            buffers = sorted(n for n, _ in self.network.named_buffers() if n in self.network.state_dict())
        except Exception as e:  # the user's own code: anything can happen, and a retry would not mend it
            raise DistmtlError(f"model.target {model.target!r} cannot be built with args {model.args}: {type(e).__name__}: {e}") from e
        if buffers:
            raise DistmtlError(
                f"model.target {model.target!r} keeps state outside its parameters ({', '.join(buffers[:3])}), which would differ "
                "between workers; use LayerNorm instead of BatchNorm, or persistent=False"
            )

    def forward(self, features: Features) -> list[Tensor]:
        return self.network(features.x)


def try_plugin(config: Config) -> None:
    """Build the user's own network, if there is one: better it fails here than on the workers.

    Raises:
        DistmtlError: as Plugin does.
    """
    if config.model.kind == "plugin":
        Head(config, Layout.of(config))
