"""Per-sample gradients of a convolution's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpfast import _native

__all__ = ["ConvGrads", "ConvSettings", "bias_grads", "conv_grad_sample", "conv_square_norms"]


class ConvSettings(NamedTuple):
    """What torch.convolution takes besides its tensors, one number per spatial axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class ConvGrads(NamedTuple):
    """Per-sample gradients of a convolution.

    Attributes:
      weight: (N, *weight_shape), float32 (float64 for float64 input).
      bias: (N, K), likewise.
      square_norms: (N,) float64, of `weight`; None where they did not come out of the same pass.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    square_norms: torch.Tensor | None


def conv_grad_sample(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> ConvGrads:
    """The gradients of every sample's loss with respect to a convolution's weight and bias.

    Args:
      x: input (N, C, *spatial).
      grad_output: gradient of the summed loss (N, K, *spatial), dtype and device of x.
      weight_shape: (K, C / groups, *kernel), or (C, K / groups, *kernel) where transposed.
      settings: the convolution's.
    """
    if _is_product(weight_shape, settings):
        return ConvGrads(_by_product(x, grad_output, settings), bias_grads(grad_output), None)
    if _has_own_kernel(x):
        out = torch.empty((x.shape[0], *weight_shape))
        bias, squares = _by_own_kernel(x, grad_output, weight_shape, settings, out)
        return ConvGrads(out, bias_grads(grad_output) if bias is None else bias, squares)
    weight = _by_library(x, grad_output, weight_shape, settings)
    return ConvGrads(weight, bias_grads(grad_output), None)


def conv_square_norms(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> torch.Tensor:
    """Squared norms (N,), float64, of what conv_grad_sample would give, one sample at a time."""
    if not _is_product(weight_shape, settings) and _has_own_kernel(x):
        return _by_own_kernel(x, grad_output, weight_shape, settings, None)[1]
    squares = [
        conv_grad_sample(x[i : i + 1], grad_output[i : i + 1], weight_shape, settings).weight
        for i in range(x.shape[0])
    ]
    return torch.stack([weight.double().square().sum() for weight in squares])


def _has_own_kernel(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES and x.dim() <= 5


def bias_grads(grad_output: torch.Tensor) -> torch.Tensor:
    """(N, K): the output's gradient summed over positions, float32 (float64 for float64)."""
    sums = grad_output.flatten(2).sum(2)
    return sums.float() if sums.dtype in _NATIVE_DTYPES else sums


_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_product(weight_shape: Sequence[int], settings: ConvSettings) -> bool:
    """Whether every output position sees one input position, its own."""
    return (
        all(k == 1 for k in weight_shape[2:])
        and all(step == 1 for step in settings.stride)
        and all(amount == 0 for amount in settings.padding)
        and settings.groups == 1
    )


def _by_product(x: torch.Tensor, grad_output: torch.Tensor, settings: ConvSettings) -> torch.Tensor:
    """One matrix product a sample."""
    first, second = (x, grad_output) if settings.transposed else (grad_output, x)
    product = first.flatten(2) @ second.flatten(2).transpose(1, 2)
    if product.dtype in _NATIVE_DTYPES:
        product = product.float()
    return product.reshape(*product.shape, *[1] * (x.dim() - 2))


def _by_own_kernel(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: Sequence[int],
    settings: ConvSettings,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """In float32, on the CPU: the bias' gradients where they come out as well, and the norms."""
    kernel = weight_shape[2:]
    anchor, moving = (x, grad_output) if settings.transposed else (grad_output, x)
    padding = settings.padding
    # The anchor's channels fill vectors. With a stride of 1 the two can change places.
    swapped_padding = [
        (k - 1) * d - p for k, d, p in zip(kernel, settings.dilation, padding, strict=True)
    ]
    channels = anchor.shape[1] // settings.groups
    swapped = (
        channels < _native.conv_lanes()
        and channels < moving.shape[1] // settings.groups
        and all(step == 1 for step in settings.stride)
        and all(amount >= 0 for amount in swapped_padding)
    )
    if swapped:
        anchor, moving, padding = moving, anchor, swapped_padding
    # The kernel passes over the anchor's channels anyway; are they the output's?
    of_output = swapped == settings.transposed
    bias = torch.empty(grad_output.shape[:2]) if of_output else None
    squares = torch.empty(x.shape[0], dtype=torch.float64)
    _native.conv_grad(
        anchor.contiguous().float(),
        moving.contiguous().float(),
        out,
        groups=settings.groups,
        kernel=kernel,
        stride=settings.stride,
        padding=padding,
        dilation=settings.dilation,
        swapped=swapped,
        anchor_sums=bias,
        square_norms=squares,
    )
    return bias, squares


def _by_library(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> torch.Tensor:
    """By PyTorch's own gradient of the weight, one sample after the other."""
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
    return grads.float() if grads.dtype in _NATIVE_DTYPES else grads
