"""Embedding tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import RuleCall
from dpfast.grad_sample._samples import samples_first

__all__ = ["embedding"]


@dataclass(frozen=True)
class _Embedding(RuleCall):
    collector: Collector
    target: Target
    padding_idx: int | None

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        ids, weight = inputs
        return torch.nn.functional.embedding(ids, weight), (ids,)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        batch_size, shape = self.collector.batch_size, self.target.tensor.shape
        rows = samples_first(saved[0], batch_size, 0, self.target.name).flatten(1)
        grads = grad_output.reshape(*rows.shape, shape[1])
        if self.padding_idx is not None:
            grads = grads.masked_fill((rows == self.padding_idx).unsqueeze(2), 0.0)
        result = grads.new_zeros((batch_size, *shape))
        self.target.add(result.scatter_add_(1, rows.unsqueeze(2).expand_as(grads), grads))
        return None, None


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
                f"per_sample_gradients: {target.name} must not use {name}, which couples samples"
            )
    if sparse:
        raise ValueError(f"per_sample_gradients: {target.name} must not have sparse gradients")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embedding(collector, target, padding_idx)(input, weight)
