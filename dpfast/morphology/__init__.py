"""Grey-scale morphology, and DP-Morph: morphology within the private loss."""

from dpfast.morphology.adaptive import AdaptedMorph, adapt, adapt_nonprivate
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
from dpfast.morphology.label_maps import refine

__all__ = [
    "OPERATIONS",
    "AdaptedMorph",
    "DPMorph",
    "PerChannel",
    "adapt",
    "adapt_nonprivate",
    "apply",
    "black_hat",
    "closing",
    "cross",
    "dilation",
    "ellipse",
    "erosion",
    "gradient",
    "opening",
    "refine",
    "top_hat",
]
