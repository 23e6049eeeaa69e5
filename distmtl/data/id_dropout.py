"""Ids that training replaces by the row of unknown ones, so that it is trained before one comes.

Volkovs et al. 2017, "DropoutNet: Addressing Cold Start in Recommender Systems", of ids instead of whole preferences.
"""

from __future__ import annotations

import zlib

import numpy as np

from distmtl.config import Ids
from distmtl.data.hashing import mix


def kept_ids(ids: np.ndarray, lengths: np.ndarray | None, numbers: np.ndarray, feature: Ids, seed_and_epoch: tuple[int, int]) -> np.ndarray:
    """The ids, a share of them the oov row: drawn by (seed, epoch, row, feature, place in the row's list), whoever reads the row.

    ids (N,), lengths (n,) of the rows' lists (None: one each), numbers (n,) of the rows in the data set → (N,)
    """
    draws = numbers
    for key in (*seed_and_epoch, zlib.crc32(feature.name.encode())):
        draws = mix(draws) ^ np.uint64(key)
    if lengths is not None:
        starts = np.cumsum(lengths) - lengths
        draws = mix(np.repeat(draws, lengths)) ^ (np.arange(len(ids)) - np.repeat(starts, lengths)).astype(np.uint64)
    dropped = (mix(draws) < np.uint64(int(feature.id_dropout * 2.0**64))) & (ids < feature.rows)  # no extra row
    return np.where(dropped, feature.row_of("oov"), ids)
