"""AITM (Xi et al. 2021, "Modeling the Sequential Dependence among Audience Multi-step Conversions with Multi-task Learning").

The shape of its layers is that of the authors' code, github.com/xidongbo/AITM. Its calibrator is a term of the loss (loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.model.experts import Experts
from distmtl.model.kernels import mix
from distmtl.model.layout import Features


class AITM(nn.Module):
    """A network per task; a task with parents attends to what they pass on and to its own.

    forward: Features → T tensors (B, H)

    Args:
        descent: places of every task's parents, parents before their children.
    """

    def __init__(self, width: int, descent: Mapping[int, Sequence[int]], bottom: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.descent, self.output_width = descent, bottom[-1]
        self.bottoms = Experts(len(descent), width, bottom, dropout)
        self.transfers = nn.ModuleDict({str(t): Transfer(bottom[-1], len(parents), dropout) for t, parents in descent.items() if parents})

    def forward(self, features: Features) -> list[Tensor]:
        z = self.bottoms(features.x)
        for t, parents in self.descent.items():
            if parents:
                z[t] = self.transfers[str(t)]([z[p] for p in parents], z[t])
        return z


class Transfer(nn.Module):
    """Σ a·h₃(c) over the candidates c: what each parent passes on, ReLU(Wz + b), and the task's own; a = softmax of ⟨h₁(c), h₂(c)⟩/√H
    over them. A task's h are its own.

    forward: P parents' (B, H), own (B, H) → (B, H)
    """

    def __init__(self, width: int, parents: int, dropout: float):
        super().__init__()
        self.scale = 1 / math.sqrt(width)
        self.passed = Experts(parents, width, (width,), dropout)
        self.attention = nn.Linear(width, 3 * width, bias=False)  # h₁, h₂, h₃

    def forward(self, parents: Sequence[Tensor], own: Tensor) -> Tensor:
        queries, keys, values = zip(*(self.attention(c).chunk(3, dim=1) for c in (*self.passed(parents), own)), strict=True)
        scores = torch.stack([(q * k).sum(1) * self.scale for q, k in zip(queries, keys, strict=True)])
        (out,) = mix(F.softmax(scores, dim=0, dtype=torch.float32)[None], values)
        return out
