"""Per-sample gradients of any model whose samples are independent."""

from dpfast.grad_sample.batchnorm import replace_batchnorm
from dpfast.grad_sample.engine import PerSampleGradients, per_sample_gradients
from dpfast.grad_sample.independence import refuse_coupling

__all__ = [
    "PerSampleGradients",
    "per_sample_gradients",
    "refuse_coupling",
    "replace_batchnorm",
]
