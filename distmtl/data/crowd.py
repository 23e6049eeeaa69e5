"""Crowd: users, items, segments that like topics, and signals planted in them; the feeds of conflict.py and drift.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distmtl.data.planted import BLOCK, Columns, Planted, scattered

HOURS = 24


class Crowd(Planted):
    """Args:
    segments: of users; there are as many topics of items.
    main: share of a signal's variance that effects of user, item and hour have.
    factors: products of a segment's and a topic's effect, which have the rest.
    """

    heads: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "mmoe": {"model": {"kind": "mmoe", "num_experts": 4, "expert": [32, 16]}},
        "shared_bottom": {"model": {"kind": "shared_bottom", "bottom": [64, 16]}},
    }

    def __init__(self, seed: int, *, users: int, items: int, segments: int, main: float, factors: int):
        super().__init__(seed)
        self.users, self.items, self.segments, self.main, self.factors = users, items, segments, main, factors

    def impressions(self, rng: np.random.Generator) -> Columns:
        """The features of BLOCK impressions."""
        user, item = scattered(rng.random(BLOCK), self.users, 0.8), scattered(rng.random(BLOCK), self.items, 0.8)
        return {
            "user_id": user,
            "item_id": item,
            "segment": (self.segments * self.uniform("segment", user)).astype(np.int64),
            "topic": (self.segments * self.uniform("topic", item)).astype(np.int64),
            "hour": rng.integers(HOURS, size=BLOCK),
        }

    def planted(self, name: str, x: Columns) -> np.ndarray:
        """Mean 0, variance 1: effects of user, item and hour, and which segments like which topics."""
        main = sum(self.effect(f"{name} {c}", x[c]) for c in ("user_id", "item_id", "hour"))
        match = sum(self.effect(f"{name} {k}", x["segment"]) * self.effect(f"{name} {k}", x["topic"]) for k in range(self.factors))
        return math.sqrt(self.main / 3) * main + math.sqrt((1 - self.main) / self.factors) * match

    def features(self) -> list[dict[str, Any]]:
        sizes = {"user_id": self.users, "item_id": self.items, "segment": self.segments, "topic": self.segments, "hour": HOURS}
        return [{"kind": "id", "name": name, "rows": rows, "dim": 8} for name, rows in sizes.items()]
