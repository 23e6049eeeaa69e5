"""Normalisation with statistics of the global batch, one set of them per domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmtl.batch import Batch
from distmtl.config import Config


class PartitionedNorm(nn.Module):
    """(γ·γₚ)(z - μₚ)/√(σₚ² + ε) + (β + βₚ) for rows of domain p (Sheng et al. 2021, STAR, eq. 4 and 5), in full precision.

    In training μ and σ² are those of the global batch's rows, padding excluded: W workers normalise as one does. In evaluation they
    are running ones, moved by max(`momentum`, the batch's share of all rows seen), so the first batches count equally; the variances
    averaged are unbiased, and a domain's stay as they are in a batch that has too few rows of it. With one domain it is batch
    normalisation (Ioffe & Szegedy 2015): γₚ and βₚ are left out. Unlike the paper's, a batch mixes domains.

    Buffers, equal on all ranks: `seen` (P,) rows trained on; `mean`, `variance` (P, D).

    forward: (B, D), domain (B,) or None, real (B,) bool or None for all → (B, D) float32; 0 in padding
    """

    def __init__(self, width: int, domains: int = 1, momentum: float = 0.01, eps: float = 1e-5):
        super().__init__()
        self.domains, self.momentum, self.eps = domains, momentum, eps
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        own = domains if domains > 1 else 0
        self.own_weight, self.own_bias = (nn.Parameter(torch.empty(own, width)) if own else None for _ in range(2))
        for name, buffer in {
            "seen": torch.empty(domains, dtype=torch.int64),
            "mean": torch.empty(domains, width),
            "variance": torch.empty(domains, width),
        }.items():
            self.register_buffer(name, buffer)
        self.seen: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for one in (self.weight, self.own_weight, self.variance):
            if one is not None:
                nn.init.ones_(one)
        for zero in (self.bias, self.own_bias, self.mean, self.seen):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, z: Tensor, domain: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.weight.dtype)
            member = self._member(z, domain, real)
            rows, mean = self._means(z, member) if self.training else (None, self.mean)
            # looked up by a matrix product: the gradient of an index has no fixed order of additions on CUDA
            centred = z - member @ mean
            variance = self.variance if rows is None else self._variances(centred, member, rows, mean)
            weight, bias = self.weight, self.bias
            if self.own_weight is not None:
                weight, bias = weight * self.own_weight, bias + self.own_bias
            scale = weight * torch.rsqrt(variance + self.eps)
            return centred * (member @ scale) + member @ bias.expand_as(mean)

    def _member(self, z: Tensor, domain: Tensor | None, real: Tensor | None) -> Tensor:
        """(B, P): 1 where a row is of a domain, and no padding."""
        domain = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device) if domain is None else domain
        member = domain[:, None] == torch.arange(self.domains, device=z.device)
        return (member if real is None else member & real[:, None]).to(z.dtype)

    def _means(self, z: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (P, 1) of this step on all ranks, and their mean (P, D); 0 where a domain has none."""
        rows, total = global_sum(torch.cat([member.sum(0)[:, None], member.T @ z], dim=1)).split([1, z.shape[1]], dim=1)
        return rows, total / rows.clamp(min=1)

    def _variances(self, centred: Tensor, member: Tensor, rows: Tensor, mean: Tensor) -> Tensor:
        """Theirs (P, D), after the means and not along with them: E z² - (E z)² has no digit left where a mean is large."""
        variance = global_sum(member.T @ centred.square()) / rows.clamp(min=1)
        self._remember(rows.detach(), mean.detach(), variance.detach())
        return variance

    @torch.no_grad()
    def _remember(self, rows: Tensor, mean: Tensor, variance: Tensor) -> None:
        sound = (mean.isfinite() & variance.isfinite()).all(1, keepdim=True)  # a step that is skipped must leave no NaN behind
        rows = torch.where(sound, rows, 0)
        self.seen += rows[:, 0].long()
        share = (rows / self.seen[:, None].clamp(min=1)).clamp(min=self.momentum)
        self.mean.copy_(torch.where(rows > 0, self.mean.lerp(mean, share), self.mean))
        unbiased = variance * rows / (rows - 1).clamp(min=1)
        self.variance.copy_(torch.where(rows > 1, self.variance.lerp(unbiased, share), self.variance))


def global_sum(x: Tensor) -> Tensor:
    """Sum over all ranks, and so of its gradient: every rank's loss depends on it."""
    return _GlobalSum.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _GlobalSum.forward(ctx, gradient)


def unseen_domain(model: nn.Module, batch: Batch, config: Config, locate: Callable[[int], str]) -> str | None:
    """What is wrong with a row whose domain has no statistics because no row of it was trained on."""
    if batch.domain is None:
        return None
    for norm in (m for m in model.modules() if isinstance(m, PartitionedNorm) and m.domains > 1):
        unseen = (norm.seen[batch.domain] == 0) & (batch.rows >= 0)
        if bool(unseen.any()):
            domain, row = int(batch.domain[unseen][0]), int(batch.rows[unseen][0])
            return (
                f"domain {domain} of {locate(row)} was never seen in training; train on rows whose {config.domain} is {domain}, "
                "or leave such rows out"
            )
    return None
