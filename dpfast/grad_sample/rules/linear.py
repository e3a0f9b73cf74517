"""Linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._deferred import LinearGradient
from dpfast.grad_sample._function import RuleCall, low_precision, without_autocast
from dpfast.grad_sample._samples import samples_first

__all__ = ["linear"]


@dataclass(frozen=True)
class _Linear(RuleCall):
    collector: Collector
    sample_axis: int
    weight: Target | None
    bias: Target | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight, bias = inputs
        with without_autocast(x.device):
            rows, matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.to(x.dtype).t()
            flat = rows @ matrix if bias is None else torch.addmm(bias.to(x.dtype), rows, matrix)
            # No view: it may be changed in place.
            shape = (*x.shape[:-1], weight.shape[0])
            return torch.ops.aten._unsafe_view(flat, shape), (x, weight)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight = saved
        grad_x = grad_output @ weight.to(x.dtype) if wanted[0] else None
        name = next(t.name for t in (self.weight, self.bias) if t is not None)
        batch_size = self.collector.batch_size
        # (B, all positions of a sample, features)
        outer = samples_first(grad_output, batch_size, self.sample_axis, name).flatten(1, -2)
        if self.weight is not None:
            ends = (x, grad_output, self.sample_axis)
            gradient = LinearGradient(name, self.weight.tensor, batch_size, *ends)
            self.collector.take(self.weight, gradient)
        if self.bias is not None:
            self.bias.add(outer.sum(1))
        return grad_x, None, None


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
    call = _Linear(collector, collector.sample_axis, *targets)
    if collector.attention_rows is not None and x.dim() == 2:
        # The output projection's input: (L, samples, E) with the first two axes merged.
        rows = collector.attention_rows
        length = x.shape[0] // rows if rows else 1
        return call(x.reshape(length, rows, x.shape[1]), weight, bias).flatten(0, 1)
    return call(x, weight, bias)
