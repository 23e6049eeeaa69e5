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

    @property
    def divides_by_losses(self) -> bool:
        """Whether a loss of 0 or below makes no sense to it."""
        return False


class StaticWeighting(LossWeighting):
    """The tasks' own weights, constant: λ = 1."""

    kind: Literal["static"] = "static"


class PCGradWeighting(GradientWeighting):
    """Yu et al. 2020: a task's gradient loses what points against another's."""

    kind: Literal["pcgrad"]


class MGDAWeighting(GradientWeighting):
    """Sener and Koltun 2018: the shortest convex combination of the tasks' gradients."""

    kind: Literal["mgda"]
    normalisation: Literal["none", "l2", "loss", "loss+"] = Field(
        "none", description="What gradients are divided by before they are combined: nothing, their norm, their loss, or both."
    )

    @property
    def divides_by_losses(self) -> bool:
        return self.normalisation in ("loss", "loss+")


class IMTLGWeighting(GradientWeighting):
    """Liu et al. 2021: a combined gradient with the same projection onto every task's."""

    kind: Literal["imtl_g"]


class CAGradWeighting(GradientWeighting):
    """Liu et al. 2021: near the mean gradient, the one that helps the worst task most."""

    kind: Literal["cagrad"]
    c: float = Field(0.4, gt=0, description="How far from the mean gradient, relative to its norm; below 1 its optima stay the same.")
    rescale: bool = Field(True, description="Divide by 1 + c², as the authors' code does.")


class NashMTLWeighting(GradientWeighting):
    """Navon et al. 2022: the gradient that tasks would agree on in Nash's bargaining."""

    kind: Literal["nash"]


class AlignedMTLWeighting(GradientWeighting):
    """Senushkin et al. 2023: gradients made orthogonal and of one norm."""

    kind: Literal["aligned"]


class DualBalancingWeighting(GradientWeighting):
    """Lin et al. 2023 (DB-MTL): gradients of log-losses, all of the largest one's norm."""

    kind: Literal["db_mtl"]

    @property
    def divides_by_losses(self) -> bool:
        return True


WeightingConfig = Annotated[
    StaticWeighting
    | PCGradWeighting
    | MGDAWeighting
    | IMTLGWeighting
    | CAGradWeighting
    | NashMTLWeighting
    | AlignedMTLWeighting
    | DualBalancingWeighting,
    Field(discriminator="kind"),
]
