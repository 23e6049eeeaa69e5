"""Rows for unknown and missing ids, id dropout, projected vectors and an interaction, all at once."""

from __future__ import annotations

import tiny

from distmtl.config import Config
from distmtl.config_file import parse_config

SGD = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}}
BOTH = {"out_of_range": "oov", "missing": "row"}
CROSS = {"kind": "cross", "layers": 2, "rank": 4}


def with_options(data, run, interaction=CROSS, optimizer=SGD, precision="fp32", **train) -> Config:
    raw = tiny.raw(data, run, interaction=interaction, optimizer=optimizer)
    user, item, tags, city, bucket, _, image = raw["features"]
    user.update(BOTH, rows=150, id_dropout=0.3)
    item.update(missing="row")
    tags.update(BOTH, rows=15, id_dropout=0.1)
    city.update(out_of_range="oov", id_dropout=0.2)
    bucket["dim"] = 8
    image["project"] = 2
    raw["tables"] = {"user": {"sharding": ["row_wise"]}, "tags": {"sharding": ["table_wise"]}}
    raw["train"] = {"global_batch_size": 128, "log_every": 1, "precision": precision, **train}
    return parse_config(raw)
