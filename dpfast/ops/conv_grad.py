"""The ordinary gradient of a convolution's weight, over the whole batch, into given memory."""

from __future__ import annotations

import math

import torch

from dpfast.ops.conv_grad_sample import ConvSettings

__all__ = ["add_product", "conv_grad"]


def add_product(
    first: torch.Tensor, second: torch.Tensor, out: torch.Tensor, *, accumulate: bool
) -> None:
    """Write or add the matrix product (m, k) @ (k, n) to `out`, whose first axis is m long."""
    if not out.is_contiguous() or out.dtype != first.dtype:
        product = (first @ second).reshape(out.shape)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.view(first.shape[0], -1).addmm_(first, second)
    else:
        torch.mm(first, second, out=out.view(first.shape[0], -1))


def conv_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    settings: ConvSettings,
    out: torch.Tensor,
    *,
    accumulate: bool,
) -> None:
    """Write or add the gradient of the summed loss with respect to a convolution's weight.

    Args:
      x: input (N, C, *spatial), float32 or float64.
      grad_output: (N, K, *positions), likewise.
      settings: the convolution's.
      out: of the weight's shape.
      accumulate: add to what it holds.
    """
    anchor, moving = (x, grad_output) if settings.transposed else (grad_output, x)
    samples, m = anchor.shape[:2]
    rows = samples * math.prod(anchor.shape[2:])
    if settings.groups == 1 and 8 * rows <= m:
        # So few positions that a library's kernel spends its time, and several times the weight's
        # memory, on turning the weight about. With more it is faster than patches.
        first = anchor.transpose(0, 1).reshape(m, rows)
        add_product(first, _patches(anchor, moving, settings, out), out, accumulate=accumulate)
        return
    weight = x.new_empty(()).expand(out.shape)  # its values are not read
    total = torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, *settings, [False, True, False]
    )[1]
    out.add_(total) if accumulate else out.copy_(total)


def _patches(
    anchor: torch.Tensor, moving: torch.Tensor, settings: ConvSettings, weight: torch.Tensor
) -> torch.Tensor:
    """(N * positions, n * taps): what each anchor position is multiplied by."""
    sizes, kernel, axes = anchor.shape[2:], weight.shape[2:], anchor.dim() - 2
    around = []
    for axis in reversed(range(axes)):
        before = settings.padding[axis]
        reach = (sizes[axis] - 1) * settings.stride[axis]
        reach += (kernel[axis] - 1) * settings.dilation[axis] + 1
        around += [before, max(0, reach - before - moving.shape[2 + axis])]
    padded = torch.nn.functional.pad(moving, around)
    steps = padded.stride()
    windows = padded.as_strided(
        (moving.shape[0], *sizes, moving.shape[1], *kernel),
        (
            steps[0],
            *(step * s for step, s in zip(steps[2:], settings.stride, strict=True)),
            steps[1],
            *(step * d for step, d in zip(steps[2:], settings.dilation, strict=True)),
        ),
        padded.storage_offset(),
    )
    return windows.reshape(moving.shape[0] * math.prod(sizes), -1)
