"""A small config of every head."""

from __future__ import annotations

from pathlib import Path

import tiny

from distmtl.config import Config
from distmtl.config_file import parse_config

NETWORK = {"kind": "mmoe", "num_experts": 2, "expert": [16, 8]}
HEADS = {
    "single_task": {"bottom": [16, 8]},
    "shared_bottom": {"bottom": [16, 8]},
    "omoe": {"num_experts": 3, "expert": [16, 8]},
    "mmoe": {"num_experts": 3, "expert": [16, 8]},
    "cgc": {"shared_experts": 2, "task_experts": 1, "expert": [16, 8]},
    "ple": {"num_levels": 2, "shared_experts": 1, "task_experts": 1, "expert": [8]},
    "esmm": {"network": NETWORK},
    "escm2": {"method": "dr", "network": NETWORK},
    "aitm": {"bottom": [16, 8]},
    "dbmtl": {"bottom": [16], "task": [8], "relation": [8]},
    "stem": {"shared_experts": 1, "task_experts": 1, "expert": [16, 8]},
    "home": {"groups": [["click", "conversion"], ["rating"]], "experts": 2, "expert": [8], "feature_rank": 4},
    "star": {"domain": "domain", "bottom": [16, 8], "auxiliary": [4]},
    "pepnet": {"domain_features": ["domain"], "gate_features": ["user", "item"], "tower": [16, 8], "gate_hidden": 8},
}


def config_for(kind: str, folder: Path, run: Path) -> Config:
    raw = tiny.raw(folder, run, model={"kind": kind, **HEADS[kind]})
    raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
    raw["tasks"][1] |= {"parents": ["click"]}
    raw["optimizer"] = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.1}}
    return parse_config(raw)
