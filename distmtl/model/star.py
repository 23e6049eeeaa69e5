"""STAR (Sheng et al. 2021, "One Model to Serve All: Star Topology Adaptive Recommender for Multi-Domain CTR Prediction")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmtl.model.experts import Experts
from distmtl.model.kernels import linear_relu
from distmtl.model.layout import Features, Layout
from distmtl.model.normalisation import PartitionedNorm
from distmtl.model.weighting import Cut


class StarLayer(nn.Module):
    """ReLU(x·(Wₚ ⊙ W)ᵀ + bₚ + b) for rows of domain p (eq. 6 and 7). Wₚ = 1 + own_weight and bₚ start at 1 and 0, and
    weight decay pulls them there: all domains share one network.

    forward: P tensors (rows of a domain, in) → P tensors (rows of a domain, out)
    """

    def __init__(self, width: int, out: int, domains: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(out, width)), nn.Parameter(torch.empty(out))
        self.own_weight, self.own_bias = nn.Parameter(torch.empty(domains, out, width)), nn.Parameter(torch.empty(domains, out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(6.0 / self.weight.shape[1])  # as Experts
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.own_weight)
        for bias in (self.bias, self.own_bias):
            nn.init.zeros_(bias)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return linear_relu(xs, (1 + self.own_weight) * self.weight, self.own_bias + self.bias)


class STAR(nn.Module):
    """Partitioned normalisation, a network whose every layer is a StarLayer, and beside it an auxiliary network of the domain.

    Their last layers stand side by side, so that a task whose tower is empty has the paper's logit, main plus auxiliary (eq. 8); all
    tasks share both. The auxiliary network sees the domain's embedding alone, the paper's the other features too; and the main one
    does not see it: constant in a domain, it has no variance to be divided by, and its part is that of the domain's own biases.

    forward: Features → T times the same (B, bottom[-1] + auxiliary[-1])
    """

    def __init__(
        self, layout: Layout, domain: str, num_tasks: int, bottom: Sequence[int], auxiliary: Sequence[int], momentum: float = 0.01
    ):
        super().__init__()
        self.num_tasks, self.domains, self.output_width = num_tasks, layout.domains, bottom[-1] + auxiliary[-1]
        first, last = layout.places[domain]
        self.parts = first, last - first, layout.width - last
        width = layout.width - self.parts[1]
        self.norm = PartitionedNorm(width, layout.domains, momentum)
        sizes = zip((width, *bottom), bottom, strict=False)
        self.bottom = nn.ModuleList(StarLayer(into, out, layout.domains) for into, out in sizes)
        self.auxiliary = Experts(1, self.parts[1], auxiliary)
        self.cut = Cut()

    def forward(self, features: Features) -> list[Tensor]:
        domain = features.domain
        assert domain is not None, "the batch has no domain"
        before, embedding, after = features.x.split(self.parts, dim=1)
        x = self.norm(torch.cat([before, after], dim=1), domain, features.real)
        main = self._in_every_domain(x, domain) if torch.compiler.is_exporting() else self._domain_by_domain(x, domain)
        (auxiliary,) = self.auxiliary(embedding)
        return self.cut([torch.cat([main, auxiliary], dim=1)]) * self.num_tasks

    def _domain_by_domain(self, x: Tensor, domain: Tensor) -> Tensor:
        """Rows sorted by domain, each domain's through its own network. Domains without rows are computed too: on every rank every
        parameter has a gradient, and collectives come in the same order."""
        order = domain.argsort(stable=True)
        xs: Sequence[Tensor] = x.index_select(0, order).split(torch.bincount(domain, minlength=self.domains).tolist())
        for layer in self.bottom:
            xs = layer(xs)
        return torch.cat(list(xs)).index_select(0, order.argsort())

    def _in_every_domain(self, x: Tensor, domain: Tensor) -> Tensor:
        """The same in P times the work, with sizes that depend on no data: what torch.export needs."""
        xs: Sequence[Tensor] = [x] * self.domains
        for layer in self.bottom:
            xs = layer(xs)
        every = torch.stack(list(xs), dim=1)
        return every.gather(1, domain[:, None, None].expand(-1, 1, every.shape[2])).squeeze(1)
