"""Normalisation layers with a scale and a shift, none of which mixes samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import quiet_backward
from dpfast.grad_sample._samples import fold, samples_first

__all__ = ["group_norm", "instance_norm", "layer_norm", "rms_norm"]

_aten = torch.ops.aten


class _GroupCall(NamedTuple):
    collector: Collector
    num_groups: int
    eps: float
    weight: Target | None
    bias: Target | None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: _GroupCall,
    ) -> torch.Tensor:
        x = x.contiguous()
        n, c = x.shape[:2]
        size = math.prod(x.shape[2:])
        y, mean, rstd = _aten.native_group_norm(
            x, weight, bias, n, c, size, call.num_groups, call.eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        result: torch.Tensor = y
        return result

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight, mean, rstd = saved
        call: _GroupCall = ctx.call
        grad_output = grad_output.contiguous()
        n, c = x.shape[:2]
        size = math.prod(x.shape[2:])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _aten.native_group_norm_backward(
                grad_output,
                x,
                mean,
                rstd,
                weight,
                n,
                c,
                size,
                call.num_groups,
                [True, False, False],
            )[0]
        batch_size = call.collector.batch_size
        flat = grad_output.reshape(n, c, -1)
        shift = flat.sum(2)
        if call.bias is not None:
            call.bias.add(fold(shift, batch_size, call.bias.name))
        if call.weight is not None:
            # sum of grad * (x - mean) * rstd, with mean and rstd of the channel's group
            products = torch.linalg.vecdot(flat, x.reshape(n, c, -1))
            per_group = c // call.num_groups
            means = mean.reshape(n, -1).repeat_interleave(per_group, 1)
            scales = rstd.reshape(n, -1).repeat_interleave(per_group, 1)
            scale_grads = (products - shift * means) * scales
            call.weight.add(fold(scale_grads, batch_size, call.weight.name))
        return grad_x, None, None, None


def group_norm(
    collector: Collector,
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.group_norm."""
    targets = (collector.target_of(weight), collector.target_of(bias))
    call = _GroupCall(collector, num_groups, eps, *targets)
    result = _GroupNorm.apply(input, weight, bias, call)
    assert isinstance(result, torch.Tensor)
    return result


def instance_norm(
    collector: Collector,
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.instance_norm: a group norm with one channel a group.

    The interception has refused running statistics that this call would update; where only they
    are used, the layer is a fixed scaling.
    """
    if use_input_stats:
        return group_norm(collector, input, input.shape[1], weight, bias, eps)
    assert running_mean is not None
    assert running_var is not None
    shape = (1, -1, *[1] * (input.dim() - 2))
    x = (input - running_mean.reshape(shape)) * (running_var.reshape(shape) + eps).rsqrt()
    return _scaled(collector, x, weight, bias, 1)


class _LayerCall(NamedTuple):
    collector: Collector
    shape: tuple[int, ...]
    eps: float
    sample_axis: int
    weight: Target | None
    bias: Target | None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: _LayerCall,
    ) -> torch.Tensor:
        y, mean, rstd = _aten.native_layer_norm(x, call.shape, weight, bias, call.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        result: torch.Tensor = y
        return result

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight, mean, rstd = saved
        call: _LayerCall = ctx.call
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _aten.native_layer_norm_backward(
                grad_output, x, call.shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        if call.weight is not None:
            _add_sums(call, call.weight, grad_output * ((x - mean) * rstd))
        if call.bias is not None:
            _add_sums(call, call.bias, grad_output)
        return grad_x, None, None, None


def _add_sums(call: _LayerCall, target: Target, terms: torch.Tensor) -> None:
    rows = samples_first(terms, call.collector.batch_size, call.sample_axis, target.name)
    target.add(rows.reshape(rows.shape[0], math.prod(rows.shape[1 : -len(call.shape)]), *call.shape).sum(1))


def layer_norm(
    collector: Collector,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.layer_norm."""
    targets = (collector.target_of(weight), collector.target_of(bias))
    shape = tuple(normalized_shape)
    if input.dim() <= len(shape):
        name = next(target.name for target in targets if target is not None)
        raise ValueError(
            f"per_sample_gradients: {name} normalises over the sample axis of an input of shape "
            f"{tuple(input.shape)}"
        )
    call = _LayerCall(collector, shape, eps, collector.sample_axis, *targets)
    result = _LayerNorm.apply(input, weight, bias, call)
    assert isinstance(result, torch.Tensor)
    return result


class _ScaleCall(NamedTuple):
    collector: Collector
    axis: int  # the first of the weight's axes in the input
    weight: Target | None
    bias: Target | None


class _Scale(torch.autograd.Function):
    """x * weight + bias, the weight along some of x's axes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: _ScaleCall,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        y = x if weight is None else x * _spread(weight, x, call.axis)
        return y.clone() if bias is None else y + _spread(bias, x, call.axis)

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight = saved
        call: _ScaleCall = ctx.call
        for target, terms in ((call.weight, grad_output * x), (call.bias, grad_output)):
            if target is not None:
                axes = range(call.axis, call.axis + target.tensor.dim())
                rest = [axis for axis in range(1, x.dim()) if axis not in axes]
                sums = terms.sum(rest) if rest else terms
                target.add(fold(sums, call.collector.batch_size, target.name))
        grad_x = grad_output if weight is None else grad_output * _spread(weight, x, call.axis)
        return grad_x, None, None, None


def _spread(weight: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.reshape(
        *[1] * axis, *weight.shape, *[1] * (x.dim() - axis - weight.dim())
    )


def _scaled(
    collector: Collector,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    axis: int,
) -> torch.Tensor:
    targets = (collector.target_of(weight), collector.target_of(bias))
    result = _Scale.apply(x, weight, bias, _ScaleCall(collector, axis, *targets))
    assert isinstance(result, torch.Tensor)
    return result


def rms_norm(
    collector: Collector,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """torch.nn.functional.rms_norm."""
    x = torch.nn.functional.rms_norm(input, list(normalized_shape), None, eps)
    return _scaled(collector, x, weight, None, input.dim() - len(normalized_shape))
