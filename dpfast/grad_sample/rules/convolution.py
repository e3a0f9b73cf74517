"""Convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import low_precision, quiet_backward, without_autocast
from dpfast.grad_sample._samples import fold
from dpfast.ops.conv_grad_sample import ConvSettings, conv_weight_grad_sample

__all__ = ["convolution", "transposed_convolution"]


class _Call(NamedTuple):
    settings: ConvSettings
    collector: Collector
    weight: Target | None
    bias: Target | None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: _Call
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        with without_autocast(x.device):
            bias = None if bias is None else bias.to(x.dtype)
            return torch.convolution(x, weight.to(x.dtype), bias, *call.settings)

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight = saved
        settings, collector, weight_target, bias_target = ctx.call
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad_output, x, weight.to(x.dtype), None, *settings, [True, False, False]
            )[0]
        batch_size = collector.batch_size
        if weight_target is not None:
            grads = conv_weight_grad_sample(x, grad_output, weight.shape, settings)
            weight_target.add(fold(grads, batch_size, weight_target.name))
        if bias_target is not None:
            bias_target.add(fold(grad_output.flatten(2).sum(2), batch_size, bias_target.name))
        return grad_x, None, None, None


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
            f"per_sample_gradients: {name} needs an input with a sample axis, (B, C, *spatial), got "
            f"shape {tuple(x.shape)}"
        )
    dtype = low_precision(x.device)
    result = _Convolution.apply(
        x if dtype is None else x.to(dtype), weight, bias, _Call(settings, collector, *targets)
    )
    assert isinstance(result, torch.Tensor)
    return result


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
