"""The weighting that a config asks for."""

from __future__ import annotations

from distmtl.config import (
    AlignedMTLWeighting,
    CAGradWeighting,
    Config,
    DualBalancingWeighting,
    IMTLGWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    StaticWeighting,
)
from distmtl.model.weighting.surgery import IMTLG, MGDA, AlignedMTL, CAGrad, DualBalancing, NashMTL, PCGrad
from distmtl.model.weighting.weighting import Static, Weighting


def weighting(config: Config) -> Weighting:
    tasks, seed = len(config.tasks), config.run.seed
    match config.weighting:
        case StaticWeighting():
            return Static(tasks)
        case PCGradWeighting():
            return PCGrad(tasks, seed)
        case MGDAWeighting(normalisation=by):
            return MGDA(tasks, by)
        case IMTLGWeighting():
            return IMTLG(tasks)
        case CAGradWeighting(c=c, rescale=rescale):
            return CAGrad(tasks, c, rescale)
        case NashMTLWeighting():
            return NashMTL(tasks)
        case AlignedMTLWeighting():
            return AlignedMTL(tasks)
        case DualBalancingWeighting():
            return DualBalancing(tasks)
