"""Grey-scale morphology, and DP-Morph: morphology within the private loss."""

from dpfast.morphology.dp_morph import DPMorph
from dpfast.morphology.elements import PerChannel, cross, ellipse
from dpfast.morphology.functional import (
    OPERATIONS,
    apply,
    black_hat,
    closing,
    dilation,
    erosion,
    gradient,
    opening,
    top_hat,
)

__all__ = [
    "OPERATIONS",
    "DPMorph",
    "PerChannel",
    "apply",
    "black_hat",
    "closing",
    "cross",
    "dilation",
    "ellipse",
    "erosion",
    "gradient",
    "opening",
    "top_hat",
]
