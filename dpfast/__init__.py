"""dpfast: per-sample differential privacy for PyTorch at the speed of memory."""

from dpfast._native import build_info
from dpfast.errors import PrivacyError
from dpfast.grad_sample import (
    PerSampleGradients,
    per_sample_gradients,
    refuse_coupling,
    replace_batchnorm,
)
from dpfast.morphology import DPMorph
from dpfast.ops import ClipStats, Guarantee, NoiseSource, clip_and_noise
from dpfast.privacy import (
    AlignmentReport,
    NoisyHistogram,
    PercentilePaper,
    PrivacyEngine,
    PrivacyLedger,
    PrivateQuantile,
    alignment,
)
from dpfast.profiling import Profile, profile
from dpfast.segmentation import per_sample_loss

__version__ = build_info()["version"]

__all__ = [
    "AlignmentReport",
    "ClipStats",
    "DPMorph",
    "Guarantee",
    "NoiseSource",
    "NoisyHistogram",
    "PerSampleGradients",
    "PercentilePaper",
    "PrivacyEngine",
    "PrivacyError",
    "PrivacyLedger",
    "PrivateQuantile",
    "Profile",
    "__version__",
    "alignment",
    "clip_and_noise",
    "per_sample_gradients",
    "per_sample_loss",
    "profile",
    "refuse_coupling",
    "replace_batchnorm",
]
