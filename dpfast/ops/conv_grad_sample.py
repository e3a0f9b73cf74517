"""Per-sample gradients of a convolution's weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dpfast import _native
from dpfast.ops._precision import allows_tf32_convolutions

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
    call = _kernel_call(x, grad_output, weight_shape, settings)
    if call is not None:
        out = torch.empty((x.shape[0], *weight_shape), dtype=torch.float32, device=x.device)
        bias, squares = call.run(out)
        return ConvGrads(out, bias_grads(grad_output) if bias is None else bias, squares)
    weight = _by_library(x, grad_output, weight_shape, settings)
    return ConvGrads(weight, bias_grads(grad_output), None)


def conv_square_norms(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> torch.Tensor:
    """Squared norms (N,), float64, of what conv_grad_sample would give, one sample at a time."""
    if not _is_product(weight_shape, settings):
        call = _kernel_call(x, grad_output, weight_shape, settings)
        if call is not None:
            return call.run(None)[1]
    squares = x.new_zeros(x.shape[0], dtype=torch.float64)
    for i in range(x.shape[0]):
        one = conv_grad_sample(x[i : i + 1], grad_output[i : i + 1], weight_shape, settings)
        squares[i] = one.weight.double().square().sum()
    return squares


def _has_own_kernel(x: torch.Tensor) -> bool:
    if x.dtype not in _NATIVE_DTYPES or x.dim() > 5:
        return False
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        return _native.has_cuda_kernels() and capability >= (8, 0)
    return x.device.type == "cpu"


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


def _fills_rows(channels: int, others: int, on_cuda: bool) -> bool:
    """Whether the others are better as the anchor's channels, if the two may change places."""
    if channels >= others:
        return False
    if not on_cuda:
        return channels < _native.conv_lanes()
    # Anchor channels are rows of tiles, the other tensor's times taps are columns.
    rows, rows_of_others = (16 if c <= 16 else -(-c // 32) * 32 for c in (channels, others))
    return rows_of_others * channels <= rows * others


def _is_small(
    anchor: torch.Tensor,
    moving: torch.Tensor,
    weight_shape: Sequence[int],
    padding: Sequence[int],
    settings: ConvSettings,
) -> bool:
    """Whether the CUDA kernels' 32-bit offsets within a sample suffice (check_sizes there)."""
    bytes_reached = 4 * moving.shape[1] // settings.groups
    for size, positions, k, step, amount, distance in zip(
        moving.shape[2:],
        anchor.shape[2:],
        weight_shape[2:],
        settings.stride,
        padding,
        settings.dilation,
        strict=True,
    ):
        bytes_reached *= max(size, positions * step + amount) + (k - 1) * distance
    return max(bytes_reached, anchor.shape[1:].numel(), math.prod(weight_shape)) < 2**31


@dataclass(frozen=True)
class _KernelCall:
    """One call of an own kernel: on the CPU in float32, on CUDA in the inputs' dtype."""

    anchor: torch.Tensor
    moving: torch.Tensor
    padding: list[int]
    swapped: bool
    kernel: Sequence[int]
    settings: ConvSettings

    def run(self, out: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Write `out`, if it is wanted.

        Returns:
          The gradients of the bias (N, K), where they come out of the same pass, and the squared
          norms (N,).
        """
        anchor, moving = self.anchor.contiguous(), self.moving.contiguous()
        on_cuda = anchor.device.type == "cuda"
        if not on_cuda:
            anchor, moving = anchor.float(), moving.float()
        # The kernel passes over the anchor's channels anyway; are they the output's?
        bias = None
        if self.swapped == self.settings.transposed:
            bias = anchor.new_empty(anchor.shape[:2], dtype=torch.float32)
        squares = anchor.new_empty(anchor.shape[0], dtype=torch.float64)
        _native.conv_grad(
            anchor,
            moving,
            out,
            groups=self.settings.groups,
            kernel=self.kernel,
            stride=self.settings.stride,
            padding=self.padding,
            dilation=self.settings.dilation,
            swapped=self.swapped,
            anchor_sums=bias,
            square_norms=squares,
            allow_tf32=on_cuda and allows_tf32_convolutions(),
        )
        return bias, squares


def _kernel_call(
    x: torch.Tensor, grad_output: torch.Tensor, weight_shape: Sequence[int], settings: ConvSettings
) -> _KernelCall | None:
    """The call of an own kernel, where there is one for these tensors."""
    if not _has_own_kernel(x):
        return None
    kernel, on_cuda = weight_shape[2:], x.device.type == "cuda"
    anchor, moving = (x, grad_output) if settings.transposed else (grad_output, x)
    padding = settings.padding
    # The anchor's channels fill vectors or rows. With a stride of 1 the two can change places.
    swapped_padding = [
        (k - 1) * d - p for k, d, p in zip(kernel, settings.dilation, padding, strict=True)
    ]
    channels, others = (t.shape[1] // settings.groups for t in (anchor, moving))
    swapped = (
        _fills_rows(channels, others, on_cuda)
        and all(step == 1 for step in settings.stride)
        and all(amount >= 0 for amount in swapped_padding)
    )
    if swapped:
        anchor, moving, padding = moving, anchor, swapped_padding
    if on_cuda and not _is_small(anchor, moving, weight_shape, padding, settings):
        return None
    return _KernelCall(anchor, moving, padding, swapped, kernel, settings)


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
