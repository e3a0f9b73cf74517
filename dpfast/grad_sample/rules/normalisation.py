"""Normalisation layers with a scale and a shift, none of which mixes samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import RuleCall
from dpfast.grad_sample._samples import fold, samples_first

__all__ = ["group_norm", "instance_norm", "layer_norm", "rms_norm"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class _GroupNorm(RuleCall):
    collector: Collector
    num_groups: int
    eps: float
    weight: Target | None
    bias: Target | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight, bias = inputs
        x = x.contiguous()
        n, c = x.shape[:2]
        size = math.prod(x.shape[2:])
        y, mean, rstd = _aten.native_group_norm(
            x, weight, bias, n, c, size, self.num_groups, self.eps
        )
        return y, (x, weight, mean, rstd)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight, mean, rstd = saved
        grad_output = grad_output.contiguous()
        n, c = x.shape[:2]
        size = math.prod(x.shape[2:])
        grad_x = None
        if wanted[0]:
            sizes = (n, c, size, self.num_groups)
            grad_x = _aten.native_group_norm_backward(
                grad_output, x, mean, rstd, weight, *sizes, [True, False, False]
            )[0]
        batch_size = self.collector.batch_size
        flat = grad_output.reshape(n, c, size)
        shift = flat.sum(2)
        if self.bias is not None:
            self.bias.add(fold(shift, batch_size, self.bias.name))
        if self.weight is not None:
            # sum of grad * (x - mean) * rstd, with mean and rstd of the channel's group
            products = torch.linalg.vecdot(flat, x.reshape(n, c, size))
            in_group = c // self.num_groups
            means = mean.reshape(n, self.num_groups).repeat_interleave(in_group, 1)
            scales = rstd.reshape(n, self.num_groups).repeat_interleave(in_group, 1)
            scale_grads = (products - shift * means) * scales
            self.weight.add(fold(scale_grads, batch_size, self.weight.name))
        return grad_x, None, None


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
    return _GroupNorm(collector, num_groups, eps, *targets)(input, weight, bias)


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


@dataclass(frozen=True)
class _LayerNorm(RuleCall):
    collector: Collector
    shape: tuple[int, ...]
    eps: float
    sample_axis: int
    weight: Target | None
    bias: Target | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight, bias = inputs
        y, mean, rstd = _aten.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (x, weight, mean, rstd)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight, mean, rstd = saved
        grad_x = None
        if wanted[0]:
            grad_x = _aten.native_layer_norm_backward(
                grad_output, x, self.shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        if self.weight is not None:
            self._add_sums(self.weight, grad_output * ((x - mean) * rstd))
        if self.bias is not None:
            self._add_sums(self.bias, grad_output)
        return grad_x, None, None

    def _add_sums(self, target: Target, terms: torch.Tensor) -> None:
        rows = samples_first(terms, self.collector.batch_size, self.sample_axis, target.name)
        positions = math.prod(rows.shape[1 : -len(self.shape)])
        target.add(rows.reshape(rows.shape[0], positions, *self.shape).sum(1))


def _refuse_sample_axis(
    collector: Collector, x: torch.Tensor, axes: int, used: Sequence[torch.Tensor | None]
) -> None:
    if x.dim() <= axes:
        targets = map(collector.target_of, used)
        name = next(target.name for target in targets if target is not None)
        raise ValueError(
            f"per_sample_gradients: {name} normalises over the sample axis of an input of shape "
            f"{tuple(x.shape)}"
        )


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
    _refuse_sample_axis(collector, input, len(shape), (weight, bias))
    call = _LayerNorm(collector, shape, eps, collector.sample_axis, *targets)
    return call(input, weight, bias)


@dataclass(frozen=True)
class _Scale(RuleCall):
    """x * weight + bias, the weight along some of x's axes."""

    collector: Collector
    axis: int  # the first of the weight's axes in the input
    weight: Target | None
    bias: Target | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight, bias = inputs
        y = x if weight is None else x * _spread(weight, x, self.axis)
        return y.clone() if bias is None else y + _spread(bias, x, self.axis), (x, weight)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight = saved
        for target, terms in ((self.weight, grad_output * x), (self.bias, grad_output)):
            if target is not None:
                axes = range(self.axis, self.axis + target.tensor.dim())
                rest = [axis for axis in range(1, x.dim()) if axis not in axes]
                sums = terms.sum(rest) if rest else terms
                target.add(fold(sums, self.collector.batch_size, target.name))
        grad_x = grad_output if weight is None else grad_output * _spread(weight, x, self.axis)
        return grad_x, None, None


def _spread(weight: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.reshape(*[1] * axis, *weight.shape, *[1] * (x.dim() - axis - weight.dim()))


def _scaled(
    collector: Collector,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    axis: int,
) -> torch.Tensor:
    targets = (collector.target_of(weight), collector.target_of(bias))
    return _Scale(collector, axis, *targets)(x, weight, bias)


def rms_norm(
    collector: Collector,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """torch.nn.functional.rms_norm."""
    _refuse_sample_axis(collector, input, len(normalized_shape), (weight,))
    x = torch.nn.functional.rms_norm(input, list(normalized_shape), None, eps)
    return _scaled(collector, x, weight, None, input.dim() - len(normalized_shape))
