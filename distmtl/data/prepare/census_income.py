"""Census-Income (KDD): two tasks on one table of census records (the benchmark of the MMoE and PLE papers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.data.output import write_configs, write_split
from distmtl.data.prepare.raw import edges, find, numbers, read
from distmtl.errors import DistmtlError

COLUMNS = [
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat",
    "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason", "full_or_part_emp",
    "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat", "region_prev_res", "state_prev_res",
    "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg", "mig_move_reg", "mig_same",
    "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother", "country_self", "citizenship",
    "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year", "income_50k",
]  # fmt: skip
NUMERIC = ["age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked"]
ROWS = {"data": 199_523, "test": 99_762}
NOT_INPUTS = {"P1": ["education", "marital_stat"], "P2": ["marital_stat"]}
BUCKETS = 30


def write(source: Path, folder: Path, protocol: str = "P1") -> None:
    """Needs census-income.data and census-income.test, plain, .gz or .bz2, of the data set Census-Income (KDD).

    Args:
        protocol: inputs without education and marital status (P1: the MMoE and PLE papers) or without marital status only
            (P2: torch-rechub). In both the official test split is cut 1:1 by `np.random.default_rng(0).permutation` into
            validation and test.
    """
    if protocol not in NOT_INPUTS:
        raise DistmtlError(f"protocol {protocol!r} is not one of {', '.join(NOT_INPUTS)}")
    raw = {part: read(_find(source, part), COLUMNS, ",", ROWS[part]) for part in ROWS}
    inputs = [c for c in COLUMNS if c not in (*NOT_INPUTS[protocol], "instance_weight", "income_50k")]
    categories = {c: sorted(pc.unique(raw["data"][c]).to_pylist()) for c in inputs if c not in NUMERIC}

    train, held_out = (_columns(raw[part], inputs, categories) for part in ROWS)
    half = np.random.default_rng(0).permutation(held_out.num_rows)
    write_split(folder, "train", train)
    write_split(folder, "validation", held_out.take(half[: len(half) // 2]))
    write_split(folder, "test", held_out.take(half[len(half) // 2 :]))
    # Row i + 1 of a table is the i-th of these; row 0 is for what the train split lacks.
    (folder / "categories.json").write_text(json.dumps(categories, indent=1) + "\n")
    about = f"Census-Income (KDD), protocol {protocol}: inputs without {' and '.join(NOT_INPUTS[protocol])}."
    write_configs(folder, f"census-{protocol}", about, _config(train, inputs, categories), HEADS)


def _find(source: Path, part: str) -> Path:
    return find(source, [f"census-income.{part}{end}" for end in ("", ".gz", ".bz2")], "Census-Income (KDD)")


def _columns(raw: pa.Table, inputs: list[str], categories: dict[str, list[str]]) -> pa.Table:
    columns: dict[str, Any] = {}
    for name in inputs:
        if name in NUMERIC:
            columns[name] = numbers(raw[name], f"column {name}").astype(np.float32)
        else:
            found = pc.index_in(raw[name], value_set=pa.array(categories[name]))  # null where unseen in train
            columns[name] = pc.add(found.fill_null(-1), 1).cast(pa.int16())
    columns["income"] = pc.starts_with(raw["income_50k"], "50000+").cast(pa.int8())
    columns["never_married"] = pc.equal(raw["marital_stat"], "Never married").cast(pa.int8())
    return pa.table(columns)


def _config(train: pa.Table, inputs: list[str], categories: dict[str, list[str]]) -> dict[str, Any]:
    features: list[dict[str, Any]] = [
        {"kind": "id", "name": c, "rows": len(categories[c]) + 1, "dim": 8} for c in inputs if c in categories
    ]
    values: list[dict[str, Any]] = []
    for name in NUMERIC:
        x = train[name].to_numpy()
        log = np.log1p(x.astype(np.float64))
        features.append({"kind": "bucket", "name": name, "boundaries": edges(x, BUCKETS), "dim": 8})
        values.append(
            {
                "kind": "numeric",
                "name": f"log_{name}",
                "column": name,
                "log": True,
                "mean": _round(log.mean()),
                "std": _round(log.std()) or 1.0,
            }
        )
    return {
        "data": {"train": "train", "validation": "validation", "test": "test"},
        "features": features + values,
        "tasks": [{"kind": "binary", "name": "income"}, {"kind": "binary", "name": "never_married"}],
        "optimizer": {
            "tables": {"kind": "rowwise_adagrad", "lr": 0.02},
            "dense": {"kind": "adamw", "lr": 0.002},
            "schedule": {"warmup_steps": 100, "decay": "cosine"},
        },
        "train": {"global_batch_size": 2048, "epochs": 8, "monitor": "auc", "early_stopping": {"patience": 3}},
    }


def _round(x: float) -> float:
    return round(float(x), 4)


HEADS: dict[str, dict[str, Any]] = {
    "mmoe": {"model": {"kind": "mmoe", "num_experts": 8, "expert": [128, 64], "dropout": 0.3}},
    "ple": {"model": {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 2, "expert": [128], "dropout": 0.3}},
    "shared_bottom": {"model": {"kind": "shared_bottom", "bottom": [256, 128], "dropout": 0.3}},
}
