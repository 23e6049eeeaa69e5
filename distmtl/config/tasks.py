"""The tasks: what is predicted, on which rows, with which loss (docs/models.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distmtl.config.base import Name, Share, Strict

Space = Literal["labelled", "observed", "entire", "joint"]


RANKING = ("auc", "gauc", "pr_auc", "logloss", "ne")
VALUES = ("rmse", "mae")


class Task(Strict):
    metrics: ClassVar[tuple[str, ...]] = VALUES  # that train.monitor may name

    name: Name = Field(description="Task name; the label column too, unless `label` says otherwise.")
    label: str | None = Field(None, description="Label column; defaults to the task's name. A null label is unknown and masked.")
    weight: NonNegativeFloat = Field(1.0, description="λ of this task in the joint loss Σ λ·L.")
    tower: tuple[PositiveInt, ...] = Field((64,), description="Hidden widths of the task's tower.")
    parents: tuple[Name, ...] = Field((), description="Binary tasks that come before this one: a click before its conversion.")
    space: Space | None = Field(
        None,
        description="Rows it is trained on. labelled: all with a label (default without parents). observed: those whose parents all "
        "happened (default with parents). entire: all impressions, through P(parents)·P(task | parents) (default of esmm and escm2). "
        "joint: all impressions, the output is P(task and parents) (default of aitm).",
    )

    @property
    def column(self) -> str:
        return self.label or self.name

    @property
    def outputs(self) -> int:
        """Numbers that its tower ends in."""
        return 1

    @property
    def extra(self) -> str | None:
        """A column that its loss reads beside the label."""
        return None


class FakeNegativeWeighted(Strict):
    """Ktena et al. 2019: an impression counts as negative at once, and again as positive when it converts; weights undo that."""

    kind: Literal["fnw"]


class DelayedFeedback(Strict):
    """Chapelle 2014: a negative may still convert; the delay is exponential, its rate predicted by a second output."""

    kind: Literal["dfm"]
    elapsed: str = Field(description="Column: time from impression to conversion, or of the unconverted until now; ≥ 0, any unit.")


Delay = Annotated[FakeNegativeWeighted | DelayedFeedback, Field(discriminator="kind")]


class Calibrated(Strict):
    """Fitted on the validation split at the end of a run, when the best checkpoint is known; applied when that one is evaluated.

    Beyond evaluation.exact_rows it is fitted on every k-th row.
    """

    slices: Name | None = Field(None, description="Id or bucket feature: every value of it that has enough rows gets a fit of its own.")
    min_rows: PositiveInt = Field(
        1000, description="Rows that a slice needs; smaller ones, unseen ones and rows without exactly one value use the overall fit."
    )


class Platt(Calibrated):
    """Platt 1999, without his smoothed targets: the logit z becomes a·z + b, as logistic regression finds them."""

    kind: Literal["platt"]


class Isotonic(Calibrated):
    """Zadrozny and Elkan 2002: the increasing function of the logit that is closest to the labels, lines between its steps."""

    kind: Literal["isotonic"]


CalibrationConfig = Annotated[Platt | Isotonic, Field(discriminator="kind")]


class BinaryTask(Task):
    """Labels 0 or 1 (or false, true); binary cross-entropy on the logit."""

    metrics: ClassVar[tuple[str, ...]] = (*RANKING, *(f"joint_{m}" for m in RANKING), "entire_auc")
    kind: Literal["binary"] = "binary"
    true_probability: str | None = Field(
        None, description="Column with the true probability, where a data set knows it: gives best_possible_auc."
    )
    true_probability_entire: str | None = Field(
        None, description="The same had all parents happened: gives entire_auc and entire_calibration over all impressions."
    )
    pos_weight: PositiveFloat = Field(1.0, description="Loss of a positive times this; undone in predictions.")
    focal: NonNegativeFloat = Field(0.0, description="γ of the focal loss (1-p)^γ; not calibrated, so fit a calibration.")
    kept_negatives: Share = Field(1.0, description="Share of the negatives that the training data kept; undone in predictions.")
    delay: Delay | None = Field(None, description="How conversions that arrive late are accounted for.")
    calibration: CalibrationConfig | None = Field(None, description="What is left of bias, taken out of the logits after training.")

    @property
    def outputs(self) -> int:
        return 2 if isinstance(self.delay, DelayedFeedback) else 1

    @property
    def extra(self) -> str | None:
        return self.delay.elapsed if isinstance(self.delay, DelayedFeedback) else None

    @model_validator(mode="after")
    def _one_loss(self):
        if self.delay and (self.focal or self.pos_weight != 1.0):
            raise ValueError(f"task {self.name!r}: delay is a loss of its own; leave focal and pos_weight out")
        if self.delay and self.kept_negatives < 1:
            raise ValueError(
                f"task {self.name!r}: with delay no constant undoes kept_negatives, since negatives may yet turn; leave one out"
            )
        return self


class RegressionTask(Task):
    """A real label."""

    kind: Literal["regression"]
    loss: Literal["half_squared", "squared", "absolute", "huber"] = Field("half_squared", description="½(ŷ-y)², (ŷ-y)², |ŷ-y|, Huber.")
    delta: PositiveFloat = Field(1.0, description="Huber: where the square becomes a line.")
    bias: float = Field(0.0, description="Initial output: the label's mean saves the first steps.")

    @model_validator(mode="after")
    def _delta_of_huber(self):
        if self.delta != 1.0 and self.loss != "huber":
            raise ValueError(f"task {self.name!r}: delta is of loss huber alone, not of {self.loss}")
        return self


class OrdinalTask(Task):
    """Levels 0 … levels-1 in an order, such as stars; CORAL (Cao et al. 2020): one score, levels-1 thresholds."""

    metrics: ClassVar[tuple[str, ...]] = (*VALUES, "accuracy")
    kind: Literal["ordinal"]
    levels: Annotated[int, Field(ge=2)] = Field(description="Number of levels.")

    @property
    def outputs(self) -> int:
        return self.levels - 1


class MulticlassTask(Task):
    """Classes 0 … classes-1; softmax cross-entropy."""

    metrics: ClassVar[tuple[str, ...]] = ("logloss", "accuracy")
    kind: Literal["multiclass"]
    classes: Annotated[int, Field(ge=2)] = Field(description="Number of classes.")

    @property
    def outputs(self) -> int:
        return self.classes


class WatchTimeTask(Task):
    """Weighted logistic regression (Covington et al. 2016): the odds e^z are the expected watch time; a label ≥ 0."""

    kind: Literal["watch_time"]


class QuantileTask(Task):
    """A label ≥ 0 as its quantile among rows of like duration (Zhan et al. 2022, D2Q), turned back when predicted."""

    kind: Literal["quantile"]
    quantiles: tuple[tuple[float, ...], ...] = Field(
        min_length=1, description="Of every duration group, increasing label values at evenly spaced quantiles, 0 and 1 included."
    )
    duration: str | None = Field(None, description="Column that groups the rows; null counts as 0.")
    duration_edges: tuple[float, ...] = Field((), description="Increasing edges between the duration groups.")

    @property
    def extra(self) -> str | None:
        return self.duration

    @model_validator(mode="after")
    def _groups(self):
        if len(self.quantiles) != len(self.duration_edges) + 1:
            raise ValueError(
                f"task {self.name!r}: {len(self.quantiles)} rows of quantiles for {len(self.duration_edges) + 1} duration groups"
            )
        if bool(self.duration_edges) != bool(self.duration):
            raise ValueError(f"task {self.name!r}: duration and duration_edges go together: the column, and where its groups part")
        for row in (*self.quantiles, self.duration_edges):
            if any(b <= a for a, b in pairwise(row)):
                raise ValueError(f"task {self.name!r}: quantiles and duration_edges must increase")
        if any(len(row) < 2 or len(row) != len(self.quantiles[0]) for row in self.quantiles):
            raise ValueError(f"task {self.name!r}: every row of quantiles needs the same number of values, at least 2")
        return self


class LognormalTask(Task):
    """Zero-inflated lognormal (Wang et al. 2019, LTV): P(y > 0), and the location and scale of log y; a label ≥ 0."""

    metrics: ClassVar[tuple[str, ...]] = (*VALUES, "positive_auc")
    kind: Literal["zero_inflated_lognormal"]

    @property
    def outputs(self) -> int:
        return 3


TaskConfig = Annotated[
    BinaryTask | RegressionTask | OrdinalTask | MulticlassTask | WatchTimeTask | QuantileTask | LognormalTask, Field(discriminator="kind")
]
