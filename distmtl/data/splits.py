"""The data sets of a config: train, validation, test."""

from __future__ import annotations

from distmtl.config import Config
from distmtl.data.check import check_dataset
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.data.output import SPLITS
from distmtl.errors import DistmtlError


def open_splits(config: Config, checked: bool = False) -> dict[str, Dataset]:
    """Open every data set that the config names, and check it unless it was `checked` before.

    Raises:
        DistmtlError: the mistakes of all of them.
    """
    splits, mistakes = {}, []
    for split in SPLITS:
        if path := getattr(config.data, split):
            try:
                splits[split] = open_dataset(path)
                if not checked:
                    check_dataset(splits[split], config, split)
            except DistmtlError as e:
                mistakes.append(str(e))
    if mistakes:
        raise DistmtlError("\n".join(mistakes))
    return splits
