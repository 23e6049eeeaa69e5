"""Which trackers a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from distmtl.config import Config
from distmtl.errors import DistmtlError
from distmtl.tracking.mlflow import MLflowRun
from distmtl.tracking.tracker import Service, Tracker
from distmtl.tracking.wandb import WandbRun

FILES = tuple(f"{kind.name}.json" for kind in (MLflowRun, WandbRun))  # in the run's directory, what they have been sent


def require_trackers(config: Config) -> None:
    """
    Raises:
        DistmtlError: the package of one that the config asks for is not installed here.
    """
    for name in ("mlflow", "wandb"):
        if getattr(config.tracking, name) and not find_spec(name):
            raise DistmtlError(
                f"tracking.{name}: the package is not installed; pip install 'distmtl[{name}]', or leave tracking.{name} out"
            )


def open_trackers(config: Config, log: Path, say: Callable[[str], None]) -> list[Tracker]:
    """See `Tracker`."""
    services: list[Service] = []
    if config.tracking.mlflow:
        services.append(MLflowRun(config.tracking.mlflow, config))
    if config.tracking.wandb:
        services.append(WandbRun(config.tracking.wandb, config, log.parent))
    return [Tracker(log, service, say) for service in services]
