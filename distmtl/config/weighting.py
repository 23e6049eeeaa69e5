"""How the tasks' losses are balanced: λ of L = Σ λᵢ·Lᵢ, on top of the tasks' own weights (docs/weighting.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distmtl.config.base import Strict

Cut = Literal["auto", "network", "features"]


class LossWeighting(Strict):
    """λ from the losses alone."""

    reads_gradients: ClassVar[bool] = False


class GradientWeighting(Strict):
    """λ from the Gram matrix ⟨gᵢ, gⱼ⟩ of the tasks' gradients where what they share ends (model/weighting/cut.py)."""

    reads_gradients: ClassVar[bool] = True

    cut: Cut = Field(
        "auto",
        description="Where the tasks' gradients are compared. network: at the output of what the head shares (experts, bottom). "
        "features: at the embeddings, one backward pass through the head per task. auto: network where the head shares one.",
    )


class StaticWeighting(LossWeighting):
    """The tasks' own weights, constant: λ = 1."""

    kind: Literal["static"] = "static"


class PCGradWeighting(GradientWeighting):
    """Yu et al. 2020: a task's gradient loses what points against another's."""

    kind: Literal["pcgrad"]


WeightingConfig = Annotated[StaticWeighting | PCGradWeighting, Field(discriminator="kind")]
