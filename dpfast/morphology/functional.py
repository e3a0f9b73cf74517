"""Differentiable grey-scale morphology in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dpfast import _validate
from dpfast.morphology.elements import Element, PerChannel, freeze, make_element, whole
from dpfast.ops._morphology_program import BORDERS, Plan, Program, Term, encode
from dpfast.ops.morphology import morphology

__all__ = [
    "OPERATIONS",
    "apply",
    "black_hat",
    "check_input",
    "closing",
    "dilation",
    "erosion",
    "gradient",
    "opening",
    "top_hat",
]

Size = int | tuple[int, ...] | list[int] | None
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _chain(*dilate: bool) -> Callable[[Element], Term]:
    return lambda element: Term(1, tuple(element.stage(dilate=each) for each in dilate))


def _minus(term: Term) -> Term:
    return Term(-term.sign, term.stages)


_dilate, _erode = _chain(True), _chain(False)
_open, _close = _chain(False, True), _chain(True, False)

# Name: the terms whose sum it is, for an element.
OPERATIONS: dict[str, Callable[[Element], Program]] = {
    "dilation": lambda e: (_dilate(e),),
    "erosion": lambda e: (_erode(e),),
    "opening": lambda e: (_open(e),),
    "closing": lambda e: (_close(e),),
    "gradient": lambda e: (_dilate(e), _minus(_erode(e))),
    "top_hat": lambda e: (Term(1), _minus(_open(e))),
    "black_hat": lambda e: (_close(e), Term(-1)),
    "opening_closing": lambda e: (_chain(False, True, True, False)(e),),
    "closing_opening": lambda e: (_chain(True, False, False, True)(e),),
    "identity": lambda e: (Term(1),),
}


def _per_channel(function: str, name: str, value: Any, channels: int) -> tuple[Any, ...]:
    if not isinstance(value, PerChannel):
        return (value,) * channels
    if len(value.values) != channels:
        raise ValueError(
            f"{function}: {name} must have {channels} values, one per channel, got "
            f"{len(value.values)}"
        )
    return value.values


def check_input(function: str, x: Any) -> None:
    """Refuse what is no batch of images with channels."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: x must be float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{function}: x must have shape (B, C, H, W) or (B, C, D, H, W), got {tuple(x.shape)}"
        )
    if math.prod(x.shape[2:]) >= 2**31 - 1:
        raise ValueError(
            f"{function}: a channel must have less than 2**31 - 1 elements, got {tuple(x.shape)}"
        )


def _run(
    function: str,
    x: torch.Tensor,
    operation: str | PerChannel[str],
    size: Any,
    footprint: Any,
    structure: Any,
    origin: Any,
    border: str,
    border_value: float,
) -> torch.Tensor:
    check_input(function, x)
    border = _validate.choice(function, "border", border, tuple(BORDERS))
    if isinstance(border_value, bool) or not isinstance(border_value, (int, float)):
        raise TypeError(
            f"{function}: border_value must be a number, got {type(border_value).__name__}"
        )
    if math.isnan(border_value):
        raise ValueError(f"{function}: border_value must not be NaN")
    if border_value != 0.0 and border != "constant":
        raise ValueError(f"{function}: border_value has no effect with border {border!r}")
    columns = [
        _per_channel(function, name, value, x.shape[1])
        for name, value in (
            ("operation", operation),
            ("size", size),
            ("footprint", footprint),
            ("structure", structure),
            ("origin", origin),
        )
    ]
    # Here: to a cache, 3.0 and True are 3 and 1.
    for each in columns[1]:
        if each is not None:
            whole(function, "size", each)
    for each in columns[4]:
        whole(function, "origin", each)
    if x.numel() == 0:
        return x.clone()
    frozen = tuple(tuple(freeze(function, value) for value in column) for column in columns)
    return morphology(x, _plan(function, frozen, x.dim() - 2, border, float(border_value)))


# torch.compile takes the result for a constant: it follows from numbers and names alone.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan(
    function: str, columns: tuple[Any, ...], axes: int, border: str, border_value: float
) -> Plan:
    return _cached_plan(function, columns, axes, border, border_value)


@lru_cache(maxsize=256)
def _cached_plan(
    function: str, columns: tuple[Any, ...], axes: int, border: str, border_value: float
) -> Plan:
    """What the op is told; `columns` holds each argument for all channels, as plain values."""
    programs = []
    for operation, size, footprint, structure, origin in zip(*columns, strict=True):
        name = _validate.choice(function, "operation", operation, tuple(OPERATIONS))
        element = make_element(function, size, footprint, structure, origin, axes)
        programs.append(OPERATIONS[name](element))
    return encode(tuple(programs), border, border_value)


def apply(
    x: torch.Tensor,
    operation: str | PerChannel[str],
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """A morphological operation by name, the same for all channels or another one for each.

    One native call, whatever the number of channels and stages. A value of the result is a copy of
    one of the input's (for an additive element, of one plus its height), and the gradient goes
    there: among equal values to the element with the lowest index. Where the border's constant
    wins there is no gradient. Differentiable once, in x, by
    autograd (not by the transforms of torch.func).

    Args:
      x: (B, C, H, W) or (B, C, D, H, W); float32, float64, bfloat16 or float16; CPU or CUDA.
        -0 and +0 are equal. A NaN wins every comparison, so that it spreads over the element;
        infinities are values like others.
      operation: a name of OPERATIONS, or `PerChannel` of them.
      size: positions of a flat box, >= 1: one number, or one per axis (3 where nothing else is
        given). Its cost hardly depends on the size.
      footprint: array whose positions other than 0 are a flat element; see `ellipse`, `cross`.
      structure: array of finite heights, added in dilations and subtracted in erosions. With
        `footprint`, of the same shape, only where that is not 0.
      origin: the element's position over the output, from the middle one (shape // 2), one number
        or one per axis. A dilation takes the element reflected, as SciPy does, so that openings
        and closings do not shift.
      border: what lies outside: "geodesic" nothing (an output whose element lies outside wholly is
        -inf in a dilation, +inf in an erosion, without a gradient); "constant" border_value;
        "reflect", "mirror", "nearest" and "wrap" as in scipy.ndimage. Every stage of an operation
        has the border anew.
      border_value: of "constant".

    size, footprint, structure and origin may be `PerChannel` too.

    Returns:
      Shape and dtype of x, contiguous. Sums of two results (gradient, top_hat, black_hat) and of
      heights are rounded once.

    Raises:
      TypeError: a wrong type or dtype. ValueError: a wrong shape, size, name or value.
      RuntimeError: on CUDA without its kernels.

    References:
      Serra 1982, Image Analysis and Mathematical Morphology; borders as scipy.ndimage.grey_dilation
      has them, "geodesic" as kornia.morphology.
    """
    name = "apply"
    return _run(name, x, operation, size, footprint, structure, origin, border, border_value)


def dilation(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """The largest value within the reflected element; see `apply` for the arguments."""
    name = "dilation"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def erosion(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """The smallest value within the element; see `apply` for the arguments."""
    name = "erosion"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def opening(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """An erosion, then a dilation: takes away what the element does not fit in; see `apply`."""
    name = "opening"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def closing(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """A dilation, then an erosion: fills what the element does not fit in; see `apply`."""
    name = "closing"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def gradient(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """The dilation minus the erosion: high along boundaries; see `apply`."""
    name = "gradient"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def top_hat(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """X minus its opening: what the opening took away; see `apply`."""
    name = "top_hat"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)


def black_hat(
    x: torch.Tensor,
    size: Size | PerChannel[Size] = None,
    *,
    footprint: Any = None,
    structure: Any = None,
    origin: Any = 0,
    border: str = "geodesic",
    border_value: float = 0.0,
) -> torch.Tensor:
    """The closing minus x: what the closing filled; see `apply`."""
    name = "black_hat"
    return _run(name, x, name, size, footprint, structure, origin, border, border_value)
