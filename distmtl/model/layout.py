"""Features: what a head sees of a batch. Layout: where in its vectors each feature lies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from distmtl.config import Config


@dataclass(frozen=True)
class Features:
    """B rows as a head sees them."""

    vectors: tuple[Tensor, ...]  # (B, width): one; for STEM one per task, then the shared one
    domain: Tensor | None = None  # (B,) int64, where the head asked for it; 0 in padding
    real: Tensor | None = None  # (B,) bool: rows that count in some task; None: all of them

    @property
    def x(self) -> Tensor:
        """The feature vector, or the shared one."""
        return self.vectors[-1]


@dataclass(frozen=True)
class Layout:
    """Columns of a feature vector: embeddings, then dense features, both in config order.

    Args:
        places: feature → its first and last (excluded) column.
        domains: how many there are, where the head asked for them.
    """

    places: dict[str, tuple[int, int]]
    width: int
    domains: int = 0

    @classmethod
    def of(cls, config: Config) -> Layout:
        places, start = {}, 0
        for name, width in [*((f.name, f.dim) for f in config.embedded), *((f.name, f.columns) for f in config.dense)]:
            places[name], start = (start, start + width), start + width
        domains = next((f.table_rows for f in config.embedded if f.name == config.domain), 0)
        return cls(places, start, domains)

    def wider(self, width: int) -> Layout:
        """With further columns, of no feature, at the end."""
        return replace(self, width=width)

    def dim(self, feature: str) -> int:
        """How many columns a feature has."""
        first, last = self.places[feature]
        return last - first
