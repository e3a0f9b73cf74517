"""The ordinary gradients of a convolution: of its input, and of its weight over the whole batch."""

from __future__ import annotations

import math

import torch

from dpfast.ops.conv_grad_sample import ConvSettings

__all__ = ["conv_grad", "conv_input_grad", "product"]

_LANES = 16  # oneDNN takes so many channels at a time; fewer leave lanes empty


def product(
    first: torch.Tensor,
    second: torch.Tensor,
    shape: torch.Size,
    out: torch.Tensor | None,
    *,
    accumulate: bool,
) -> torch.Tensor:
    """The matrix product (m, k) @ (k, n) in a shape whose first axis is m long; see conv_grad."""
    if out is not None and (not out.is_contiguous() or out.dtype != first.dtype):
        return _put((first @ second).reshape(shape), out, accumulate=accumulate)
    if out is None:
        return (first @ second).reshape(shape)
    if accumulate:
        out.view(shape[0], -1).addmm_(first, second)
    else:
        torch.mm(first, second, out=out.view(shape[0], -1))
    return out


def _put(total: torch.Tensor, out: torch.Tensor | None, *, accumulate: bool) -> torch.Tensor:
    if out is None:
        return total.contiguous()
    return out.add_(total) if accumulate else out.copy_(total)


def conv_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    weight_shape: torch.Size,
    settings: ConvSettings,
    out: torch.Tensor | None = None,
    *,
    accumulate: bool = False,
) -> torch.Tensor:
    """The gradient of the summed loss with respect to a convolution's weight.

    Args:
      x: input (N, C, *spatial), float32 or float64.
      grad_output: (N, K, *positions), likewise.
      weight_shape: of the weight.
      settings: the convolution's.
      out: where it goes; None: a new, contiguous tensor.
      accumulate: add to what `out` holds.
    """
    anchor, moving = (x, grad_output) if settings.transposed else (grad_output, x)
    samples, m = anchor.shape[:2]
    rows = samples * math.prod(anchor.shape[2:])
    if settings.groups == 1 and 8 * rows <= m:
        # So few positions that a library's kernel spends its time, and several times the weight's
        # memory, on turning the weight about. With more it is faster than patches.
        first = anchor.transpose(0, 1).reshape(m, rows)
        patches = _patches(anchor, moving, settings, weight_shape[2:])
        return product(first, patches, weight_shape, out, accumulate=accumulate)
    weight = x.new_empty(()).expand(weight_shape)  # its values are not read
    total = torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, *settings, [False, True, False]
    )[1]
    return _put(total, out, accumulate=accumulate)


def conv_input_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: torch.Tensor, settings: ConvSettings
) -> torch.Tensor:
    """The gradient of the input, shape and dtype of x."""
    stride, padding, dilation, transposed, _, groups = settings
    around = [d * (k - 1) - p for k, d, p in zip(weight.shape[2:], dilation, padding, strict=True)]
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not transposed
        and groups == 1
        and max(weight.shape[:2]) < _LANES
        and all(step == 1 for step in stride)
        and all(amount >= 0 for amount in around)
    ):
        # The same sums as a forward convolution, which oneDNN has a kernel for with few channels:
        # three to seven times as fast as its backward one.
        turned = weight.flip(*range(2, weight.dim())).transpose(0, 1).contiguous()
        ones = [1] * len(stride)
        return torch.convolution(
            grad_output, turned, None, ones, around, dilation, False, [0] * len(stride), 1
        )
    found: torch.Tensor = torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, *settings, [True, False, False]
    )[0]
    return found


def _patches(
    anchor: torch.Tensor, moving: torch.Tensor, settings: ConvSettings, kernel: torch.Size
) -> torch.Tensor:
    """(N * positions, n * taps): what each anchor position is multiplied by."""
    sizes, axes = anchor.shape[2:], anchor.dim() - 2
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
