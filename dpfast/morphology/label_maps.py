"""Morphology on label maps: what follows a prediction, and how thick a class is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dpfast.morphology.dp_morph import DPMorph
from dpfast.morphology.elements import PerChannel
from dpfast.morphology.functional import Size, erosion

__all__ = ["check_label_map", "check_num_classes", "refine", "refine_by", "thickness"]

_NAME = "refine"
_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def refine(
    mask: torch.Tensor,
    operation: str = "close",
    size: int | Sequence[int] = 3,
    per_class: Mapping[int, Any] | Sequence[Any] | None = None,
    *,
    num_classes: int = 2,
    background: int = 0,
    footprint: str = "box",
    border: str = "geodesic",
) -> torch.Tensor:
    """Open or close the region of each class in label maps.

    Each class's region is changed by itself. A pixel that several classes then hold goes to the
    one that held it before, if that is among them, else to the lowest of them; one that none holds
    goes to the background.

    Applied to predictions it is post-processing, which costs no privacy.

    Args:
      mask: class numbers, (B, *spatial) or (B, 1, *spatial) in 2D or 3D; bool or an integer type.
        It is not changed.
      operation: as in `DPMorph`, as are size, per_class, footprint and border.
      size: of the element.
      per_class: other operations and sizes; it must not name the background.
      num_classes: background included; 2 for bool.
      background: its class number; its region follows from the others'.
      footprint: "box", "ellipse" or "cross".
      border: of the image.

    Returns:
      Shape, dtype and device of mask.

    Raises:
      TypeError: a wrong type or dtype. ValueError: a wrong shape or setting, or a class number
        that is not below num_classes.
    """
    num_classes = check_num_classes(_NAME, num_classes)
    if isinstance(background, bool) or not isinstance(background, int):
        raise TypeError(f"{_NAME}: background must be an int, got {type(background).__name__}")
    if not 0 <= background < num_classes:
        raise ValueError(
            f"{_NAME}: background must be >= 0 and < num_classes, {num_classes}, got {background}"
        )
    morph = DPMorph(
        operation, size, per_class, background=background, footprint=footprint, border=border
    )
    return refine_by(morph, mask, num_classes)


def refine_by(morph: DPMorph, mask: torch.Tensor, num_classes: int) -> torch.Tensor:
    """`refine` with the settings of a DPMorph, whose background must be a class."""
    background = morph.background
    if background is None or morph.per_class.get(background, ("identity", 1))[0] != "identity":
        raise ValueError(
            f"{_NAME}: per_class must not name the background, whose region follows from the others"
        )
    _check_mask(mask, num_classes)
    maps = mask.squeeze(1) if mask.dim() > 3 and mask.shape[1] == 1 else mask
    before = maps.long()
    if bool(((before < 0) | (before >= num_classes)).any()):
        raise ValueError(f"{_NAME}: mask must hold class numbers from 0 to {num_classes - 1}")
    held = morph(_regions(before, range(num_classes))) > 0.5
    held[:, background] = False
    keeps = held.gather(1, before.unsqueeze(1)).squeeze(1)
    lowest = held.byte().argmax(1)  # of equal values the first one
    after = torch.where(keeps, before, torch.where(held.any(1), lowest, background))
    return after.reshape(mask.shape).to(mask.dtype)


def thickness(labels: torch.Tensor, num_classes: int, limit: int) -> list[int]:
    """How thick each foreground class is: the side of the largest box that fits in its region.

    Args:
      labels: one label map, checked.
      num_classes: background, class 0, included.
      limit: sides beyond it count as it.

    Returns:
      One side for each of the classes 1, 2, ...; 0 where there is none of it.
    """
    regions = _regions(labels.unsqueeze(0), range(1, num_classes))
    longest = min(limit, *labels.shape)
    # A box of side low fits, one of side high + 1 does not.
    low = [0] * (num_classes - 1)
    high = [longest if there else 0 for there in regions.flatten(2).any(2)[0].tolist()]
    while low != high:
        middle = [(a + b + 1) // 2 for a, b in zip(low, high, strict=True)]
        sizes: PerChannel[Size] = PerChannel(*(max(side, 1) for side in middle))
        fits = erosion(regions, sizes, border="constant").flatten(2).amax(2)[0].gt(0.5).tolist()
        for index, (side, fit) in enumerate(zip(middle, fits, strict=True)):
            if fit:
                low[index] = side
            else:
                high[index] = max(side - 1, 0)
    return low


def check_num_classes(function: str, value: Any) -> int:
    """A number of classes, the background included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: num_classes must be an int, got {type(value).__name__}")
    if value < 2:
        raise ValueError(f"{function}: num_classes must be >= 2, got {value}")
    return value


def check_label_map(function: str, value: Any, num_classes: int) -> torch.Tensor:
    """One label map (*spatial) from what may have a channel axis of length 1 in front.

    Raises:
      TypeError: not a tensor of class numbers. ValueError: another shape, or a class number that is
        not below num_classes; the message says nothing else about it.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: masks must hold tensors, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{function}: masks must be bool or integers, got {value.dtype}")
    labels = value.squeeze(0) if value.dim() > 2 and value.shape[0] == 1 else value
    if labels.dim() not in (2, 3):
        raise ValueError(
            f"{function}: a mask must have shape (*spatial) or (1, *spatial) with 2 or 3 axes, got "
            f"{tuple(value.shape)}"
        )
    labels = labels.detach().long()
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ValueError(f"{function}: masks must hold class numbers from 0 to {num_classes - 1}")
    return labels


def _regions(labels: torch.Tensor, classes: range) -> torch.Tensor:
    """(B, *spatial) to (B, len(classes), *spatial): 1 where a class is, else 0."""
    numbers = torch.arange(classes.start, classes.stop, device=labels.device)
    shape = (1, -1, *[1] * (labels.dim() - 1))
    return (labels.unsqueeze(1) == numbers.reshape(shape)).float()


def _check_mask(mask: Any, num_classes: int) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{_NAME}: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype not in _DTYPES:
        raise TypeError(f"{_NAME}: mask must be bool or an integer type, got {mask.dtype}")
    axes = mask.dim() - 1 - int(mask.dim() > 3 and mask.shape[1] == 1)
    if axes not in (2, 3):
        raise ValueError(
            f"{_NAME}: mask must have shape (B, *spatial) or (B, 1, *spatial) in 2D or 3D, got "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool and num_classes != 2:
        raise ValueError(f"{_NAME}: num_classes must be 2 for a bool mask, got {num_classes}")
