"""An impression → click → conversion → rating log whose best reachable metrics are known.

    write_log(Path("log"), World(), rows=600_000)     # log/{train,validation,test}/part-*.parquet and log/{mmoe,ple,shared_bottom}.yaml

Who sees what is drawn, everything else follows: attributes of users and items and their effects on the logits are hashed
from the ids, never stored, so that memory is flat up to 1e9 ids. Block b of a split is drawn from (seed, split, b): the
same rows whatever the files are, and a longer log begins with the shorter one.

Labels, with a, q the planted logits of the row's features x and e, e', h hidden standard normals, new in every impression:

    click      ~ σ(a(x) + NOISE·e  + confounding·h)
    conversion ~ σ(q(x) + NOISE·e' + confounding·h)    null (unknown) where not clicked
    rating     1 … 5 stars of x                        null where not converted, and for a tenth of the converted

`p_click`, `p_conversion` (of the clicked) and `p_conversion_all` (had everybody clicked) are the true probabilities given x,
the hidden integrated out; validation and test have them, train does not. They order the rows as well as x can: their AUC is
the best possible. `days_since_visit` is null in one row of twenty, `interests` may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmtl.data.output import SPLITS, new_folder, write_configs
from distmtl.data.planted import BLOCK, Columns, Planted, lists, scattered, sigmoid, solve, zipf
from distmtl.errors import DistmtlError

AGES, CITIES, CATEGORIES, BRANDS, DEVICES, POSITIONS, MAX_INTERESTS = 8, 100, 40, 400, 3, 10, 5
CLICK_RATE, CONVERSION_RATE = 0.10, 0.20  # of impressions, of clicks
NOISE = 0.5

# How much each part of the signal weighs in a task's logit, before the logit is scaled to SPREAD. Side features carry most of
# it: an id's own effect can only be learnt from its own impressions, and most ids have few.
PARTS = ("user", "item", "category", "side", "hour", "taste", "price", "position", "visit", "domain")
WEIGHTS = {
    "click":      dict(zip(PARTS, (0.12, 0.15, 0.5, 0.12, 0.8, 0.3, 0.5, 0.8, 0.6, 0.4))),
    "conversion": dict(zip(PARTS, (0.12, 0.15, 0.5, 0.12, 0.3, 0.3, 0.8, 0.0, 0.8, 0.4))),
    "rating":     dict(zip(PARTS, (0.20, 0.40, 0.4, 0.20, 0.0, 0.4, 0.3, 0.0, 0.0, 0.0))),
}  # fmt: skip
SPREAD = {"click": 1.3, "conversion": 1.2, "rating": 0.6}  # standard deviation over impressions


class Source(Protocol):
    """What a log is drawn from."""

    name: str
    about: str  # one line
    heads: dict[str, dict[str, Any]]  # head → what its config has besides `config()`

    def block(self, split: str, index: int) -> pa.Table: ...

    def config(self) -> dict[str, Any]: ...


def write_log(
    out: Path,
    world: Source,
    *,
    rows: int = 600_000,
    eval_share: float = 0.1,
    rows_per_file: int = 8 * BLOCK,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a log and its ready configs. Returns the number of rows written.

    Args:
        rows: of all three splits.
        eval_share: of the rows, for validation and for test each.
        rows_per_file: rounded up to whole blocks.
        progress: called with (rows written, rows).

    Raises:
        DistmtlError: an option out of range, or `out` is not empty.
    """
    held_out = round(rows * eval_share)
    sizes = {"train": rows - 2 * held_out, "validation": held_out, "test": held_out}
    if not 0 < eval_share < 0.5 or min(sizes.values()) < 1:
        raise DistmtlError(f"rows {rows} and eval_share {eval_share} leave a split empty; eval_share is between 0 and 0.5")
    if not 1 <= rows_per_file <= 10**9:
        raise DistmtlError(f"rows_per_file {rows_per_file} is not in 1 … 1,000,000,000")
    done = written = 0
    with new_folder(out) as folder:
        for split, size in sizes.items():
            (folder / split).mkdir()
            schema, step = world.block(split, 0).schema, -(-rows_per_file // BLOCK) * BLOCK
            for part, first in enumerate(range(0, size, step)):
                last = min(first + step, size)
                with pq.ParquetWriter(folder / split / f"part-{part:05d}.parquet", schema) as writer:
                    for start in range(first, last, BLOCK):
                        table = world.block(split, start // BLOCK)[: last - start]
                        writer.write_table(table)
                        written += len(table)
                        done += min(last - start, BLOCK)
                        if progress:
                            progress(done, rows)
        write_configs(folder, world.name, world.about, world.config(), world.heads)
    return written


class World(Planted):
    """Who there is, and what they click, buy and like.

    Args:
        users, items: size of the id spaces; both are drawn by Zipf's law.
        domains: above 1, a column `domain` shifts and bends the signal.
        confounding: strength of a hidden taste that makes both the click and the conversion likelier.
        kept_negatives: share of the impressions without a click that the train split keeps.
    """

    name = "synthetic"
    about = __doc__.split("\n", 1)[0]
    heads: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "mmoe": {"model": {"kind": "mmoe", "num_experts": 4, "expert": [128, 64]}},
        "ple": {"model": {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 1, "expert": [64]}},
        "shared_bottom": {"model": {"kind": "shared_bottom", "bottom": [128, 64]}},
    }

    def __init__(
        self,
        seed: int = 0,
        users: int = 20_000,
        items: int = 5_000,
        domains: int = 1,
        confounding: float = 0.0,
        kept_negatives: float = 1.0,
    ):
        super().__init__(seed)
        for name, value in {"users": users, "items": items, "domains": domains}.items():
            if not 1 <= value <= 10**9:
                raise DistmtlError(f"{name} {value} is not in 1 … 1,000,000,000")
        if not 0 <= confounding < math.inf:
            raise DistmtlError(f"confounding {confounding} is not a number of 0 or more")
        if not 0 < kept_negatives <= 1:
            raise DistmtlError(f"kept_negatives {kept_negatives} is not above 0 and at most 1")
        self.users, self.items, self.domains, self.confounding, self.kept_negatives = users, items, domains, confounding, kept_negatives
        self.scale: dict[str, float] = dict.fromkeys(WEIGHTS, 1.0)
        self.offset: dict[str, float] = dict.fromkeys(WEIGHTS, 0.0)
        x = self.impressions(np.random.default_rng((seed, len(SPLITS), 0)))
        for task in WEIGHTS:
            signal = self.logit(task, x)
            self.scale[task] = SPREAD[task] / max(float(signal.std()), 1e-9)
            self.offset[task] = -float(signal.mean()) * self.scale[task]
        click, conversion = self.logit("click", x), self.logit("conversion", x)
        self.offset["click"] += solve(lambda b: float(self.marginal(click + b).mean()) - CLICK_RATE)
        click = self.logit("click", x)
        p = self.marginal(click)
        self.offset["conversion"] += solve(
            lambda b: float((p * self.p_conversion(click, conversion + b)).sum() / p.sum()) - CONVERSION_RATE
        )

    def impressions(self, rng: np.random.Generator) -> Columns:
        """The features of BLOCK impressions; `interests` is (BLOCK, MAX_INTERESTS) with -1 where there is none."""
        user, item = scattered(rng.random(BLOCK), self.users, 0.8), scattered(rng.random(BLOCK), self.items, 1.0)
        category = zipf(self.uniform("category", item), CATEGORIES, 0.7)
        slots = np.arange(MAX_INTERESTS)
        interests = zipf(self.uniform("interest", user[:, None], slots[None]), CATEGORIES, 0.7)
        log_price = 3.0 + 0.7 * self.effect("price", item) + 0.5 * self.effect("price of", category)
        days = rng.exponential(7.0, BLOCK).astype(np.float32).round(1)
        days[rng.random(BLOCK) < 0.05] = np.nan
        return {
            "user_id": user,
            "item_id": item,
            "age": (AGES * self.uniform("age", user)).astype(np.int64),
            "city": zipf(self.uniform("city", user), CITIES, 0.8),
            "category": category,
            "brand": zipf(self.uniform("brand", item), BRANDS, 0.7),
            "interests": np.where(slots < (MAX_INTERESTS + 1) * self.uniform("interests", user)[:, None] // 1, interests, -1),
            "hour": rng.integers(24, size=BLOCK),
            "device": zipf(rng.random(BLOCK), DEVICES, 0.8),
            "position": zipf(rng.random(BLOCK), POSITIONS, 0.6),
            "domain": zipf(rng.random(BLOCK), self.domains, 0.5),
            "price": np.exp(log_price).astype(np.float32).round(2),
            "days_since_visit": days,
        }

    def logit(self, task: str, x: Columns) -> np.ndarray:
        """The planted signal: main effects, and interactions that no sum of main effects can mimic."""

        def effect(part: str, *columns: str) -> np.ndarray:
            return self.effect(f"{task} {part}", *(x[c] for c in columns))

        has = x["interests"] >= 0
        mean = lambda effects: (effects * has).sum(1) / np.maximum(has.sum(1), 1)  # over the user's interests  # noqa: E731
        keen, taste = mean(effect("keen", "interests")), np.zeros(len(has))
        for k in ("taste 0", "taste 1"):  # what a category stands for: among the interests, of the item, in every task
            taste += mean(self.effect(k, x["interests"])) * self.effect(k, x["category"])
        parts = {
            "user": effect("user", "user_id"),
            "item": effect("item", "item_id"),
            "category": effect("category", "category"),
            "side": effect("brand", "brand") + effect("city", "city") + effect("device", "device", "category"),
            "hour": np.sin(2 * math.pi * (x["hour"] / 24 + 0.2 * self.uniform("peak", x["age"]))),
            "taste": 1.5 * keen + np.tanh(taste),
            "price": -np.maximum((np.log(x["price"]) - 3.0) / 0.86 - 0.7 * self.effect("budget", x["age"]), -0.5),
            "position": -np.log1p(x["position"]),
            "visit": 2.0 * np.nan_to_num(np.exp(-x["days_since_visit"] / 5.0)),
            "domain": (effect("domain", "domain") + effect("domain and", "domain", "category")) * (self.domains > 1),
        }
        return self.offset[task] + self.scale[task] * sum(w * parts[name] for name, w in WEIGHTS[task].items())

    def block(self, split: str, index: int) -> pa.Table:
        """The rows index·BLOCK … of a split."""
        rng = np.random.default_rng((self.seed, SPLITS.index(split), index))
        x = self.impressions(rng)
        click, conversion, rating = (self.logit(task, x) for task in WEIGHTS)
        hidden = self.confounding * rng.standard_normal(BLOCK)
        clicked = rng.random(BLOCK) < sigmoid(click + NOISE * rng.standard_normal(BLOCK) + hidden)
        converted = (rng.random(BLOCK) < sigmoid(conversion + NOISE * rng.standard_normal(BLOCK) + hidden)) & clicked
        stars = np.clip(np.round(3.6 + rating + 0.7 * rng.standard_normal(BLOCK)), 1, 5).astype(np.float32)
        rated = converted & (rng.random(BLOCK) < 0.9)

        columns: dict[str, Any] = {name: values for name, values in x.items() if name != "domain" or self.domains > 1}
        columns["interests"] = lists(x["interests"])
        columns["days_since_visit"] = pa.array(x["days_since_visit"], from_pandas=True)  # NaN becomes null
        columns["click"] = clicked.astype(np.int8)
        columns["conversion"] = pa.array(converted.astype(np.int8), mask=~clicked)
        columns["rating"] = pa.array(stars, mask=~rated)
        if split == "train":
            kept = clicked | (rng.random(BLOCK) < self.kept_negatives)
            return pa.table(columns) if kept.all() else pa.table(columns).filter(pa.array(kept))
        columns["p_click"] = self.marginal(click)
        columns["p_conversion"] = self.p_conversion(click, conversion)
        columns["p_conversion_all"] = self.marginal(conversion)
        return pa.table(columns)

    def marginal(self, logit: np.ndarray) -> np.ndarray:
        """E σ(logit + NOISE·e + confounding·h)."""
        return _mean_sigmoid(logit, math.hypot(NOISE, self.confounding))

    def p_conversion(self, click: np.ndarray, conversion: np.ndarray) -> np.ndarray:
        """P(conversion | click, x): given h the two are independent, so E_h[P(click|h)·P(conversion|h)] / P(click)."""
        if not self.confounding:
            return _mean_sigmoid(conversion, NOISE)
        both, clicked = np.zeros_like(click), np.zeros_like(click)
        for h, weight in zip(*_normal(15)):
            p = weight * _mean_sigmoid(click + self.confounding * h, NOISE)
            clicked += p
            both += p * _mean_sigmoid(conversion + self.confounding * h, NOISE)
        return both / clicked

    def config(self) -> dict[str, Any]:
        sizes = {"age": AGES, "city": CITIES, "brand": BRANDS, "hour": 24, "device": DEVICES, "position": POSITIONS}
        if self.domains > 1:
            sizes["domain"] = self.domains
        return {
            "data": {"train": "train", "validation": "validation", "test": "test", "group": "user_id"},
            "features": [
                {"kind": "id", "name": "user_id", "rows": self.users, "dim": 16},
                {"kind": "id", "name": "item_id", "rows": self.items, "dim": 16},
                {"kind": "id", "name": "category", "rows": CATEGORIES, "dim": 16},
                {"kind": "id", "name": "interests", "table": "category", "rows": CATEGORIES, "dim": 16, "pooling": "mean"},
                *({"kind": "id", "name": name, "rows": rows, "dim": 8} for name, rows in sizes.items()),
                {"kind": "numeric", "name": "price", "log": True, "mean": 3.0, "std": 0.9},
                {"kind": "numeric", "name": "days_since_visit", "log": True, "mean": 1.8, "std": 0.8},
            ],
            "tasks": [
                {"kind": "binary", "name": "click", "true_probability": "p_click"}
                | ({"kept_negatives": self.kept_negatives} if self.kept_negatives < 1 else {}),
                {
                    "kind": "binary",
                    "name": "conversion",
                    "parents": ["click"],
                    "true_probability": "p_conversion",
                    "true_probability_entire": "p_conversion_all",
                },
            ],
            "optimizer": {
                "tables": {"kind": "rowwise_adagrad", "lr": 0.05},
                "dense": {"kind": "adamw", "lr": 0.005},
                "schedule": {"warmup_steps": 20, "decay": "cosine"},
            },
            "train": {"global_batch_size": 1024, "epochs": 1, "log_every": 50},  # a second epoch learns users by heart
        }


def _normal(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Hermite: values and weights that stand for a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x, w / w.sum()


def _mean_sigmoid(logit: np.ndarray, std: float) -> np.ndarray:
    """E σ(logit + std·z), to 1e-4 or better for std up to 2."""
    z, weights = _normal(7 if std < 1 else 15)
    return sigmoid(logit[:, None] + std * z) @ weights
