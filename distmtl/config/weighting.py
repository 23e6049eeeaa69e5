"""How the tasks' losses are balanced: λ of L = Σ λᵢ·Lᵢ, on top of the tasks' own weights (docs/weighting.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distmtl.config.base import Share, Strict, Unit

Cut = Literal["auto", "network", "features"]


class Weighting(Strict):
    reads_gradients: ClassVar[bool] = False
    of_positive_losses: ClassVar[bool] = False  # whether it takes logarithms or ratios of the losses


class LossWeighting(Weighting):
    """λ from the losses alone."""


class GradientWeighting(Weighting):
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


class UncertaintyWeighting(LossWeighting):
    """Kendall et al. 2018: every task has a noise that is learnt, and counts the less the larger it is."""

    of_positive_losses = True

    kind: Literal["uncertainty"]
    form: Literal["kendall", "liebel_koerner"] = Field(
        "kendall", description="The noise's own loss: ½·ln σ², or Liebel and Körner's ln(1 + σ²), never below 0."
    )
    lr: PositiveFloat = Field(0.01, description="Learning rate of Adam, for ln σ².")


class DWAWeighting(LossWeighting):
    """Liu et al. 2019, dynamic weight average: a task counts the more the slower its loss falls."""

    of_positive_losses = True

    kind: Literal["dwa"]
    window: PositiveInt = Field(100, description="Steps whose mean losses are compared, in place of the paper's epochs.")
    temperature: PositiveFloat = Field(2.0, description="The larger, the more equal.")


class RLWWeighting(LossWeighting):
    """Lin et al. 2022, random loss weighting: a fresh softmax of normal numbers in every step."""

    kind: Literal["rlw"]


class IMTLLWeighting(LossWeighting):
    """Liu et al. 2021, IMTL-L: a factor per task is learnt that makes all losses alike."""

    of_positive_losses = True

    kind: Literal["imtl_l"]
    lr: PositiveFloat = Field(0.01, description="Learning rate of Adam, for the logarithm of the factor.")


class FAMOWeighting(LossWeighting):
    """Liu et al. 2023, FAMO: all tasks' losses are to fall by the same share; here by a running mean of losses, over batches."""

    of_positive_losses = True

    kind: Literal["famo"]
    lr: PositiveFloat = Field(0.025, description="Learning rate of Adam, for the tasks' logits.")
    weight_decay: NonNegativeFloat = Field(1e-3, description="Pulls the logits to 0.")
    smoothing: Unit = Field(0.5, description="Share of the past in the running mean of ln L that a new loss is compared with.")


class BanditWeighting(LossWeighting):
    """A bandit whose arms are λ: all equal, or one task raised; its reward is how much the validation loss fell."""

    kind: Literal["bandit"]
    boost: float = Field(2.0, gt=1.0, description="What a raised task counts against the others.")
    discount: Share = Field(0.9, description="What a reward is worth one evaluation later.")
    exploration: NonNegativeFloat = Field(0.5, description="How much an arm's uncertainty counts against its mean reward of -1 to 1.")


class GradNormWeighting(GradientWeighting):
    """Chen et al. 2018: gradients of like norm, larger ones for tasks that lag behind."""

    of_positive_losses = True

    kind: Literal["gradnorm"]
    alpha: NonNegativeFloat = Field(1.5, description="How much more a task that lags behind is pulled; 0: equal norms.")
    lr: PositiveFloat = Field(0.025, description="Learning rate of Adam, for λ.")


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
    def of_positive_losses(self) -> bool:  # type: ignore[override]
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

    of_positive_losses = True

    kind: Literal["db_mtl"]


WeightingConfig = Annotated[
    StaticWeighting
    | UncertaintyWeighting
    | DWAWeighting
    | RLWWeighting
    | IMTLLWeighting
    | FAMOWeighting
    | BanditWeighting
    | GradNormWeighting
    | PCGradWeighting
    | MGDAWeighting
    | IMTLGWeighting
    | CAGradWeighting
    | NashMTLWeighting
    | AlignedMTLWeighting
    | DualBalancingWeighting,
    Field(discriminator="kind"),
]
