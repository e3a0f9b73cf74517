"""How a rule takes part in autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["RuleCall", "low_precision", "without_autocast"]


class RuleCall(ABC):
    """One call of a function that takes parameters: its forward and its backward.

    The parameters get their per-sample gradients in `backward` and none from autograd.
    """

    @abstractmethod
    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        """The result, and the tensors that `backward` needs."""

    @abstractmethod
    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of the inputs, as many as `wanted`; of parameters None."""

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """The differentiable result."""
        result: torch.Tensor = _Ruled.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return result


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: RuleCall, *inputs: torch.Tensor | None) -> torch.Tensor:
        result, saved = call.forward(*inputs)
        ctx.save_for_backward(*saved)
        ctx.call = call
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Fetched before, since checkpointing may run the forward pass again here.
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return None, *ctx.call.backward(saved, grad_outputs[0], ctx.needs_input_grad[1:])


def low_precision(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on a device now, None outside of it."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> torch.autocast:
    """The casts are made by the rules; nothing else may cast."""
    return torch.autocast(device.type, enabled=False)
