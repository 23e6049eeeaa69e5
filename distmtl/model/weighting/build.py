"""The weighting that a config asks for."""

from __future__ import annotations

from distmtl.config import Config, PCGradWeighting, StaticWeighting
from distmtl.model.weighting.surgery import PCGrad
from distmtl.model.weighting.weighting import Static, Weighting


def weighting(config: Config) -> Weighting:
    tasks, seed = len(config.tasks), config.run.seed
    match config.weighting:
        case StaticWeighting():
            return Static(tasks)
        case PCGradWeighting():
            return PCGrad(tasks, seed)
