"""What one morphology call does, and the numbers in which it is told to the kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["BORDERS", "Plan", "Program", "Stage", "Term", "encode", "index_dtype"]

# csrc/math/morphology.h, Border
BORDERS = {"geodesic": 0, "constant": 1, "reflect": 2, "mirror": 3, "nearest": 4, "wrap": 5}
_AXES = 3
_BOX, _FLAT, _ADDITIVE = 0, 1, 2
_BORDER, _REACH = 0, slice(1, 1 + _AXES)


@dataclass(frozen=True)
class Stage:
    """A maximum (dilation) or minimum (erosion) over the offsets of an element.

    Attributes:
      dilate: which one.
      low, high: the smallest box that holds all offsets and 0, per spatial axis, inclusive.
      offsets: of the element's input from its output; None: the whole box.
      heights: added (dilation) or subtracted (erosion), one per offset; None: flat.
    """

    dilate: bool
    low: tuple[int, ...]
    high: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...] | None = None
    heights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Term:
    """A chain of stages, added or subtracted; no stages: the input itself."""

    sign: int
    stages: tuple[Stage, ...] = ()


# The signed sum of its terms.
Program = tuple[Term, ...]


def _runs(offsets: Sequence[tuple[int, ...]]) -> list[int]:
    """(depth, height, first width, length) of each run along the width, one after the other."""
    numbers: list[int] = []
    count = 0
    ordered = sorted(offsets)
    at = 0
    while at < len(ordered):
        end = at + 1
        first = ordered[at]
        while end < len(ordered) and ordered[end] == (*first[:-1], first[-1] + end - at):
            end += 1
        numbers += [*first, end - at]
        count += 1
        at = end
    return [count, *numbers]


def _stage(stage: Stage, values: list[float]) -> list[int]:
    missing = (0,) * (_AXES - len(stage.low))
    low, high = (*missing, *stage.low), (*missing, *stage.high)
    kind = _BOX if stage.offsets is None else _FLAT if stage.heights is None else _ADDITIVE
    numbers = [int(stage.dilate), kind]
    numbers += itertools.chain.from_iterable(zip(low, high, strict=True))
    if stage.offsets is None:
        return numbers
    offsets = [(*missing, *offset) for offset in stage.offsets]
    if stage.heights is None:
        return numbers + _runs(offsets)
    values += [height + 0.0 for height in stage.heights]  # no -0
    return [*numbers, len(offsets), *itertools.chain.from_iterable(offsets)]


def _reach(programs: Sequence[Program]) -> list[int]:
    """How far a value may travel along each axis, on its way through a chain."""
    most = [0] * _AXES
    for term in itertools.chain.from_iterable(programs):
        here = [0] * _AXES
        for stage in term.stages:
            missing = _AXES - len(stage.low)
            for axis, (low, high) in enumerate(zip(stage.low, stage.high, strict=True)):
                here[missing + axis] += max(-low, high)
        most = [max(pair) for pair in zip(most, here, strict=True)]
    return most


class Plan(NamedTuple):
    """One call in numbers, as csrc/bindings/morphology_program.cpp reads them.

    Attributes:
      program: everything that is a whole number.
      values: the border's constant and the heights.
      chains: how many indices per element a gradient needs, at least 1.
    """

    program: list[int]
    values: list[float]
    chains: int


def encode(programs: Sequence[Program], border: str, border_value: float) -> Plan:
    """The numbers of one call.

    Args:
      programs: one per channel.
      border: of BORDERS.
      border_value: of the border "constant".
    """
    different = list(dict.fromkeys(programs))
    values = [border_value]
    numbers = [BORDERS[border], *_reach(different), len(different), len(programs)]
    numbers += [different.index(program) for program in programs]
    for program in different:
        numbers.append(len(program))
        for term in program:
            numbers += [int(term.sign > 0), len(term.stages)]
            for stage in term.stages:
                numbers += _stage(stage, values)
    chains = max(1, *(sum(1 for term in program if term.stages) for program in different))
    return Plan(numbers, values, chains)


def index_dtype(program: Sequence[int], spatial: Sequence[int]) -> torch.dtype:
    """The narrower of int16 and int32 that says where a source lies (csrc/math/source_index.h)."""
    sizes = [*[1] * (_AXES - len(spatial)), *spatial]
    reach = [min(far, size - 1) for far, size in zip(program[_REACH], sizes, strict=True)]
    if program[_BORDER] == BORDERS["wrap"]:
        reach = [size - 1 if far else 0 for far, size in zip(reach, sizes, strict=True)]
    furthest = (reach[0] * sizes[1] + reach[1]) * sizes[2] + reach[2]
    narrow = furthest < 2**15 or _fits_box([2 * far + 1 for far in reach], sizes)
    return torch.int16 if narrow else torch.int32


def _fits_box(box: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether 16 bits tell the places of a box apart, with numbers of elements below 2**31."""
    places = math.prod(box)
    modulus = next((2**bits for bits in range(1, 17) if places < 2**bits), None)
    if modulus is None:
        return False
    row = _next_like(box[2], sizes[2], modulus)
    plane = _next_like(box[1] * box[2], sizes[1] * row, modulus)
    return sizes[0] * plane < 2**31


def _next_like(like: int, least: int, modulus: int) -> int:
    """The first of like, like + modulus, ... that is at least `least`."""
    return like + max(0, -((like - least) // modulus)) * modulus
