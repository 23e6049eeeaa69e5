"""A log of three tasks that want different things of the same features; how different is an option, and at 0 they want the same.

A feed that plays by itself: every impression has all three labels. With c, a, b planted signals of the row's features x, each of mean 0
and variance 1, and oₜ one of task t's own:

    sₜ = COMMON·c + TURNED·(cos θₜ·a + sin θₜ·b) + OWN·oₜ        θₜ = strength · 2πt/3 of click, like, watch

At strength 0 a is wanted by all three tasks, at 1 the turned parts of any two have a cosine of -1/2: what speaks for one speaks against
the others. Given x, the labels are drawn by normal numbers z with a correlation of TOGETHER between tasks: who is in the mood does more of
everything.

    click = [Φ(z₀) < p_click], like = [Φ(z₁) < p_like]      p = σ(offset + SPREAD·sₜ), of half and of three tenths of the rows
    watch = e_watch·exp(-NOISE·z₂ - NOISE²/2)               e_watch ∝ exp(WATCH·s₂), seconds, mean 30, heavy-tailed

So the errors of a row have the same sign where the tasks' wishes have not, and their gradients oppose each other in the network that they
share, all through training. In seconds, watch has gradients some hundred times as long as the others. `p_click`, `p_like` and `e_watch`
are the true probabilities and expectation given x; validation and test have them, and no model orders the rows better.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import ndtr

from distmtl.data.crowd import Crowd
from distmtl.data.output import SPLITS
from distmtl.data.planted import BLOCK, Columns, sigmoid, solve
from distmtl.errors import DistmtlError

COMMON, TURNED, OWN = 0.2, 1.0, 0.4
RATE = {"click": 0.5, "like": 0.3}
SPREAD, WATCH, NOISE, TOGETHER, SECONDS = 1.2, 0.4, 1.0, 0.95, 30.0
TASKS = ("click", "like", "watch")


class ConflictWorld(Crowd):
    """Args:
    strength: 0 … 1, how far the tasks' wishes are turned away from each other.
    """

    name = "conflict"
    about = __doc__.split("\n", 1)[0]

    def __init__(self, seed: int = 0, strength: float = 1.0):
        super().__init__(seed, users=5_000, items=1_000, segments=50, main=0.4, factors=4)
        if not 0 <= strength <= 1:
            raise DistmtlError(f"conflict {strength} is not in 0 … 1")
        self.strength = strength
        self.offset = dict.fromkeys(TASKS, 0.0)
        x = self.impressions(np.random.default_rng((seed, len(SPLITS), 0)))
        click, like, watch = (self.logit(task, x) for task in TASKS)
        self.offset["click"] = solve(lambda o: float(sigmoid(click + o).mean()) - RATE["click"])
        self.offset["like"] = solve(lambda o: float(sigmoid(like + o).mean()) - RATE["like"])
        self.offset["watch"] = math.log(SECONDS / np.exp(watch).mean())

    def logit(self, task: str, x: Columns) -> np.ndarray:
        """Of the probability; of watch, the logarithm of the expected seconds."""
        angle = self.strength * 2 * math.pi * TASKS.index(task) / len(TASKS)
        turned = math.cos(angle) * self.planted("a", x) + math.sin(angle) * self.planted("b", x)
        wanted = COMMON * self.planted("common", x) + TURNED * turned + OWN * self.planted(task, x)
        return self.offset[task] + (WATCH if task == "watch" else SPREAD) * wanted

    def block(self, split: str, index: int) -> pa.Table:
        """The rows index·BLOCK … of a split."""
        rng = np.random.default_rng((self.seed, SPLITS.index(split), index))
        x = self.impressions(rng)
        p_click, p_like = (sigmoid(self.logit(task, x)) for task in RATE)
        e_watch = np.exp(self.logit("watch", x))
        mood, own = rng.standard_normal(BLOCK), rng.standard_normal((len(TASKS), BLOCK))
        z = math.sqrt(TOGETHER) * mood + math.sqrt(1 - TOGETHER) * own
        columns: dict[str, Any] = dict(x)
        columns["click"], columns["like"] = ((ndtr(z[i]) < p).astype(np.int8) for i, p in enumerate((p_click, p_like)))
        columns["watch"] = (e_watch * np.exp(-NOISE * z[2] - NOISE**2 / 2)).astype(np.float32)
        if split != "train":
            columns |= {"p_click": p_click, "p_like": p_like, "e_watch": e_watch}
        return pa.table(columns)

    def config(self) -> dict[str, Any]:
        return {
            "data": {"train": "train", "validation": "validation", "test": "test"},
            "features": self.features(),
            "tasks": [
                *({"kind": "binary", "name": name, "tower": [16], "true_probability": f"p_{name}"} for name in RATE),
                {"kind": "regression", "name": "watch", "tower": [16], "bias": SECONDS},
            ],
            "optimizer": {
                "tables": {"kind": "rowwise_adagrad", "lr": 0.15},
                "dense": {"kind": "adamw", "lr": 0.015},
                "schedule": {"warmup_steps": 20, "decay": "cosine"},
            },
            "train": {"global_batch_size": 1024, "epochs": 1, "log_every": 25},
        }
