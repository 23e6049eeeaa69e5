"""The weighting that a config asks for."""

from __future__ import annotations

import numpy as np

from distmtl.config import (
    AlignedMTLWeighting,
    BanditWeighting,
    CAGradWeighting,
    Config,
    DualBalancingWeighting,
    DWAWeighting,
    FAMOWeighting,
    GradNormWeighting,
    IMTLGWeighting,
    IMTLLWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    RLWWeighting,
    StaticWeighting,
    UncertaintyWeighting,
)
from distmtl.model.weighting.bandit import Bandit
from distmtl.model.weighting.by_loss import DWA, FAMO, IMTLL, RLW, Uncertainty, likelihood_scales
from distmtl.model.weighting.gradnorm import GradNorm
from distmtl.model.weighting.surgery import IMTLG, MGDA, AlignedMTL, CAGrad, DualBalancing, NashMTL, PCGrad
from distmtl.model.weighting.weighting import Static, Weighting


def make_weighting(config: Config) -> Weighting:
    tasks, seed = len(config.tasks), config.run.seed
    match config.weighting:
        case StaticWeighting():
            return Static(tasks)
        case UncertaintyWeighting(form="kendall", lr=lr):
            return Uncertainty(likelihood_scales(config), lr)
        case UncertaintyWeighting(lr=lr):
            return Uncertainty(np.full(tasks, 0.5), lr, bounded=True)
        case DWAWeighting(window=window, temperature=temperature):
            return DWA(tasks, window, temperature)
        case RLWWeighting():
            return RLW(tasks, seed)
        case IMTLLWeighting(lr=lr):
            return IMTLL(tasks, lr)
        case FAMOWeighting(lr=lr, weight_decay=decay, smoothing=smoothing):
            return FAMO(tasks, lr, decay, smoothing)
        case BanditWeighting(boost=boost, discount=discount, exploration=exploration):
            return Bandit(tasks, boost, discount, exploration)
        case GradNormWeighting(alpha=alpha, lr=lr):
            return GradNorm(tasks, alpha, lr)
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
