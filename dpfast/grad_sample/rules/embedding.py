"""Embedding tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import quiet_backward
from dpfast.grad_sample._samples import samples_first

__all__ = ["embedding"]


class _Call(NamedTuple):
    collector: Collector
    target: Target
    padding_idx: int | None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.call = call
        return torch.nn.functional.embedding(ids, weight)

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        (ids,) = saved
        collector, target, padding_idx = ctx.call
        batch_size = collector.batch_size
        width = target.tensor.shape[1]
        rows = samples_first(ids, batch_size, 0, target.name).flatten(1)
        grads = grad_output.reshape(*rows.shape, width)
        if padding_idx is not None:
            grads = grads.masked_fill((rows == padding_idx).unsqueeze(2), 0.0)
        result = grads.new_zeros((batch_size, *target.tensor.shape))
        result.scatter_add_(1, rows.unsqueeze(2).expand(-1, -1, width), grads)
        target.add(result)
        return None, None, None


def embedding(
    collector: Collector,
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.embedding, without the options that look at the whole batch."""
    target = collector.target_of(weight)
    assert target is not None
    for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq)):
        if value:
            raise ValueError(
                f"per_sample_gradients: {target.name} must not use {name}, which couples the samples"
            )
    if sparse:
        raise ValueError(f"per_sample_gradients: {target.name} must not have sparse gradients")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    result = _Embedding.apply(input, weight, _Call(collector, target, padding_idx))
    assert isinstance(result, torch.Tensor)
    return result
