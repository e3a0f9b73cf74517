"""Linear layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import low_precision, quiet_backward, without_autocast
from dpfast.grad_sample._samples import samples_first

__all__ = ["linear"]


class _Call(NamedTuple):
    collector: Collector
    sample_axis: int
    weight: Target | None
    bias: Target | None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: _Call
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        with without_autocast(x.device):
            bias = None if bias is None else bias.to(x.dtype)
            return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight = saved
        collector, axis, weight_target, bias_target = ctx.call
        grad_x = grad_output @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        name = next(t.name for t in (weight_target, bias_target) if t is not None)
        # (B, all positions of a sample, features)
        outer = samples_first(grad_output, collector.batch_size, axis, name).flatten(1, -2)
        if weight_target is not None:
            inner = samples_first(x, collector.batch_size, axis, name).flatten(1, -2)
            weight_target.add(outer.transpose(1, 2) @ inner)
        if bias_target is not None:
            bias_target.add(outer.sum(1))
        return grad_x, None, None, None


def linear(
    collector: Collector,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch.nn.functional.linear."""
    targets = (collector.target_of(weight), collector.target_of(bias))
    if input.dim() < 2:
        name = next(target.name for target in targets if target is not None)
        raise ValueError(
            f"per_sample_gradients: {name} needs an input with a sample axis, (B, ..., features), "
            f"got shape {tuple(input.shape)}"
        )
    dtype = low_precision(input.device)
    x = input if dtype is None else input.to(dtype)
    result = _Linear.apply(x, weight, bias, _Call(collector, collector.sample_axis, *targets))
    assert isinstance(result, torch.Tensor)
    return result
