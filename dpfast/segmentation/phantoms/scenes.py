"""Scenes that look like the tasks' images: skin, kidneys, brain and retina."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfast.segmentation.phantoms._site import SiteShift

__all__ = ["brain", "kidney", "retina", "skin"]

FloatArray = NDArray[np.float64]
Scene = tuple[NDArray[np.float32], NDArray[np.int64]]

_SKIN, _LESION = np.array([0.85, 0.65, 0.55]), np.array([0.45, 0.28, 0.2])
# Hounsfield units.
_AIR, _FAT, _MUSCLE, _BONE, _KIDNEY, _TUMOUR = -1000.0, -80.0, 50.0, 400.0, 180.0, 90.0
_HU_PER_UNIT = 100.0
# T1, T1 with contrast, T2, FLAIR.
_TISSUE = {
    "brain": (1.0, 1.0, 1.0, 1.0),
    "oedema": (0.8, 0.8, 1.6, 1.9),
    "enhancing": (0.9, 1.9, 1.3, 1.5),
    "core": (0.6, 0.6, 1.5, 1.1),
}


def skin(size: tuple[int, ...], shift: SiteShift, rng: np.random.Generator) -> Scene:
    """A lesion with a ragged edge on lit skin under hairs; image (3, *size), classes 0 and 1."""
    grid = _grid(size)
    middle = rng.uniform(-0.3, 0.3, 2).reshape(2, 1, 1)
    y, x = (grid - middle) / (rng.uniform(0.25, 0.55) * shift.zoom)
    angle, radius = np.arctan2(y, x), np.hypot(y, x * rng.uniform(0.8, 1.25))
    edge = 1.0 + sum(
        rng.normal(0.0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(1, 6)
    )
    inside = radius < edge
    colour = np.where(inside, _LESION[:, None, None], _SKIN[:, None, None])
    colour = colour + np.where(inside, rng.normal(0.0, 0.05, size), 0.0)
    for _ in range(rng.integers(0, 6)):
        slope, offset = rng.normal(0.0, 1.5), rng.uniform(-1, 1)
        line = np.abs(grid[0] - slope * grid[1] - offset) < 0.03 * np.hypot(1.0, slope)
        colour = np.where(line, 0.15, colour)
    light = 1.0 + 0.15 * np.tensordot(rng.normal(size=2), grid, axes=1)
    return _seen(colour * light, 0.6, shift, rng, unit=0.3), inside.astype(np.int64)


def kidney(size: tuple[int, ...], shift: SiteShift, rng: np.random.Generator) -> Scene:
    """A trunk in CT with two kidneys, one perhaps with a tumour; classes 0, kidney, tumour."""
    grid = _grid(size) / shift.zoom
    image: FloatArray = np.full(size, _AIR)
    label = np.zeros(size, dtype=np.int64)
    flat = grid[1:] / np.array([0.75, 0.9]).reshape(2, 1, 1, 1)
    image[(flat**2).sum(0) < 1.0] = _FAT
    image[((flat / 0.88) ** 2).sum(0) < 1.0] = _MUSCLE
    image[_ball(grid, (None, 0.45, 0.0), (1.0, 0.16, 0.16))] = _BONE
    sides = (-0.45, 0.45)
    for side in sides:
        place = (rng.normal(0, 0.06), 0.2 + rng.normal(0, 0.04), side + rng.normal(0, 0.03))
        inside = _ball(grid, place, (0.55, 0.22, 0.2))
        image[inside], label[inside] = _KIDNEY, 1
    if rng.random() < shift.prevalence:
        side = sides[int(rng.integers(2))]
        place = (rng.uniform(-0.3, 0.3), 0.2, side + 0.18 * np.sign(side))
        inside = _ball(grid, place, (rng.uniform(0.14, 0.26),) * 3)
        image[inside], label[inside] = _TUMOUR + rng.normal(0, 15), 2
    return _seen(image, _MUSCLE, shift, rng, unit=_HU_PER_UNIT), label


def brain(size: tuple[int, ...], shift: SiteShift, rng: np.random.Generator) -> Scene:
    """A head in four MR sequences with nested tumour classes; image (4, *size), classes 0 to 3."""
    grid = _grid(size) / shift.zoom
    head = _ball(grid, (0.0, 0.0, 0.0), (0.85, 0.9, 0.8))
    label = np.zeros(size, dtype=np.int64)
    image: FloatArray = np.zeros((4, *size))
    _paint(image, head, "brain")
    if rng.random() < shift.prevalence:
        place = tuple(rng.uniform(-0.35, 0.35, 3))
        radius = rng.uniform(0.25, 0.45)
        stretch = rng.uniform(0.8, 1.25, 3)
        # The names' order is from the outside to the middle; the classes are those of BraTS.
        for name, share, number in (("oedema", 1.0, 2), ("enhancing", 0.65, 3), ("core", 0.4, 1)):
            inside = _ball(grid, place, tuple(radius * share * stretch)) & head
            _paint(image, inside, name)
            label[inside] = number
    field = np.exp(0.2 * np.tensordot(rng.normal(size=3), grid, axes=1))
    return _seen(image * field, 1.0, shift, rng, unit=0.5), label


def retina(size: tuple[int, ...], shift: SiteShift, rng: np.random.Generator) -> Scene:
    """Seven layers with speckle, perhaps with fluid; classes 0, layers 1 to 7, fluid 8."""
    depth, width = size
    x = np.linspace(-1, 1, width)
    top = 0.25 + 0.05 * rng.normal() + 0.06 * rng.normal() * x + 0.05 * np.cos(2.5 * x)
    pit = 0.08 * np.exp(-((x - rng.normal(0, 0.2)) ** 2) / 0.05)
    thickness = rng.uniform(0.045, 0.09, 7)[:, None] * shift.zoom * np.ones(width)
    thickness[:3] -= pit / 3 * shift.zoom
    lines = top + np.concatenate([pit[None], pit + np.cumsum(np.maximum(thickness, 0.015), axis=0)])
    rows = (np.arange(depth) + 0.5)[:, None] / depth
    label = (rows[None] >= lines[:, None]).sum(0)
    label[label == len(lines)] = 0
    brightness = np.array([0.15, 0.9, 0.55, 0.4, 0.6, 0.3, 0.95, 0.75])
    image: FloatArray = brightness[label]
    if rng.random() < shift.prevalence:
        for _ in range(rng.integers(1, 4)):
            at = rng.uniform(-0.7, 0.7)
            middle = lines[2:5, np.abs(x - at).argmin()].mean()
            wide = ((x - at) / rng.uniform(0.06, 0.18)) ** 2
            high = ((rows - middle) / rng.uniform(0.03, 0.06)) ** 2
            pocket = (wide + high < 1.0) & (label > 0)
            image[pocket], label[pocket] = 0.08, 8
    speckled = image * rng.gamma(8.0, 1.0 / 8.0, size)
    return _seen(speckled, 0.5, shift, rng, unit=0.4), label.astype(np.int64)


def _grid(size: tuple[int, ...]) -> FloatArray:
    """Coordinates in [-1, 1], shape (dims, *size)."""
    axes = [np.linspace(-1, 1, side) for side in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _ball(
    grid: FloatArray, middle: tuple[float | None, ...], radii: tuple[float, ...]
) -> NDArray[np.bool_]:
    """Inside of an ellipsoid; a cylinder along an axis without a middle."""
    distance: FloatArray = np.zeros(grid.shape[1:])
    for axis, place, radius in zip(grid, middle, radii, strict=True):
        if place is not None:
            distance += ((axis - place) / radius) ** 2
    return distance < 1.0


def _paint(image: FloatArray, inside: NDArray[np.bool_], tissue: str) -> None:
    for channel, value in zip(image, _TISSUE[tissue], strict=True):
        channel[inside] = value


def _seen(
    image: NDArray[Any], middle: float, shift: SiteShift, rng: np.random.Generator, *, unit: float
) -> NDArray[np.float32]:
    """What a site's scanner makes of a scene; `unit` is the tissues' difference of intensity."""
    noise = rng.normal(0.0, shift.noise * unit, image.shape)
    seen: NDArray[np.float32] = (middle + shift.contrast * (image - middle) + noise).astype(
        np.float32
    )
    return seen
