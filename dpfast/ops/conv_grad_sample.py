"""Per-sample gradients of a convolution's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["ConvSettings", "conv_weight_grad_sample"]


class ConvSettings(NamedTuple):
    """What torch.convolution takes besides its tensors, one number per spatial axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def conv_weight_grad_sample(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> torch.Tensor:
    """The gradient of every sample's loss with respect to a convolution's weight.

    Args:
      x: input (N, C, *spatial).
      grad_output: gradient of the summed loss (N, K, *spatial), dtype and device of x.
      weight_shape: (K, C / groups, *kernel), or (C, K / groups, *kernel) where transposed.
      settings: the convolution's.

    Returns:
      (N, *weight_shape), dtype of x.
    """
    grads = x.new_empty((x.shape[0], *weight_shape))
    weight = x.new_empty(()).expand(weight_shape)  # its values are not read
    for sample in range(x.shape[0]):
        grads[sample] = torch.ops.aten.convolution_backward(
            grad_output[sample : sample + 1],
            x[sample : sample + 1],
            weight,
            None,
            *settings,
            [False, True, False],
        )[1]
    return grads
