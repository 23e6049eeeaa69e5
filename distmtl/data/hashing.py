"""How ids become rows of a table. Versioned: a change here orphans every trained table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

HASH_VERSION = 1


def mix(ids: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014) of int64 ids, as uint64."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_strings(strings: pa.Array) -> np.ndarray:
    """(N,) int64 SipHash of strings without nulls; each distinct string is hashed once."""
    encoded = pc.dictionary_encode(strings)
    codes = pd.util.hash_array(np.asarray(encoded.dictionary.to_pylist(), dtype=object), hash_key="distmtl-strings1", categorize=False)
    return codes.view(np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def into_rows(ids: np.ndarray, rows: int, hashes: int) -> np.ndarray:
    """(N, hashes) of 0 … rows-1: every id hashed as often, the first time as by into_table."""
    out = np.empty((len(ids), hashes), dtype=np.int64)
    for column in out.T:
        ids = mix(ids)
        column[:] = ids % np.uint64(rows)
    return out


def remainder_and_quotient(ids: np.ndarray, rows: int) -> np.ndarray:
    """(N, 2) of 0 … rows-1 (Shi et al. 2020, "Compositional Embeddings Using Complementary Partitions", section 3): with m = ⌈rows/2⌉ the
    remainder by m, and behind these m rows the quotient. Of ids from 0 to m·⌊rows/2⌋ - 1 no two have the same pair; larger ones wrap."""
    m = np.uint64(rows - rows // 2)
    quotient, remainder = np.divmod(ids.astype(np.uint64), m)
    return np.stack([remainder, m + quotient % np.uint64(rows // 2)], axis=1).astype(np.int64)


def into_table(ids: np.ndarray, rows: int) -> np.ndarray:
    """Hash int64 ids into 0 … rows-1."""
    return (mix(ids) % np.uint64(rows)).astype(np.int64)
