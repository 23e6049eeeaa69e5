"""Where the figures of a run go beside its own directory."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator

from distmtl.config.base import Strict

Text = Annotated[str, StringConstraints(min_length=1)]


class MLflowConfig(Strict):
    """A run in MLflow. Credentials are MLflow's own environment variables."""

    uri: Text = Field(description="Tracking server or store: https://…, databricks, sqlite:///…, file:///….")
    experiment: Text | None = Field(None, description="Default: the config's name.")

    @field_validator("uri")
    @classmethod
    def _for_every_process(cls, uri: str) -> str:
        if "://" not in uri and uri != "databricks":
            raise ValueError(f"{uri!r} is no URI, and workers run in folders of their own; give https://… or file:///absolute/path")
        if uri.startswith("file://") and not uri.startswith("file:///"):
            raise ValueError(f"{uri!r} is relative, and workers run in folders of their own; give file:///absolute/path")
        if urlsplit(uri).password:
            raise ValueError(
                "a password in it would be kept in every config.yaml; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class WandbConfig(Strict):
    """A run in Weights & Biases. The key is WANDB_API_KEY, or what `wandb login` keeps."""

    project: Text = Field(description="Project of the run.")
    entity: Text | None = Field(None, description="User or team; default: the key's.")
    mode: Literal["online", "offline"] = Field("online", description="offline: into RUN/wandb, for `wandb sync` later.")


class TrackingConfig(Strict):
    """Trackers, by an extra each: pip install 'distmtl[mlflow]', 'distmtl[wandb]'. metrics.jsonl and TensorBoard are always written."""

    mlflow: MLflowConfig | None = Field(None, description="Log to MLflow.")
    wandb: WandbConfig | None = Field(None, description="Log to Weights & Biases.")
