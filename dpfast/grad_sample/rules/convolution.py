"""Convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._deferred import ConvGradient
from dpfast.grad_sample._function import RuleCall, low_precision, without_autocast
from dpfast.grad_sample._samples import fold
from dpfast.ops.conv_grad import conv_input_grad
from dpfast.ops.conv_grad_sample import ConvSettings, bias_grads, conv_grad_sample

__all__ = ["convolution", "transposed_convolution"]


@dataclass(frozen=True)
class _Convolution(RuleCall):
    collector: Collector
    settings: ConvSettings
    weight: Target | None
    bias: Target | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight, bias = inputs
        with without_autocast(x.device):
            bias = None if bias is None else bias.to(x.dtype)
            result = torch.convolution(x, weight.to(x.dtype), bias, *self.settings)
        return result, (x, weight)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight = saved
        grad_x = None
        if wanted[0]:
            grad_x = conv_input_grad(x, grad_output, weight.to(x.dtype), self.settings)
        batch_size = self.collector.batch_size
        biases = None
        if self.weight is not None and x.shape[0] == batch_size:
            tensor = self.weight.tensor
            gradient = ConvGradient(self.weight.name, tensor, x, grad_output, self.settings)
            self.collector.take(self.weight, gradient)
            biases = gradient.bias
        elif self.weight is not None:
            grads = conv_grad_sample(x, grad_output, weight.shape, self.settings)
            self.weight.add(fold(grads.weight, batch_size, self.weight.name))
            biases = grads.bias
        if self.bias is not None:
            biases = bias_grads(grad_output) if biases is None else biases
            self.bias.add(fold(biases, batch_size, self.bias.name))
        return grad_x, None, None


def _per_axis(value: Any, axes: int) -> list[int]:
    if isinstance(value, int):
        return [value] * axes
    values = [int(v) for v in value]
    return values * axes if len(values) == 1 else values


def _apply(
    collector: Collector,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: ConvSettings,
) -> torch.Tensor:
    targets = (collector.target_of(weight), collector.target_of(bias))
    name = next(target.name for target in targets if target is not None)
    if x.dim() != weight.dim():
        raise ValueError(
            f"per_sample_gradients: {name} needs an input with a sample axis, (B, C, *spatial), "
            f"got shape {tuple(x.shape)}"
        )
    dtype = low_precision(x.device)
    call = _Convolution(collector, settings, *targets)
    return call(x if dtype is None else x.to(dtype), weight, bias)


def convolution(
    collector: Collector,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv1d, conv2d, conv3d."""
    axes = weight.dim() - 2
    dilations = _per_axis(dilation, axes)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            # The odd element goes behind, as in torch.
            odd = [amount for total in reversed(totals) for amount in (0, total % 2)]
            input = torch.nn.functional.pad(input, odd)
        paddings = [total // 2 for total in totals]
    else:
        paddings = _per_axis(0 if padding == "valid" else padding, axes)
    settings = ConvSettings(
        _per_axis(stride, axes), paddings, dilations, False, [0] * axes, int(groups)
    )
    return _apply(collector, input, weight, bias, settings)


def transposed_convolution(
    collector: Collector,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv_transpose1d, conv_transpose2d, conv_transpose3d."""
    axes = weight.dim() - 2
    settings = ConvSettings(
        _per_axis(stride, axes),
        _per_axis(padding, axes),
        _per_axis(dilation, axes),
        True,
        _per_axis(output_padding, axes),
        int(groups),
    )
    return _apply(collector, input, weight, bias, settings)
