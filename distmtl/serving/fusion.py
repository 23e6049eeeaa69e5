"""One score from several tasks' predictions, by which candidates are ordered: a formula that changes more often than the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from yaml import YAMLError

from distmtl.config import BinaryTask, Config, MulticlassTask, Strict, did_you_mean
from distmtl.config.base import Name
from distmtl.config_file import parse_yaml
from distmtl.errors import DistmtlError

Predictions = dict[str, np.ndarray]


class Term(Strict):
    """A task's part in the product: (α + p)^β."""

    alpha: float = Field(0.0, ge=0.0, description="Added to the prediction.")
    beta: float = Field(1.0, description="Power of the sum.")


class ProductFusion(Strict):
    """Π (αₜ + pₜ)^βₜ · price^γ over the tasks that are named; pₜ the served prediction, a regression's below 0 as 0."""

    kind: Literal["product"] = "product"
    tasks: dict[Name, Term] = Field(min_length=1, description="Task → its part in the product.")
    price: str | None = Field(None, description="Number that every candidate gives beside its features, > 0.")
    gamma: float = Field(1.0, description="Power of the price.")


class LinearFusion(Strict):
    """Σ wₜ·pₜ over the tasks that are named."""

    kind: Literal["linear"]
    tasks: dict[Name, float] = Field(min_length=1, description="Task → its weight in the sum.")


AnyFusion = ProductFusion | LinearFusion
Fusion = Annotated[AnyFusion, Field(discriminator="kind")]
FUSION: TypeAdapter[AnyFusion] = TypeAdapter(Fusion)


def parse_fusion(raw: Any) -> AnyFusion:
    """
    Raises:
        DistmtlError: it is no formula.
    """
    try:
        return FUSION.validate_python({"kind": "product"} | raw if isinstance(raw, dict) else raw, strict=True)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        raise DistmtlError(f"fusion{''.join(f'.{part}' for part in error['loc'])}: {error['msg']}") from None


def read_fusion(path: Path) -> AnyFusion:
    """What `--fusion FILE` holds: `fusion:` and the formula, YAML or JSON.

    Raises:
        DistmtlError: it does not.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as e:
        raise DistmtlError(f"{path} cannot be read: {e}") from None
    if not isinstance(raw, dict) or list(raw) != ["fusion"]:
        raise DistmtlError(f"{path} has not the one key fusion, with a formula under it")
    return parse_fusion(raw["fusion"])


def default_fusion(config: Config) -> ProductFusion:
    """The product of all binary tasks' probabilities, else of all that give one number."""
    binary = [t.name for t in config.tasks if isinstance(t, BinaryTask)]
    return ProductFusion(tasks={name: Term() for name in binary or scalar_tasks(config)})


def scalar_tasks(config: Config) -> list[str]:
    """Tasks that predict one number a row."""
    return [t.name for t in config.tasks if not isinstance(t, MulticlassTask)]


def check_fusion(fusion: AnyFusion, config: Config) -> None:
    """
    Raises:
        DistmtlError: it names a task that the model does not have, or one of several classes.
    """
    known = scalar_tasks(config)
    for name in fusion.tasks:
        if name not in known:
            raise DistmtlError(f"fusion: the model has no task {name!r} that predicts one number{did_you_mean(name, known)}")


def fuse(fusion: AnyFusion, predictions: Predictions, price: np.ndarray | None) -> np.ndarray:
    """(n,) float64 scores."""
    if isinstance(fusion, LinearFusion):
        return np.sum([w * predictions[t].astype(np.float64) for t, w in fusion.tasks.items()], axis=0)
    with np.errstate(divide="ignore"):  # 0 to a negative power is the largest score there is
        parts = [(t.alpha + predictions[name].astype(np.float64).clip(min=0)) ** t.beta for name, t in fusion.tasks.items()]
        if fusion.price and price is not None:
            parts.append(price**fusion.gamma)
        return np.prod(parts, axis=0)
