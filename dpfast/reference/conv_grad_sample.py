"""Per-sample weight gradients of convolutions: the obvious float64 twin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

__all__ = ["conv_weight_grad_sample"]


def conv_weight_grad_sample(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> torch.Tensor:
    """Sum over positions of what a tap multiplies, tap after tap, in float64.

    A convolution's output position p sees the input at p * stride - padding + tap * dilation; in a
    transposed one the input position p reaches the output there.

    Returns:
      (N, *weight_shape), float64.
    """
    anchor, moving = (x, grad_output) if transposed else (grad_output, x)
    anchor, moving = anchor.double(), moving.double()
    samples, positions = anchor.shape[0], anchor.shape[2:]
    kernel = weight_shape[2:]
    # Zeros around, so that every tap of every position lies inside.
    reach = [
        (o - 1) * s + (k - 1) * d + 1
        for o, s, k, d in zip(positions, stride, kernel, dilation, strict=True)
    ]
    around = [
        amount
        for p, r, size in reversed(list(zip(padding, reach, moving.shape[2:], strict=True)))
        for amount in (p, max(0, r - p - size))
    ]
    moving = torch.nn.functional.pad(moving, around)
    anchor = anchor.reshape(samples, groups, anchor.shape[1] // groups, *positions)
    moving = moving.reshape(samples, groups, moving.shape[1] // groups, *moving.shape[2:])
    grads = torch.zeros(samples, groups, anchor.shape[2], moving.shape[2], *kernel).double()
    for tap in itertools.product(*map(range, kernel)):
        seen = moving
        for axis, (t, d, s, o) in enumerate(zip(tap, dilation, stride, positions, strict=True)):
            seen = seen.narrow(axis + 3, t * d, (o - 1) * s + 1 if o else 0)
            seen = seen[(slice(None),) * (axis + 3) + (slice(None, None, s),)]
        product = anchor.flatten(3) @ seen.flatten(3).transpose(2, 3)
        grads[(slice(None),) * 4 + tap] = product
    return grads.reshape(samples, *weight_shape)
