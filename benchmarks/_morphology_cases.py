"""The rows of the morphology benchmark and what every contender works on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from dpfast.morphology import ellipse

__all__ = ["Case", "MemoryCase", "Work", "cases", "memory_cases", "reference"]

_SEED = 20240711
_STEP = 2.0**-23  # N <= 2^25 multiples of it around 0 are distinct in float32
_LARGEST_GRAD = 8

_IMAGES = (8, 9, 224, 224)
_MANY_IMAGES = (64, 9, 224, 224)  # larger than an L2
_VOLUMES = (2, 4, 96, 96, 96)
_QUICK_IMAGES = (2, 3, 24, 20)
_QUICK_VOLUMES = (1, 2, 12, 10, 14)
_SIZES = (3, 5, 7, 9, 15, 21, 31)
_VOLUME_SIZES = (3, 7, 15, 31)
_CHANNEL_SIZES = (3, 5, 7, 9, 15, 3, 5, 7, 9)


@dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
      shape: of the input, (B, C, *spatial).
      sizes: of the element, odd: one for all channels, or one for each.
      operation: "closing" or "dilation".
      element: "box" or "ellipse".
      dtype: "float32" or "bfloat16".
      one_thread: on the CPU, rather than with all threads.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    operation: str = "closing"
    element: str = "box"
    dtype: str = "float32"
    one_thread: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """The case that was saved: JSON turns tuples into lists."""
        tuples = {name: tuple(fields[name]) for name in ("shape", "sizes")}
        return cls(**{**fields, **tuples})

    @property
    def input(self) -> str:
        """Shape and dtype in words."""
        return "x".join(map(str, self.shape)) + (
            "" if self.dtype == "float32" else f" {self.dtype}"
        )

    @property
    def operation_in_words(self) -> str:
        """Operation and element, without its size."""
        return self.operation if self.element == "box" else f"{self.operation}, {self.element}"

    @property
    def size_in_words(self) -> str:
        """The element's size."""
        if len(self.sizes) == 1:
            return str(self.sizes[0])
        return f"{min(self.sizes)} to {max(self.sizes)}, by channel"

    @property
    def label(self) -> str:
        """The row in words."""
        threads = ", one thread" if self.one_thread else ""
        return f"{self.operation_in_words} {self.size_in_words}, {self.input}{threads}"

    @property
    def axes(self) -> int:
        """Spatial axes."""
        return len(self.shape) - 2

    @property
    def stages(self) -> tuple[bool, ...]:
        """Whether each stage is a dilation."""
        return (True, False) if self.operation == "closing" else (True,)

    @property
    def numel(self) -> int:
        """Elements of the input."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the input; the floor of a forward pass is twice that."""
        return self.numel * (4 if self.dtype == "float32" else 2)

    def size_of(self, channel: int) -> int:
        """The element's size in a channel."""
        return self.sizes[channel % len(self.sizes)]

    @property
    def comparisons(self) -> float:
        """Of a method that looks at each position of a box."""
        channels = self.shape[1]
        positions = sum(float(self.size_of(c)) ** self.axes for c in range(channels)) / channels
        return self.numel * positions * len(self.stages)


@dataclass(frozen=True)
class MemoryCase:
    """A contender's peak memory over a closing's forward and backward pass."""

    contender: str
    case: Case


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows for a kind of device."""
    if quick:
        return [Case(_QUICK_IMAGES, (3,)), Case(_QUICK_VOLUMES, (3,))]
    rows = [Case(_IMAGES, (size,)) for size in _SIZES]
    if device_type == "cpu":
        rows += [Case(_IMAGES, (size,), one_thread=True) for size in _SIZES]
    else:
        rows += [Case(_MANY_IMAGES, (size,)) for size in _SIZES]
    rows += [Case(_VOLUMES, (size,)) for size in _VOLUME_SIZES]
    return [
        *rows,
        Case(_IMAGES, (3,), operation="dilation"),
        Case(_IMAGES, (15,), element="ellipse"),
        Case(_IMAGES, _CHANNEL_SIZES),
        Case(_IMAGES, (7,), dtype="bfloat16"),
    ]


def memory_cases(*, quick: bool) -> list[MemoryCase]:
    """The rows on memory; the smallest size of a shape comes first."""
    if quick:
        return [MemoryCase("dpfast", Case(_QUICK_IMAGES, (3,)))]
    ours = [Case(_IMAGES, (size,)) for size in (3, 15, 31)]
    ours += [Case(_VOLUMES, (size,)) for size in (3, 15)]
    return [*(MemoryCase("dpfast", case) for case in ours), MemoryCase("kornia", ours[0])]


class Work:
    """A row's input and the gradient that comes in, both on the device.

    In float32 all values are distinct, so that a result tells where each of its values comes from
    and no contender has ties to break. The incoming gradients are small whole numbers, whose sums
    are exact in any order.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self.case, self.device = case, device
        self.dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
        self._order = torch.randperm(case.numel, generator=generator)
        x = (self._order - case.numel // 2) * _STEP
        self.x = x.view(case.shape).to(device, self.dtype)
        grad = torch.randint(-_LARGEST_GRAD, _LARGEST_GRAD + 1, case.shape, generator=generator)
        self.grad = grad.to(device, self.dtype)

    @cached_property
    def footprint(self) -> torch.Tensor | None:
        """The element where it is no box."""
        if self.case.element == "box":
            return None
        return ellipse(self.case.sizes[0], spatial_dims=self.case.axes)

    def gradient(self, result: torch.Tensor) -> torch.Tensor:
        """What the gradient of a result must be, which holds the input's distinct values."""
        source = torch.empty_like(self._order)
        source[self._order] = torch.arange(self.case.numel)
        rank = (result.cpu().double() / _STEP).round().long().flatten() + self.case.numel // 2
        total = torch.zeros(self.case.numel, dtype=torch.float64)
        total.index_add_(0, source[rank], self.grad.cpu().double().flatten())
        return total.view(self.case.shape).to(self.device, self.dtype)


def _largest(x: torch.Tensor, size: int, footprint: torch.Tensor | None) -> torch.Tensor:
    """The maximum over an element; nothing lies outside."""
    axes = range(2, x.dim())
    padded = F.pad(x, [size // 2] * 2 * len(axes), value=-math.inf)
    if footprint is None:
        for axis in axes:
            padded = padded.unfold(axis, size, 1).amax(-1)
        return padded
    out = torch.full_like(x, -math.inf)
    for position in footprint.nonzero().tolist():
        view = padded
        for axis, start in zip(axes, position, strict=True):
            view = view.narrow(axis, start, x.shape[axis])
        out = torch.maximum(out, view)
    return out


def reference(work: Work) -> torch.Tensor:
    """The result from the definition."""
    found = []
    for channel in range(work.case.shape[1]):
        part = work.x[:, channel : channel + 1]
        size = work.case.size_of(channel)
        for dilate in work.case.stages:
            sign = 1 if dilate else -1
            part = sign * _largest(sign * part, size, work.footprint)
        found.append(part)
    return torch.cat(found, dim=1)
