"""λ of the joint loss: where gradients are compared (cut.py), and how it follows from them (the other modules)."""

from distmtl.model.weighting.build import make_weighting
from distmtl.model.weighting.cut import Cut
from distmtl.model.weighting.weighting import Weighting

__all__ = ["Cut", "Weighting", "make_weighting"]
