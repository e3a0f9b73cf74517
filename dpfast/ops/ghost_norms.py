"""Norms of per-sample gradients from inner products of positions ("ghost norms").

The squared norm of a sum of outer products needs the products' inner products only (Goodfellow
2015, arXiv:1510.01799; convolutions by Bu et al. 2022, arXiv:2205.10683). Here a convolution's are
taken between positions of the two tensors as they are, not between unfolded patches: the taps
shift the same matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from dpfast import _native

__all__ = ["ghost_bytes", "ghost_square_norms"]

_CHUNK_BYTES = 1 << 20


def ghost_bytes(channels: tuple[int, int], positions: tuple[int, int]) -> int:
    """Memory that one sample takes for a moment."""
    return sum(8 * count * (count + c) for c, count in zip(channels, positions, strict=True))


def ghost_square_norms(
    anchor: torch.Tensor,
    moving: torch.Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """Squared norms of the per-sample gradients of a convolution with one group.

    Inner products and their sums are in float64, and a bound on their rounding errors is added
    (DP_SPEC, floating point): where the terms cancel, float32 falls short of the norm.

    Args:
      anchor: (N, m, *positions): the output's gradient, of a transposed convolution the input.
      moving: (N, n, *spatial): the input, of a transposed convolution the output's gradient.
      kernel: taps along each spatial axis.
      stride: of the convolution, per axis.
      padding: zeros before the first value, per axis.
      dilation: distance between taps, per axis.

    Returns:
      (N,) float64, never below the exact squared norm of the exact gradients; NaN for a sample with
      NaN or Inf. Memory beside them: see ghost_bytes, for one sample, or
      as many as take 1 MiB or what the two tensors take.
    """
    sizes = anchor.shape[2:], moving.shape[2:]
    channels = anchor.shape[1], moving.shape[1]
    each = ghost_bytes(channels, (math.prod(sizes[0]), math.prod(sizes[1])))
    size = anchor.numel() * anchor.element_size() + moving.numel() * moving.element_size()
    chunk = max(1, max(_CHUNK_BYTES, size) // max(each, 1))
    norms = []
    for first in range(0, anchor.shape[0], chunk):
        grams = _gram(anchor[first : first + chunk]), _gram(moving[first : first + chunk])
        native = anchor.device.type == "cpu" and len(kernel) <= 3
        squares = (_native.ghost_norm if native else _by_library)(
            *grams,
            channels=channels,
            anchor_size=sizes[0],
            moving_size=sizes[1],
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        # An anchor value without partners is multiplied by zeros where the gradient is formed.
        finite = grams[0].diagonal(dim1=1, dim2=2).isfinite().all(1)
        norms.append(squares.masked_fill(~finite, math.nan))
    return torch.cat(norms) if norms else anchor.new_zeros(0, dtype=torch.float64)


def _gram(tensor: torch.Tensor) -> torch.Tensor:
    """(N, T, T): inner products over the channels."""
    flat = tensor.detach().flatten(2).double()
    return flat.transpose(1, 2) @ flat


def _by_library(
    anchor_gram: torch.Tensor,
    moving_gram: torch.Tensor,
    *,
    channels: tuple[int, int],
    anchor_size: Sequence[int],
    moving_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """By PyTorch's ops, tap after tap; the native kernel's formulae (csrc/cpu/ghost_norm_body.inc).

    No synchronisation with the device.
    """
    device = anchor_gram.device
    total = magnitude = torch.zeros((), dtype=torch.float64, device=device)
    for tap in itertools.product(*map(range, kernel)):
        place = torch.zeros((), dtype=torch.int64, device=device)
        inside = torch.ones((), dtype=torch.bool, device=device)
        for axis, (t, s, p, d) in enumerate(zip(tap, stride, padding, dilation, strict=True)):
            at = torch.arange(anchor_size[axis], device=device) * s - p + t * d
            shape = [-1 if a == axis else 1 for a in range(len(kernel))]
            inside = inside & ((at >= 0) & (at < moving_size[axis])).reshape(shape)
            at = at.clamp(0, moving_size[axis] - 1).reshape(shape)
            place = place * moving_size[axis] + at
        place, inside = place.flatten(), inside.flatten()
        pairs = moving_gram[:, place][:, :, place] * (inside[:, None] & inside)
        terms = anchor_gram * pairs
        total = total + terms.sum(2).sum(1)
        magnitude = magnitude + terms.diagonal(dim1=1, dim2=2).sqrt().sum(1).square()
    # However an axis is summed, no term takes part in more additions than the axis is long.
    depth = sum(channels) + 8 + 2 * anchor_gram.shape[1] + math.prod(kernel)
    return total.clamp(min=0.0) + 1.01 * 2.0**-53 * depth * magnitude
