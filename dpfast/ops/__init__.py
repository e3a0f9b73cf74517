"""Public tensor functions."""

from dpfast.ops.clip_and_noise import ClipStats, Guarantee, clip_and_noise
from dpfast.ops.noise_source import NoiseSource

__all__ = ["ClipStats", "Guarantee", "NoiseSource", "clip_and_noise"]
