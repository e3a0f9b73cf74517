"""Activations with parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import quiet_backward
from dpfast.grad_sample._samples import fold

__all__ = ["prelu"]


class _Call(NamedTuple):
    collector: Collector
    target: Target


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        return torch.prelu(x, weight.to(x.dtype))

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        x, weight = saved
        collector, target = ctx.call
        slopes = weight.to(x.dtype)
        if x.dim() > 1:
            slopes = slopes.reshape(1, -1, *[1] * (x.dim() - 2))
        grad_x, terms = torch.ops.aten._prelu_kernel_backward(grad_output, x, slopes)
        if weight.numel() == 1:
            sums = terms.flatten(1).sum(1, keepdim=True)
        else:
            sums = terms.flatten(2).sum(2) if x.dim() > 2 else terms
        target.add(fold(sums, collector.batch_size, target.name).reshape(-1, *weight.shape))
        return grad_x, None, None


def prelu(collector: Collector, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.prelu."""
    target = collector.target_of(weight)
    assert target is not None
    if input.dim() < 2:
        raise ValueError(
            f"per_sample_gradients: {target.name} needs an input with a sample axis, (B, C, ...), "
            f"got shape {tuple(input.shape)}"
        )
    result = _PReLU.apply(input, weight, _Call(collector, target))
    assert isinstance(result, torch.Tensor)
    return result
