"""Slow, obvious float64 twins of the native ops, in plain PyTorch: for tests and self-tests only.

Nothing here imports native code, and production code imports nothing from here.
"""

from dpfast.reference.clip_and_noise import ReferenceResult, clip_and_noise
from dpfast.reference.conv_grad_sample import conv_weight_grad_sample
from dpfast.reference.morphology import morphology
from dpfast.reference.noise import (
    chacha20_block,
    gaussian_from_words,
    laplace_from_words,
    noise_words,
    seed_key,
    standard_noise,
)

__all__ = [
    "ReferenceResult",
    "chacha20_block",
    "clip_and_noise",
    "conv_weight_grad_sample",
    "gaussian_from_words",
    "laplace_from_words",
    "morphology",
    "noise_words",
    "seed_key",
    "standard_noise",
]
