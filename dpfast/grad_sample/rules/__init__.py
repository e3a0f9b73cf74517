"""Which rule serves which function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from dpfast.grad_sample.rules import activation, convolution, embedding, linear, normalisation
from dpfast.grad_sample.rules.generic import generic

__all__ = ["RULES", "generic"]

# Each takes the collector and the function's own arguments.
RULES: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    F.linear: linear.linear,
    F.conv1d: convolution.convolution,
    F.conv2d: convolution.convolution,
    F.conv3d: convolution.convolution,
    torch.conv1d: convolution.convolution,
    torch.conv2d: convolution.convolution,
    torch.conv3d: convolution.convolution,
    F.conv_transpose1d: convolution.transposed_convolution,
    F.conv_transpose2d: convolution.transposed_convolution,
    F.conv_transpose3d: convolution.transposed_convolution,
    torch.conv_transpose1d: convolution.transposed_convolution,
    torch.conv_transpose2d: convolution.transposed_convolution,
    torch.conv_transpose3d: convolution.transposed_convolution,
    F.group_norm: normalisation.group_norm,
    F.instance_norm: normalisation.instance_norm,
    F.layer_norm: normalisation.layer_norm,
    F.rms_norm: normalisation.rms_norm,
    F.prelu: activation.prelu,
    torch.prelu: activation.prelu,
    F.embedding: embedding.embedding,
}
