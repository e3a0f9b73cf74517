"""The base of the rules' autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["low_precision", "quiet_backward", "without_autocast"]


def quiet_backward(
    backward: Callable[..., Any],
) -> Callable[[Any, torch.Tensor], Any]:
    """Run `backward(ctx, saved tensors, grad_output)` unseen by the interception.

    The saved tensors are fetched before: with checkpointing that computes them again, and these
    calls must be seen.
    """

    def run(ctx: Any, grad_output: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return backward(ctx, saved, grad_output)

    return staticmethod(torch.autograd.function.once_differentiable(run))  # type: ignore[return-value]


def low_precision(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on a device now, None outside of it."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> torch.autocast:
    """The casts are made by the rules; nothing else may cast."""
    return torch.autocast(device.type, enabled=False)
