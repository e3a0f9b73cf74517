"""Per-sample gradients of any model whose samples are independent."""

from dpfast.grad_sample.batchnorm import replace_batchnorm
from dpfast.grad_sample.engine import PerSampleGradients, per_sample_gradients

__all__ = ["PerSampleGradients", "per_sample_gradients", "replace_batchnorm"]
