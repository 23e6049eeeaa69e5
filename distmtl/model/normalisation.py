"""Normalisation with statistics of the global batch, one set of them per domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distmtl.batch import Batch
from distmtl.config import Config


class PartitionedNorm(nn.Module):
    """(γ·γₚ)(z - μₚ)/√(σₚ² + ε) + (β + βₚ) for rows of domain p (Sheng et al. 2021, STAR, eq. 4 and 5), in full precision.

    In training μ and σ² are those of the global batch's rows, padding excluded: W workers normalise as one does. In evaluation they
    are running ones, moved by max(`momentum`, the batch's share of all rows seen), so the first batches count equally; the variances
    averaged are unbiased, and a domain's stay as they are in a batch that has too few rows of it. γₚ is
    1 + own_weight. With one domain it is batch normalisation (Ioffe & Szegedy 2015): γₚ and βₚ are left out. Unlike the paper's, a
    batch mixes domains.

    Buffers, equal on all ranks: `seen` (P,) rows trained on; `mean`, `variance` (P, D).

    forward: (B, D), domain (B,) or None, real (B,) bool or None for all → (B, D) float32, nothing meant where not real
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
        for one in (self.weight, self.variance):
            nn.init.ones_(one)
        for zero in (self.bias, self.own_weight, self.own_bias, self.mean, self.seen):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, z: Tensor, domain: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z, member = z.to(self.weight.dtype), self._member(domain, real)
            weight, bias = self.weight[None], self.bias[None]
            if self.own_weight is not None:
                weight, bias = weight * (1 + self.own_weight), bias + self.own_bias
            if not self.training:
                return _affine(z - _look_up(self.mean, member), member, weight * torch.rsqrt(self.variance + self.eps), bias)
            out, rows, mean, variance = _Normalise.apply(z, member, weight, bias, self.eps)
            self._remember(rows, mean, variance)
            return out

    def _member(self, domain: Tensor | None, real: Tensor | None) -> Tensor | None:
        """(B, P): 1 where a row is of a domain, and counts; None: all rows are of one domain, and count."""
        dtype = self.weight.dtype
        if domain is None or self.domains == 1:
            return None if real is None else real[:, None].to(dtype)
        member = domain[:, None] == torch.arange(self.domains, device=domain.device)
        return (member if real is None else member & real[:, None]).to(dtype)

    @torch.no_grad()
    def _remember(self, rows: Tensor, mean: Tensor, variance: Tensor) -> None:
        sound = (mean.isfinite() & variance.isfinite()).all(1, keepdim=True)  # a step that is skipped must leave no NaN behind
        rows = torch.where(sound, rows, 0)
        self.seen += rows[:, 0].long()
        share = (rows / self.seen[:, None].clamp(min=1)).clamp(min=self.momentum)
        self.mean.copy_(torch.where(rows > 0, self.mean.lerp(mean, share), self.mean))
        unbiased = variance * rows / (rows - 1).clamp(min=1)
        self.variance.copy_(torch.where(rows > 1, self.variance.lerp(unbiased, share), self.variance))


def _look_up(of_domains: Tensor, member: Tensor | None) -> Tensor:
    """Every row's: (P, D), (B, P) → (B, D), or (1, D) of a single domain. By a matrix product: the gradient of an index has no fixed order
    of additions on CUDA."""
    return of_domains if member is None or len(of_domains) == 1 else member @ of_domains


def _affine(x: Tensor, member: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """x·scaleₚ + shiftₚ: (B, D), (B, P), (P, D), (P, D) → (B, D)"""
    return torch.addcmul(_look_up(shift, member), x, _look_up(scale, member))


def _sum(x: Tensor, member: Tensor | None) -> Tensor:
    """Sums of every domain's rows: (B, D), (B, P) → (P, D)"""
    return x.sum(0, keepdim=True) if member is None else member.T @ x


class _Normalise(torch.autograd.Function):
    """Normalised rows, and of every domain the rows (P, 1), mean and variance (P, D) over all ranks, 0 where it has none.

    Variances are of centred rows, after the means: E z² - (E z)² has no digit left where a mean is large. Every rank's loss depends on
    every rank's rows, so the gradient's sums go over the ranks too. Arguments: z (B, D), member (B, P), weight, bias (P, D), ε.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, member: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        rows = z.new_full((1, 1), len(z)) if member is None else member.sum(0)[:, None]
        rows, mean = _over_ranks(torch.cat([rows, _sum(z, member)], dim=1)).split([1, z.shape[1]], dim=1)
        mean = mean / rows.clamp(min=1)
        centred = z - _look_up(mean, member)
        variance = _over_ranks(_sum(centred.square(), member)) / rows.clamp(min=1)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(centred, member, weight, rows, inverse)
        ctx.mark_non_differentiable(rows, mean, variance)
        return _affine(centred, member, weight * inverse, bias), rows, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
        centred, member, weight, rows, inverse = ctx.saved_tensors
        of_bias, products = _sum(gradient, member), _sum(gradient * centred, member)
        mean, mean_product = _over_ranks(torch.stack([of_bias, products])) / rows.clamp(min=1)
        scale = weight * inverse
        through_statistics = _affine(centred, member, -scale * inverse.square() * mean_product, -scale * mean)
        if member is not None and len(weight) == 1:
            through_statistics *= member  # rows that count for nothing are in no statistics
        return through_statistics.addcmul_(gradient, _look_up(scale, member)), None, inverse * products, of_bias, None


def _over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def seen_domains(parameters: Mapping[str, Tensor]) -> list[int] | None:
    """Of a checkpoint's dense tensors, the domains that every normalisation has statistics of; None where no head asked for them."""
    seen = [values > 0 for name, values in parameters.items() if name.endswith(".seen") and values.numel() > 1]
    return torch.stack(seen).all(0).nonzero()[:, 0].tolist() if seen else None


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
