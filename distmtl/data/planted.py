"""What all planted logs are drawn with: numbers hashed from ids, Zipf's law, and the offset of a wanted rate."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from distmtl.data.hashing import mix
from distmtl.data.output import ROW_GROUP_ROWS
from distmtl.errors import DistmtlError

BLOCK = ROW_GROUP_ROWS  # rows drawn at once
Columns = dict[str, np.ndarray]


class Planted:
    """Numbers that hang on nothing but a seed, a name and ids."""

    def __init__(self, seed: int):
        if seed < 0:
            raise DistmtlError(f"seed {seed} must not be negative")
        self.seed = seed

    def uniform(self, name: str, *ids: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each tuple of ids, always the same."""
        h = mix(np.array([(self.seed << 32 | zlib.crc32(name.encode())) % 2**64], dtype=np.uint64))
        for i in ids:
            h = mix(h ^ i.astype(np.uint64))
        return (h >> np.uint64(11)) * 2.0**-53

    def effect(self, name: str, *ids: np.ndarray) -> np.ndarray:
        """As `uniform`, with mean 0 and variance 1."""
        return (self.uniform(name, *ids) - 0.5) * math.sqrt(12)


def lists(ids: np.ndarray) -> pa.Array:
    """(n, width) ids, -1 where there is none, as a column of lists."""
    has = ids >= 0
    return pa.ListArray.from_arrays(np.r_[0, np.cumsum(has.sum(1))].astype(np.int32), ids[has])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def zipf(u: np.ndarray, n: int, exponent: float) -> np.ndarray:
    """Uniform numbers → ranks 0 … n-1 with density ∝ (1 + rank)^-exponent, without a table of n."""
    if exponent == 1:
        x = (1.0 + n) ** u
    else:
        x = (1 + u * ((1.0 + n) ** (1 - exponent) - 1)) ** (1 / (1 - exponent))
    return np.minimum(x.astype(np.int64) - 1, n - 1)


def scattered(u: np.ndarray, n: int, exponent: float) -> np.ndarray:
    """As `zipf`, the popular ones scattered over 0 … n-1: times a prime above n is a permutation."""
    return zipf(u, n, exponent) * 2_654_435_761 % n


def solve(f: Callable[[float], float], low: float = -8.0, high: float = 8.0) -> float:
    """Where the increasing f is 0."""
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return low
