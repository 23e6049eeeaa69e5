"""The first config as a page of YAML, with the reason behind every line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from distmtl.data.init.guess import Guess

BATCHES = (64, 4096)  # the largest power of two between with STEPS steps an epoch
STEPS = 100
DIMS = "dim: 6·⁴√ids, 4 to 32; rows: a quarter more than ids, where they are hashed ten times as many, or twice and two hashes"
LARGE = 1_000_000  # rows, of which one epoch is enough to begin with


@dataclass
class Page:
    """Sections of a config; every `why` becomes the comment of its line."""

    name: str
    about: str
    data: list[tuple[str, str, str]]  # key, value, why
    features: list[Guess]
    tasks: list[tuple[dict[str, Any], str]]
    rows: int  # of train
    validated: bool

    @property
    def model(self) -> tuple[dict[str, Any], str]:
        if len(self.tasks) > 1:
            return {
                "kind": "mmoe",
                "num_experts": 4,
                "expert": [128, 64],
            }, "experts that the tasks share, a gate each (docs/models.md: others)"
        return {"kind": "shared_bottom", "bottom": [128, 64]}, "one task shares nothing; with more of them kind mmoe"

    @property
    def file_name(self) -> str:
        return f"{self.model[0]['kind']}.yaml"

    @property
    def train(self) -> tuple[dict[str, Any], str]:
        batch = BATCHES[1]
        while batch > BATCHES[0] and self.rows < STEPS * batch:
            batch //= 2
        out: dict[str, Any] = {"global_batch_size": batch, "epochs": 1 if self.rows >= LARGE else 5}
        why = f"about {max(self.rows // batch, 1):,} steps an epoch"
        if self.rows < LARGE and self.validated:
            out["early_stopping"] = {"patience": 1}
            why += "; ends when validation stops improving: ids overfit from the second epoch on"
        return out, why

    def text(self) -> str:
        out = [
            f"# {_line(self.about)}",
            "# A guess: every line says what it was made from. Change what you know better.",
            f"#   distmtl train {self.file_name}",
            "",
            _pair("name", self.name),
            "data:",
            *(f"  {_pair(key, value, why)}" for key, value, why in self.data),
            f"features:  # {DIMS}",
            *(f"  - {_flow(g.feature)}  # {_line(g.why)}" for g in self.features if g.feature),
            *(f"  # {_line(g.column)} is left out: {_line(g.why)}" for g in self.features if not g.feature),
            _pair("model", *self.model),
            "tasks:",
            *(f"  - {_flow(task)}  # {_line(why)}" for task, why in self.tasks),
            "optimizer:",
            f"  {_pair('tables', {'kind': 'rowwise_adagrad', 'lr': 0.02})}",
            f"  {_pair('dense', {'kind': 'adamw', 'lr': 0.002}, 'rates that did well on the public data sets')}",
            _pair("train", *self.train),
        ]
        return "\n".join(out) + "\n"


def _pair(key: str, value: Any, why: str = "") -> str:
    return _flow({key: value})[1:-1] + (f"  # {_line(why)}" if why else "")


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()


def _line(text: str) -> str:
    """Without what would end a comment."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
