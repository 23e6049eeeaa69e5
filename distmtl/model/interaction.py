"""Feature crosses, between the feature vector and the head."""

from __future__ import annotations

from torch import Tensor, nn

from distmtl.config import Config, CrossConfig, DotConfig
from distmtl.model.kernels import with_dots
from distmtl.model.layout import Layout


class Cross(nn.Module):
    """DCN-V2's cross network (Wang et al. 2021, "DCN V2", eq. 1 and 2), stacked: the head reads x_L.

    xₗ₊₁ = x₀ ⊙ (Wₗxₗ + bₗ) + xₗ, with a rank Wₗ = UₗVₗᵀ.

    forward: (B, width) → (B, width)
    """

    def __init__(self, width: int, layers: int, rank: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, width) if rank is None else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = x.addcmul(first, layer(x).to(x.dtype))
        return x


class Dot(nn.Module):
    """DLRM's interaction (Naumov et al. 2019): dot products of all pairs of embeddings, after the features themselves.

    forward: (B, width), its first features·dim columns the embeddings → (B, width + features·(features-1)/2)
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features, self.dim = features, dim

    def forward(self, x: Tensor) -> Tensor:
        return with_dots(x, self.features, self.dim)


def interaction(config: Config, layout: Layout) -> tuple[nn.Module | None, Layout]:
    """What `interaction.kind` names, x → x, and where the features lie after it."""
    match config.interaction:
        case None:
            return None, layout
        case CrossConfig(layers=layers, rank=rank):
            return Cross(layout.width, layers, rank), layout
        case DotConfig():
            features = len(config.embedded)
            return Dot(features, config.embedded[0].dim), layout.wider(layout.width + DotConfig.pairs(features))
