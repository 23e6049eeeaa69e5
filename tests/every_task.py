"""A task of every kind, the metrics that each is promised, and data for all."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import tiny

RANKED = {"auc", "gauc", "pr_auc", "logloss", "ne", "calibration", "rows", "positives"}
VALUES = {"rmse", "mae", "calibration", "rows"}
TASKS = [  # and the metrics of each
    ({"kind": "binary", "name": "click", "true_probability": "p", "kept_negatives": 0.5}, RANKED | {"best_possible_auc"}),
    (
        {"kind": "binary", "name": "conversion", "parents": ["click"], "true_probability_entire": "p"},
        RANKED | {f"joint_{m}" for m in RANKED} | {f"entire_{m}" for m in ("auc", "best_possible_auc", "calibration", "rows")},
    ),
    ({"kind": "binary", "name": "focal", "label": "conversion", "focal": 2.0, "pos_weight": 2.0}, RANKED),
    ({"kind": "binary", "name": "fnw", "label": "conversion", "delay": {"kind": "fnw"}}, RANKED),
    ({"kind": "binary", "name": "dfm", "label": "conversion", "delay": {"kind": "dfm", "elapsed": "length"}}, RANKED),
    ({"kind": "regression", "name": "rating", "loss": "huber"}, VALUES),
    ({"kind": "ordinal", "name": "stars", "levels": 4, "parents": ["click"], "space": "observed"}, VALUES | {"accuracy"}),
    ({"kind": "multiclass", "name": "genre", "classes": 4}, {"accuracy", "logloss", "rows"}),
    ({"kind": "watch_time", "name": "watched"}, VALUES),
    (
        {
            "kind": "quantile",
            "name": "seen",
            "label": "watched",
            "quantiles": [[0, 0.2, 1, 4], [0, 1, 3, 9]],
            "duration": "length",
            "duration_edges": [2.0],
        },
        VALUES,
    ),
    ({"kind": "zero_inflated_lognormal", "name": "spent"}, VALUES | {f"positive_{m}" for m in RANKED}),
]


def table(rows: int, seed: int) -> pa.Table:
    r, plain = np.random.default_rng(seed + 100), tiny.table(rows, seed)
    item, some = plain["item"].to_numpy(), lambda: r.random(rows) < 0.1
    length = r.exponential(2, rows)
    more = {
        "length": pa.array(length),
        "stars": pa.array(item % 4, mask=some()),
        "genre": pa.array((item + (r.random(rows) < 0.3)) % 4, mask=some()),
        "watched": pa.array(length * r.random(rows) * (1 + np.sin(item)), mask=some()),
        "spent": pa.array(np.exp(r.normal(np.cos(item), 0.5)) * (r.random(rows) < 0.3), mask=some()),
    }
    for name, values in more.items():
        plain = plain.append_column(name, values)
    return plain
