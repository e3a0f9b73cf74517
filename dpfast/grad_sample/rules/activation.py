"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpfast import _native
from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import RuleCall
from dpfast.grad_sample._samples import fold

__all__ = ["prelu"]


@dataclass(frozen=True)
class _PReLU(RuleCall):
    collector: Collector
    target: Target

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        x, weight = inputs
        return torch.prelu(x, weight.to(x.dtype)), (x, weight)

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        x, weight = saved
        if x.device.type == "cpu" and x.dtype == grad_output.dtype == torch.float32:
            grad_x, sums = _native.prelu_grad(
                x.contiguous(), grad_output.contiguous(), weight.float().contiguous()
            )
            self._add(sums.sum(1, keepdim=True) if weight.numel() == 1 else sums)
            return grad_x, None
        slopes = weight.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))
        grad_x, terms = torch.ops.aten._prelu_kernel_backward(grad_output, x, slopes)
        if weight.numel() == 1:
            sums = terms.flatten(1).sum(1, keepdim=True)
        else:
            sums = terms.flatten(2).sum(2) if x.dim() > 2 else terms
        self._add(sums)
        return grad_x, None

    def _add(self, sums: torch.Tensor) -> None:
        sums = fold(sums, self.collector.batch_size, self.target.name)
        self.target.add(sums.reshape(-1, *self.target.tensor.shape))


def prelu(collector: Collector, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.prelu."""
    target = collector.target_of(weight)
    assert target is not None
    if input.dim() < 2:
        raise ValueError(
            f"per_sample_gradients: {target.name} needs an input with a sample axis, (B, C, ...), "
            f"got shape {tuple(input.shape)}"
        )
    return _PReLU(collector, target)(input, weight)
