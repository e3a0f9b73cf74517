"""Segmentation under differential privacy."""

from dpfast.segmentation.losses import PerSampleLoss, per_sample_loss

__all__ = ["PerSampleLoss", "per_sample_loss"]
