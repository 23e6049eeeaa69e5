"""The heads: what is shared between the tasks, and how (docs/models.md)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from distmtl.config.base import Name, Share, Strict, Unit, Widths

DROPOUT = "Share of the hidden units that a training step leaves out."
EXPERT = "Widths of an expert's layers."


class Head(Strict):
    shares: ClassVar[bool] = False  # whether it has a network of all tasks, whose output is a Cut (model/weighting/cut.py)


class Sharing(Head):
    shares = True


class SingleTaskConfig(Head):
    """One network per task over the same embeddings, no dense layer shared."""

    kind: Literal["single_task"]
    bottom: Widths = Field((256, 128), min_length=1, description="Widths of a task's network.")
    dropout: Unit = Field(0.0, description=DROPOUT)


class SharedBottomConfig(Sharing):
    """Caruana 1997: one network for all tasks."""

    kind: Literal["shared_bottom"]
    bottom: Widths = Field((256, 128), min_length=1, description="Widths of the network of all tasks.")
    dropout: Unit = Field(0.0, description=DROPOUT)


class OMoEConfig(Sharing):
    """MMoE with one gate for all tasks."""

    kind: Literal["omoe"]
    num_experts: PositiveInt = Field(4, description="Experts, all of them shared.")
    expert: Widths = Field((256, 128), min_length=1, description=EXPERT)
    dropout: Unit = Field(0.0, description=DROPOUT)


class MMoEConfig(Sharing):
    """Ma et al. 2018: shared experts, one softmax gate per task."""

    kind: Literal["mmoe"] = "mmoe"
    num_experts: PositiveInt = Field(4, description="Experts, all of them shared.")
    expert: Widths = Field((256, 128), min_length=1, description=EXPERT)
    dropout: Unit = Field(0.0, description=DROPOUT)


class PLEConfig(Sharing):
    """Tang et al. 2020: shared and task-specific experts, level by level. One level is CGC."""

    kind: Literal["ple"]
    num_levels: PositiveInt = Field(2, description="Levels of experts and gates, one above the other.")
    shared_experts: NonNegativeInt = Field(2, description="Experts of all tasks together, in every level.")
    task_experts: NonNegativeInt = Field(2, description="Experts of every task alone, in every level.")
    expert: Widths = Field((128,), min_length=1, description=EXPERT)
    dropout: Unit = Field(0.0, description=DROPOUT)

    @model_validator(mode="after")
    def _some_experts(self):
        if not self.shared_experts + self.task_experts:
            raise ValueError("a PLE needs experts: set shared_experts or task_experts above 0")
        if not self.shared_experts and self.num_levels > 1:
            raise ValueError("a PLE of several levels needs shared_experts above 0: its shared gate has nothing to pass on")
        return self


class CGCConfig(Sharing):
    """PLE with a single level."""

    kind: Literal["cgc"]
    shared_experts: NonNegativeInt = Field(2, description="Experts of all tasks together.")
    task_experts: NonNegativeInt = Field(2, description="Experts of every task alone.")
    expert: Widths = Field((256, 128), min_length=1, description=EXPERT)
    dropout: Unit = Field(0.0, description=DROPOUT)

    @model_validator(mode="after")
    def _some_experts(self):
        if not self.shared_experts + self.task_experts:
            raise ValueError("a CGC needs experts: set shared_experts or task_experts above 0")
        return self


class PluginHeadConfig(Head):
    """A head from the user's own package: called as Target(width, num_tasks, **args), a module (B, width) → T tensors (B, H)."""

    kind: Literal["plugin"]
    target: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="Where it is: package.module:Name.")
    args: dict[str, Any] = Field({}, description="Further arguments of the target.")


Network = Annotated[
    SingleTaskConfig | SharedBottomConfig | OMoEConfig | MMoEConfig | CGCConfig | PLEConfig | PluginHeadConfig, Field(discriminator="kind")
]


class ESMMConfig(Head):
    """Ma et al. 2018: tasks with parents are trained through P(parent)·P(task | parent) on all impressions."""

    kind: Literal["esmm"]
    network: Network = Field(SingleTaskConfig(kind="single_task"), description="What the tasks share below their towers.")


class ESCM2Config(Head):
    """Wang et al. 2022: ESMM, and a loss of the conditional task whose selection bias is weighted away."""

    kind: Literal["escm2"]
    network: Network = Field(SingleTaskConfig(kind="single_task"), description="What the tasks share below their towers.")
    method: Literal["ipw", "dr"] = Field("ipw", description="Inverse propensity weighting, or doubly robust with an imputation tower.")
    weight: NonNegativeFloat = Field(0.1, description="Weight of that loss, times the task's own weight.")
    max_weight: Annotated[float, Field(gt=1.0)] = Field(50.0, description="Cap of 1/propensity.")
    self_normalised: bool = Field(False, description="IPW: divide by the sum of the weights instead of the rows (SNIPS).")

    @model_validator(mode="after")
    def _normalised_weights(self):
        if self.self_normalised and self.method == "dr":
            raise ValueError("self_normalised is of method ipw alone; leave it out, or choose ipw")
        return self


class AITMConfig(Head):
    """Xi et al. 2021: a task attends to what its parents pass on. Its tasks with parents have space joint."""

    kind: Literal["aitm"]
    bottom: Widths = Field((256, 128), min_length=1, description="Widths of a task's network.")
    dropout: Unit = Field(0.0, description=DROPOUT)
    calibrator: NonNegativeFloat = Field(0.6, description="Weight of mean(max(P(task) - P(parent), 0)).")


class DBMTLConfig(Sharing):
    """Wang et al. 2019: a shared bottom, then a network per task that also reads its parents' representation."""

    kind: Literal["dbmtl"]
    bottom: Widths = Field((256,), min_length=1, description="Widths of the network of all tasks.")
    task: Widths = Field((128,), min_length=1, description="Widths of every task's network, over the bottom.")
    relation: Widths = Field(
        (64,), min_length=1, description="Widths of every task's network over its own and its parents' representation."
    )
    detach_parents: bool = Field(False, description="No gradient of a task into its parents' networks.")
    dropout: Unit = Field(0.0, description=DROPOUT)


class STEMConfig(Sharing):
    """Su et al. 2024: embeddings of each task's own beside shared ones; gates see all experts, only one's own get gradient."""

    kind: Literal["stem"]
    shared_experts: PositiveInt = Field(1, description="Experts that read the shared embeddings.")
    task_experts: PositiveInt = Field(1, description="Experts of every task, which read its own embeddings.")
    expert: Widths = Field((256, 128), min_length=1, description=EXPERT)
    dropout: Unit = Field(0.0, description=DROPOUT)


class HoMEConfig(Sharing):
    """Wang et al. 2024: groups of tasks, normalised experts, gates on features, gates of one's own."""

    kind: Literal["home"]
    groups: tuple[tuple[Name, ...], ...] = Field((), description="Tasks that resemble each other; default: all in one.")
    experts: PositiveInt = Field(2, description="Experts of all tasks together, of every group and of every task.")
    expert: Widths = Field((256, 128), min_length=1, description=EXPERT)
    feature_rank: PositiveInt = Field(16, description="Rank of the gates on features.")
    momentum: Share = Field(0.01, description="Share of a step in the running statistics of the experts' normalisation.")


class STARConfig(Sharing):
    """Sheng et al. 2021: every domain's weights are the shared ones times its own."""

    kind: Literal["star"]
    domain: Name = Field(description="Id feature whose value, 0 … rows-1, is a row's domain: one per row.")
    bottom: Widths = Field((256, 128), min_length=1, description="Widths of the network that a domain's weights multiply.")
    auxiliary: Widths = Field((32,), min_length=1, description="Widths of the network of the domain's embedding, beside the main one.")
    momentum: Share = Field(0.01, description="Share of a step in the running statistics of the partitioned normalisation.")


class PEPNetConfig(Head):
    """Chang et al. 2023: gates by domain on the embeddings, gates by user and item on every layer."""

    kind: Literal["pepnet"]
    domain_features: tuple[Name, ...] = Field(min_length=1, description="Features that say which domain; EPNet's gate reads them.")
    gate_features: tuple[Name, ...] = Field(min_length=1, description="User, item, author …; PPNet's gates read them.")
    tower: Widths = Field((256, 128), min_length=1, description="Widths of every task's network, gated layer by layer.")
    gate_hidden: PositiveInt = Field(64, description="Hidden width of every gate.")
    dropout: Unit = Field(0.0, description=DROPOUT)


HeadConfig = Annotated[
    SingleTaskConfig
    | SharedBottomConfig
    | OMoEConfig
    | MMoEConfig
    | CGCConfig
    | PLEConfig
    | ESMMConfig
    | ESCM2Config
    | AITMConfig
    | DBMTLConfig
    | STEMConfig
    | HoMEConfig
    | STARConfig
    | PEPNetConfig
    | PluginHeadConfig,
    Field(discriminator="kind"),
]


class CrossConfig(Strict):
    """DCNv2 (Wang et al. 2021): xₗ₊₁ = x₀ ⊙ (Wₗxₗ + bₗ) + xₗ."""

    kind: Literal["cross"]
    layers: PositiveInt = Field(2, description="Crosses, one after the other.")
    rank: PositiveInt | None = Field(None, description="W as a product of two matrices of this rank; default: a full one.")


class DotConfig(Strict):
    """DLRM (Naumov et al. 2019): dot products of all pairs of embeddings, beside the features themselves."""

    kind: Literal["dot"]

    @staticmethod
    def pairs(features: int) -> int:
        """Columns that it adds."""
        return features * (features - 1) // 2


InteractionConfig = Annotated[CrossConfig | DotConfig, Field(discriminator="kind")]
