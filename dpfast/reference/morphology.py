"""Grey-scale morphology: the obvious float64 twin, one offset of the element after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

__all__ = ["Chain", "morphology"]

# A chain's stages (True: a dilation) by operation, with the sign of each chain in the result.
_CHAINS: dict[str, list[tuple[int, list[bool]]]] = {
    "dilation": [(1, [True])],
    "erosion": [(1, [False])],
    "opening": [(1, [False, True])],
    "closing": [(1, [True, False])],
    "gradient": [(1, [True]), (-1, [False])],
    "top_hat": [(1, []), (-1, [False, True])],
    "black_hat": [(1, [True, False]), (-1, [])],
    "opening_closing": [(1, [False, True, True, False])],
    "closing_opening": [(1, [True, False, False, True])],
    "identity": [(1, [])],
}
_NOWHERE = -1


class Chain(NamedTuple):
    """One summand of a result.

    Attributes:
      sign: +1 or -1.
      value: shape of x, float64.
      source: flat index, within its channel, of the element that each value comes from; -1 for
        none. int64, shape of x.
    """

    sign: int
    value: torch.Tensor
    source: torch.Tensor


def morphology(
    x: torch.Tensor,
    operation: str,
    footprint: torch.Tensor,
    *,
    structure: torch.Tensor | None = None,
    origin: Sequence[int] | None = None,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> tuple[torch.Tensor, list[Chain]]:
    """The result (float64) and the chains that it is the signed sum of.

    Args:
      x: (B, C, *spatial).
      operation: a name of dpfast.morphology.OPERATIONS.
      footprint: bool, one axis per spatial axis.
      structure: heights, shape of footprint.
      origin: of the element, from its middle, per axis.
      border: see dpfast.morphology.apply.
      border_value: of the border "constant".
    """
    values = x.double() + 0.0  # one zero
    positions = torch.arange(values[0, 0].numel()).reshape(x.shape[2:]).expand(x.shape)
    heights = torch.zeros(footprint.shape) if structure is None else structure
    shift = [0] * footprint.dim() if origin is None else list(origin)
    chains = []
    for sign, stages in _CHAINS[operation]:
        value, source = values, positions
        for dilate in stages:
            value, source = _stage(
                value, source, dilate, footprint, heights.double(), shift, border, border_value
            )
        chains.append(Chain(sign, value, source))
    total = sum((c.sign * c.value for c in chains[1:]), start=chains[0].sign * chains[0].value)
    return total, chains


def _stage(
    x: torch.Tensor,
    source: torch.Tensor,
    dilate: bool,
    footprint: torch.Tensor,
    heights: torch.Tensor,
    origin: Sequence[int],
    border: str,
    border_value: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    sign = 1.0 if dilate else -1.0
    best = torch.full_like(x, -torch.inf)  # of sign * value
    best_source = torch.full_like(source, _NOWHERE)
    found = torch.zeros_like(x, dtype=torch.bool)
    for position in product(*(range(n) for n in footprint.shape)):
        if not footprint[position]:
            continue
        offset = [p - n // 2 - o for p, n, o in zip(position, footprint.shape, origin, strict=True)]
        if dilate:
            offset = [-o for o in offset]
        value, where, inside = _shifted(x, source, offset, border, border_value)
        value = sign * value + heights[position]
        lower = _rank(where) < _rank(best_source)
        wins = (value > best) | ((value == best) & lower)
        nan = torch.isnan(value) & (~torch.isnan(best) | lower)
        wins = inside & (((wins & ~torch.isnan(best)) | nan) | ~found)
        best = torch.where(wins, value, best)
        best_source = torch.where(wins, where, best_source)
        found |= inside
    return sign * best, best_source


def _rank(source: torch.Tensor) -> torch.Tensor:
    """Lower is preferred; no source is the last."""
    return torch.where(source == _NOWHERE, torch.iinfo(torch.int64).max, source)


def _shifted(
    x: torch.Tensor, source: torch.Tensor, offset: Sequence[int], border: str, border_value: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and sources at an offset from each position, and whether anything is there."""
    outside = torch.zeros(x.shape, dtype=torch.bool)
    for axis, distance in enumerate(offset, start=2):
        n = x.shape[axis]
        at = [_position(i + distance, n, border) for i in range(n)]
        x = x.index_select(axis, torch.tensor([max(i, 0) for i in at]))
        source = source.index_select(axis, torch.tensor([max(i, 0) for i in at]))
        shape = [n if a == axis else 1 for a in range(x.dim())]
        outside = outside | torch.tensor([i < 0 for i in at]).reshape(shape)
    x = torch.where(outside, border_value, x)
    source = torch.where(outside, _NOWHERE, source)
    return x, source, ~outside if border == "geodesic" else torch.ones_like(outside)


def _position(i: int, n: int, border: str) -> int:
    """Where position i of the extended axis lies, -1 for outside."""
    if 0 <= i < n:
        return i
    if border == "nearest":
        return 0 if i < 0 else n - 1
    if border == "wrap":
        return i % n
    if border == "reflect":
        i %= 2 * n
        return i if i < n else 2 * n - 1 - i
    if border == "mirror":
        if n == 1:
            return 0
        i %= 2 * n - 2
        return i if i < n else 2 * n - 2 - i
    return -1
