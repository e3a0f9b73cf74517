"""`DPMorph`: morphology between a network's output and a per-sample loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from dpfast import _validate
from dpfast.morphology.elements import MAX_SIZE, Element, cross, ellipse, make_element
from dpfast.morphology.functional import OPERATIONS, check_input
from dpfast.ops._morphology_program import BORDERS, Plan, encode
from dpfast.ops.morphology import morphology

__all__ = [
    "OPERATION_NAMES",
    "DPMorph",
    "Refinement",
    "check_operation",
    "check_size",
    "nearest_odd",
]

_NAME = "DPMorph"
_SHORT = {"open": "opening", "close": "closing", "both": "opening_closing"}
# What an operation may be called.
OPERATION_NAMES = (*_SHORT, *OPERATIONS)
_FOOTPRINTS = {"ellipse": ellipse, "cross": cross}
FOOTPRINTS = ("box", *_FOOTPRINTS)
# No "constant": a score has no value that would be right outside the image.
_BORDERS = tuple(name for name in BORDERS if name != "constant")

Size = int | tuple[int, ...]
# What is done to one channel: the operation, by its long name, and the size.
Refinement = tuple[str, Size]
_UNTOUCHED: Refinement = ("identity", 1)


class DPMorph(nn.Module):
    """Opens or closes each class's scores before the loss sees them; at no privacy cost.

        morph = dpfast.DPMorph("both", size=3)
        loss = criterion(morph(model(images)), labels)  # (B,): dpfast.per_sample_loss(criterion)

    On logits, an operation moves a class's score at a pixel to the largest or smallest one around
    it, and softmax then weighs the classes against one another; a pixel's probabilities still add
    up to 1. On probabilities (after a softmax of one's own) each class's map is changed by itself,
    and they no longer add up to 1: that suits Dice, not cross-entropy. For one channel, or for a
    sigmoid on each, it makes no difference, as increasing functions change places with flat
    operations.

    Args:
      operation: "open", "close", "both" (an opening, then a closing of its result), or any name of
        `OPERATIONS`; for every channel that `per_class` does not name.
      size: of the element in pixels, one number or one per spatial axis.
      per_class: other operations and sizes. A mapping from channels to (operation, size), or None
        for a channel that is left as it is; or a sequence of them, one for each channel.
      background: the channel that is left as it is unless per_class names it. What an opening
        takes from a class falls to the background by itself; an opening of the background would
        fill small structures in. A single channel is a foreground. None: there is no background;
        every channel is treated alike, as in the code published with the paper.
      footprint: "box", "ellipse" or "cross", filling the size.
      border: "geodesic", "reflect", "mirror", "nearest" or "wrap", see `apply`.

    Raises:
      TypeError, ValueError: a bad setting; in the forward pass, scores that it does not fit.

    Guarantees:
      Row b of the result depends on row b of the input alone. Under DP-SGD a sample's gradient is
      clipped whatever its loss is (Abadi et al. 2016, arXiv:1607.00133), so with a fixed DPMorph in
      a per-sample loss, neither sensitivity nor epsilon changes. Fixed means that operations and
      sizes do not come from private data: published anatomy (`from_anatomy`) is free, `adapt`
      accounts for what it measures.

    References:
      DP-Morph, AISec 2025, pp. 264-275; per class: arXiv:2606.21763.
    """

    def __init__(
        self,
        operation: str = "close",
        size: int | Sequence[int] = 3,
        per_class: Mapping[int, Any] | Sequence[Any] | None = None,
        *,
        background: int | None = 0,
        footprint: str = "box",
        border: str = "geodesic",
    ) -> None:
        super().__init__()
        self.operation = check_operation(_NAME, operation)
        self.size = check_size(_NAME, "size", size)
        self.num_classes, self.per_class = _per_class(per_class)
        self.background = None if background is None else _channel("background", background)
        self.footprint = _validate.choice(_NAME, "footprint", footprint, FOOTPRINTS)
        self.border = _validate.choice(_NAME, "border", border, _BORDERS)

    @classmethod
    def from_anatomy(
        cls,
        thickness: Mapping[int, float],
        *,
        spacing: float | Sequence[float] = 1.0,
        kappa: float = 0.5,
        operation: str = "both",
        background: int | None = 0,
        footprint: str = "box",
        border: str = "geodesic",
    ) -> DPMorph:
        """Sizes from published thicknesses of what is segmented, at no privacy cost.

        Args:
          thickness: from a class to its thickness in millimetres (or pixels, with spacing 1), from
            the literature or an atlas, never from the patients that are protected. Classes that it
            does not name are left as they are.
          spacing: millimetres per pixel, one number or one per spatial axis.
          kappa: size over thickness, 0 < kappa <= 1: an opening wider than a class erases it.
          operation: for every class that thickness names.
          background: as in `DPMorph`, as are the next two.
          footprint: of all elements.
          border: of the image.

        Returns:
          A DPMorph whose sizes are the odd numbers nearest to kappa * thickness / spacing.

        Raises:
          TypeError, ValueError: a bad setting, or a size beyond any image.
        """
        name = "DPMorph.from_anatomy"
        if not isinstance(thickness, Mapping):
            raise TypeError(f"{name}: thickness must be a mapping, got {type(thickness).__name__}")
        if not thickness:
            raise ValueError(f"{name}: thickness must name a class, got none")
        kappa = _validate.number(name, "kappa", kappa, minimum=0.0, maximum=1.0, exclusive=True)
        several = isinstance(spacing, Sequence)
        axes: Sequence[Any] = spacing if isinstance(spacing, Sequence) else (spacing,)
        if several and len(axes) not in (2, 3):
            raise ValueError(f"{name}: spacing must have 2 or 3 axes, got {len(axes)}")
        pixels = [
            _validate.number(name, "spacing", each, minimum=0.0, maximum=1e6, exclusive=True)
            for each in axes
        ]
        per_class: dict[int, tuple[str, Size]] = {}
        for channel, value in thickness.items():
            if channel == background:
                raise ValueError(f"{name}: thickness must not name the background, got {channel}")
            length = _validate.number(
                name, f"thickness[{channel!r}]", value, minimum=0.0, maximum=1e6, exclusive=True
            )
            ratios = [kappa * length / pixel for pixel in pixels]
            if max(ratios) > MAX_SIZE - 1:
                raise ValueError(
                    f"{name}: thickness[{channel!r}] must be less than {MAX_SIZE} pixels, got "
                    f"{length:g} with spacing {spacing}"
                )
            sizes = tuple(nearest_odd(ratio) for ratio in ratios)
            per_class[channel] = (operation, sizes if several else sizes[0])
        return cls(
            "identity", 1, per_class, background=background, footprint=footprint, border=border
        )

    def forward(self, scores: Any) -> Any:
        """The scores after the operations.

        Args:
          scores: (B, C, H, W) or (B, C, D, H, W); or a list or tuple of them (deep supervision),
            the finest first. At a coarser one the sizes are scaled to its resolution, to the
            nearest odd number, so that the element covers the same part of the image. Levels that
            MONAI's DynUNet stacks along axis 1 are to be taken apart first: `torch.unbind(x, 1)`.

        Returns:
          The same shapes and dtypes, as a tensor, list or tuple like scores.
        """
        if not isinstance(scores, (list, tuple)):
            return self._one(scores, None)
        if not scores:
            raise ValueError(f"{_NAME}: scores must hold a tensor, got none")
        first = scores[0].shape[2:] if isinstance(scores[0], torch.Tensor) else None
        results = [self._one(each, first) for each in scores]
        return results if isinstance(scores, list) else tuple(results)

    def refinements(self, num_channels: int) -> tuple[Refinement, ...]:
        """What is done to each of so many channels.

        Raises:
          ValueError: per_class names or has another number of channels.
        """
        highest = max(self.per_class, default=0)
        if highest >= num_channels or self.num_classes not in (None, num_channels):
            raise ValueError(
                f"{_NAME}: per_class must fit scores of {num_channels} channels, got "
                f"{self.num_classes or highest + 1}"
            )
        untouched = {self.background} if num_channels > 1 else set()
        default = (self.operation, self.size)
        return tuple(
            self.per_class.get(channel, _UNTOUCHED if channel in untouched else default)
            for channel in range(num_channels)
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.operation!r}, size={self.size}, per_class={self.per_class}, "
            f"background={self.background}, footprint={self.footprint!r}, border={self.border!r}"
        )

    def _one(self, x: Any, finest: Sequence[int] | None) -> torch.Tensor:
        check_input(_NAME, x)
        assert isinstance(x, torch.Tensor)
        refinements = self.refinements(x.shape[1])
        axes = x.dim() - 2
        spatial = tuple(x.shape[2:])
        if finest is not None and tuple(finest) != spatial:
            if len(finest) != axes:
                raise ValueError(f"{_NAME}: scores must all have {len(finest)} spatial axes")
            refinements = tuple(
                (operation, _scaled(size, spatial, tuple(finest)))
                for operation, size in refinements
            )
        if x.numel() == 0:
            return x.clone()
        return morphology(x, _plan(refinements, self.footprint, self.border, axes))


def nearest_odd(value: float) -> int:
    """The odd number >= 1 nearest to a value; of two, the larger."""
    return 2 * max(math.floor(value / 2.0), 0) + 1


def check_operation(function: str, value: Any) -> str:
    """The long name of an operation."""
    name = _validate.choice(function, "operation", value, OPERATION_NAMES)
    return _SHORT.get(name, name)


def check_size(function: str, name: str, value: Any) -> Size:
    """A size, one number or one per axis."""
    if isinstance(value, int):
        make_element(function, value, None, None, 0, 2)
        return value
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{function}: {name} must be a whole number or one per axis, got {type(value).__name__}"
        )
    make_element(function, tuple(value), None, None, 0, 3 if len(value) == 3 else 2)
    return tuple(value)


def _channel(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_NAME}: {name} must be a channel's number, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{_NAME}: {name} must be >= 0, got {value}")
    return value


def _per_class(given: Any) -> tuple[int | None, dict[int, Refinement]]:
    """How many channels a sequence is for, and what is done to each channel that is named."""
    if given is None:
        return None, {}
    if isinstance(given, Mapping):
        count, pairs = None, list(given.items())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if not given:
            raise ValueError(f"{_NAME}: per_class must have a value for each channel, got none")
        count, pairs = len(given), list(enumerate(given))
    else:
        raise TypeError(
            f"{_NAME}: per_class must be a mapping or a sequence, got {type(given).__name__}"
        )
    found = {}
    for channel, value in pairs:
        channel = _channel("per_class", channel)
        if value is None:
            found[channel] = _UNTOUCHED
            continue
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise TypeError(
                f"{_NAME}: per_class[{channel}] must be (operation, size) or None, got {value!r}"
            )
        found[channel] = (
            check_operation(_NAME, value[0]),
            check_size(_NAME, f"per_class[{channel}]", value[1]),
        )
    return count, found


def _scaled(size: Size, spatial: tuple[int, ...], finest: tuple[int, ...]) -> Size:
    sizes = size if isinstance(size, tuple) else (size,) * len(spatial)
    if len(sizes) != len(spatial):
        return size  # refused where the element is made
    return tuple(
        n if here == there else nearest_odd(n * here / there)
        for n, here, there in zip(sizes, spatial, finest, strict=True)
    )


# torch.compile takes the plan for a constant instead of tracing how it is made.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan(refinements: tuple[Refinement, ...], footprint: str, border: str, axes: int) -> Plan:
    return _cached_plan(refinements, footprint, border, axes)


@lru_cache(maxsize=256)
def _cached_plan(
    refinements: tuple[Refinement, ...], footprint: str, border: str, axes: int
) -> Plan:
    programs = tuple(
        OPERATIONS[operation](_element(size, footprint, axes)) for operation, size in refinements
    )
    return encode(programs, border, 0.0)


def _element(size: Size, footprint: str, axes: int) -> Element:
    if footprint == "box":
        return make_element(_NAME, size, None, None, 0, axes)
    mask = _FOOTPRINTS[footprint](size, spatial_dims=axes).tolist()
    return make_element(_NAME, None, mask, None, 0, axes)
