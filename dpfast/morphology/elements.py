"""Structuring elements: boxes, arbitrary masks and additive ones, for all channels or one each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Generic, TypeVar

import torch

from dpfast.ops._morphology_program import Stage

__all__ = ["Element", "PerChannel", "cross", "ellipse", "freeze", "make_element", "whole"]

T = TypeVar("T")
MAX_SIZE = 2**15  # per axis; far beyond any image, far below an overflow


class PerChannel(Generic[T]):
    """One value for each channel, in their order: `closing(x, PerChannel(3, (5, 3), 1))`.

    Args:
      *values: as many as there are channels.
    """

    def __init__(self, *values: T) -> None:
        if not values:
            raise ValueError("PerChannel: there must be one value for each channel, got none")
        self.values = values

    def __repr__(self) -> str:
        return f"PerChannel({', '.join(map(repr, self.values))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerChannel) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)


@dataclass(frozen=True)
class Element:
    """A structuring element.

    Attributes:
      shape: positions along each spatial axis.
      origin: which position lies on the output, from the middle one (shape // 2), per axis.
      mask: which positions belong to it, in the order of a flattened array; None: all.
      heights: what is added there, likewise; None: nothing (a flat element).
    """

    shape: tuple[int, ...]
    origin: tuple[int, ...]
    mask: tuple[bool, ...] | None = None
    heights: tuple[float, ...] | None = None

    def stage(self, *, dilate: bool) -> Stage:
        """The dilation or erosion with it. A dilation reflects it, as its adjoint must."""
        low = [-(n // 2) - o for n, o in zip(self.shape, self.origin, strict=True)]
        high = [first + n - 1 for first, n in zip(low, self.shape, strict=True)]
        if dilate:
            window = tuple(-x for x in high), tuple(-x for x in low)
        else:
            window = tuple(low), tuple(high)
        flat = self.heights is None
        if flat and (self.mask is None or all(self.mask)):
            return Stage(dilate, *window)
        positions = list(product(*(range(n) for n in self.shape)))
        mask = self.mask or (True,) * len(positions)
        sign = -1 if dilate else 1
        offsets, heights = [], []
        for position, inside, height in zip(
            positions, mask, self.heights or (0.0,) * len(positions), strict=True
        ):
            if inside:
                pairs = zip(position, low, strict=True)
                offsets.append(tuple(sign * (p + first) for p, first in pairs))
                heights.append(height)
        return Stage(dilate, *window, tuple(offsets), None if flat else tuple(heights))


def ellipse(size: int | Sequence[int], *, spatial_dims: int = 2) -> torch.Tensor:
    """The positions whose centres lie in the ellipse (or ellipsoid) that fills a box.

    Args:
      size: of the box, one number or one per axis.
      spatial_dims: axes, where size is one number.

    Returns:
      bool, one axis per spatial axis: a `footprint`.
    """
    return _shape("ellipse", size, spatial_dims, lambda x: sum(v * v for v in x) <= 1.0)


def cross(size: int | Sequence[int], *, spatial_dims: int = 2) -> torch.Tensor:
    """The middle lines of a box along each axis; both of them where the size is even.

    Args:
      size: of the box, one number or one per axis.
      spatial_dims: axes, where size is one number.

    Returns:
      bool, one axis per spatial axis: a `footprint`.
    """
    sizes = _sizes("cross", size, spatial_dims)
    middles = [1.0 / n if n % 2 == 0 else 0.0 for n in sizes]

    def on_a_line(x: Sequence[float]) -> bool:
        off = sum(abs(v) > m + 1e-9 for v, m in zip(x, middles, strict=True))
        return off <= 1

    return _shape("cross", sizes, spatial_dims, on_a_line)


def _shape(
    function: str,
    size: int | Sequence[int],
    spatial_dims: int,
    inside: Callable[[tuple[float, ...]], bool],
) -> torch.Tensor:
    """Positions by their coordinates, from -1 to 1 at the outer sides of the box."""
    sizes = _sizes(function, size, spatial_dims)
    centres = [[(2 * i + 1) / n - 1.0 for i in range(n)] for n in sizes]
    found = [inside(x) for x in product(*centres)]
    return torch.tensor(found).reshape(sizes)


def _sizes(function: str, size: Any, spatial_dims: int) -> tuple[int, ...]:
    if spatial_dims not in (2, 3):
        raise ValueError(f"{function}: spatial_dims must be 2 or 3, got {spatial_dims!r}")
    whole(function, "size", size)
    values = tuple(size) if isinstance(size, (tuple, list)) else (size,) * spatial_dims
    for value in values:
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{function}: size must be >= 1 and <= {MAX_SIZE}, got {size!r}")
    if len(values) not in (2, 3):
        raise ValueError(f"{function}: size must have 2 or 3 axes, got {size!r}")
    return values


def make_element(
    function: str, size: Any, footprint: Any, structure: Any, origin: Any, spatial_dims: int
) -> Element:
    """One channel's element from the arguments of a public function.

    Raises:
      TypeError, ValueError: they make no element of so many axes.
    """
    mask = heights = None
    shape: tuple[int, ...] = ()
    if structure is not None:
        heights, shape = _heights(function, structure)
    if footprint is not None:
        heights_shape = shape
        mask, shape = _mask(function, footprint)
        if structure is not None and shape != heights_shape:
            raise ValueError(
                f"{function}: footprint must have the shape of structure, {heights_shape}, got "
                f"{shape}"
            )
    if structure is None and footprint is None:
        shape = _sizes(function, 3 if size is None else size, spatial_dims)
    elif size is not None:
        raise ValueError(f"{function}: size must not be given with footprint or structure")
    if len(shape) != spatial_dims:
        raise ValueError(
            f"{function}: the element must have {spatial_dims} axes like x, got {len(shape)}"
        )
    origins = tuple(origin) if isinstance(origin, (tuple, list)) else (origin,) * spatial_dims
    for value, n in zip(origins, shape, strict=False):
        if not -(n // 2) <= value <= (n - 1) // 2:
            raise ValueError(
                f"{function}: origin must be >= {-(n // 2)} and <= {(n - 1) // 2} for a size of "
                f"{n}, got {origin!r}"
            )
    if len(origins) != spatial_dims:
        raise ValueError(f"{function}: origin must have {spatial_dims} axes, got {origin!r}")
    return Element(shape, origins, mask, heights)


def whole(function: str, name: str, value: Any) -> None:
    """Raises TypeError unless value is an int or a sequence of them."""
    for each in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"{function}: {name} must be whole numbers, got {value!r}")


def freeze(function: str, value: Any) -> Any:
    """An array or a nested sequence as nested tuples, others as they are."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise ValueError(f"{function}: the element must not require a gradient; detach it")
        return freeze(function, value.tolist())
    if hasattr(value, "tolist"):  # NumPy
        return freeze(function, value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(function, each) for each in value)
    return value


def _array(function: str, name: str, value: Any) -> torch.Tensor:
    try:
        tensor = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{function}: {name} must be an array, got {value!r}") from error
    if tensor.numel() == 0 or max(tensor.shape, default=0) > MAX_SIZE:
        raise ValueError(f"{function}: {name} must not be empty, got shape {tuple(tensor.shape)}")
    return tensor


def _mask(function: str, footprint: Any) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    tensor = _array(function, "footprint", footprint) != 0
    if not bool(tensor.any()):
        raise ValueError(f"{function}: footprint must have a position that is not 0")
    return tuple(tensor.flatten().tolist()), tuple(tensor.shape)


def _heights(function: str, structure: Any) -> tuple[tuple[float, ...], tuple[int, ...]]:
    tensor = _array(function, "structure", structure)
    values = tensor.flatten().tolist()
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{function}: structure must be finite; leave positions out by footprint")
    return tuple(values), tuple(tensor.shape)
