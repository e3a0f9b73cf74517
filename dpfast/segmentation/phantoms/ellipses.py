"""Phantoms of ellipses under uneven light, in two and three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfast.segmentation.records import Record
from dpfast.segmentation.task import SegmentationTask

__all__ = ["phantom_records", "phantom_task"]

_SIZES = {2: (64, 64), 3: (24, 24, 24)}
# In 2D the ellipses are bright (two classes); in 3D they are bright or dark (three).
_CONTRASTS = {2: (1.0,), 3: (1.0, -1.0)}
_SMALLEST_SLICE = 0.6  # of the largest

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class _Ellipsoid:
    rotation: FloatArray
    middle: FloatArray
    radii: FloatArray
    brightness: float
    label: int  # 0: a speck, to be ignored


def phantom_task(spatial_dims: int) -> SegmentationTask:
    """What there is to learn from phantoms in two or three dimensions."""
    if spatial_dims not in _SIZES:
        raise ValueError(f"phantom_task: spatial_dims must be 2 or 3, got {spatial_dims}")
    return SegmentationTask(
        name=f"phantoms ({spatial_dims}D)",
        spatial_dims=spatial_dims,
        num_classes=1 + len(_CONTRASTS[spatial_dims]),
        image_size=_SIZES[spatial_dims],
    )


def phantom_records(
    patients: int, spatial_dims: int = 2, *, slices_per_patient: int = 1, seed: int = 0
) -> list[Record]:
    """Draw ellipses under uneven light and noise, with small bright specks to be ignored.

    A patient's slices show the same ellipses in different sizes. What a patient looks like follows
    from the seed and the patient's number alone, however many others there are.

    Args:
      patients: >= 1.
      spatial_dims: 2 or 3.
      slices_per_patient: images of each patient, >= 1.
      seed: >= 0.

    Raises:
      ValueError: an argument out of its range.
    """
    if spatial_dims not in _SIZES or patients < 1 or slices_per_patient < 1 or seed < 0:
        raise ValueError(
            "phantom_records: patients and slices_per_patient must be >= 1, spatial_dims 2 or 3 "
            f"and seed >= 0, got {patients}, {slices_per_patient}, {spatial_dims} and {seed}"
        )
    records = []
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        scene = _scene(_SIZES[spatial_dims], _CONTRASTS[spatial_dims], rng)
        patient = f"phantom-{seed}-{number:05d}"
        for index, scale in enumerate(np.linspace(1.0, _SMALLEST_SLICE, slices_per_patient)):
            image, label = _draw(scene, _SIZES[spatial_dims], float(scale), rng)
            records.append(
                Record(
                    image=image,
                    label=label,
                    patient_id=patient,
                    name=f"{patient}-{index}",
                    columns={},
                )
            )
    return records


def _scene(
    size: tuple[int, ...], contrasts: tuple[float, ...], rng: np.random.Generator
) -> list[_Ellipsoid]:
    """What is to be seen of one patient, later ellipsoids covering earlier ones."""
    dims = len(size)
    scene = [
        _ellipsoid(rng.uniform(0.15, 0.4, dims), contrast * rng.uniform(0.7, 1.3), label, rng)
        for label, contrast in enumerate(contrasts, start=1)
        for _ in range(rng.integers(1, 4))
    ]
    speck = np.full(dims, 2.0 / min(size))
    specks = [_ellipsoid(speck, rng.uniform(1.0, 2.0), 0, rng) for _ in range(rng.integers(2, 6))]
    return scene + specks


def _ellipsoid(
    radii: FloatArray, brightness: float, label: int, rng: np.random.Generator
) -> _Ellipsoid:
    dims = len(radii)
    rotation, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    return _Ellipsoid(rotation, rng.uniform(-0.7, 0.7, dims), radii, brightness, label)


def _draw(
    scene: list[_Ellipsoid], size: tuple[int, ...], scale: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    dims = len(size)
    # Coordinates in [-1, 1], shape (dims, *size).
    axes = [np.linspace(-1, 1, side) for side in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    image: NDArray[Any] = np.zeros(size)
    label = np.zeros(size, dtype=np.int64)
    for each in scene:
        centred = grid - each.middle.reshape(-1, *(1,) * dims)
        radii = each.radii * (scale if each.label else 1.0)
        turned = np.tensordot(each.rotation, centred, axes=1) / radii.reshape(-1, *(1,) * dims)
        inside = (turned**2).sum(axis=0) <= 1.0
        if each.label:
            label[inside] = each.label
        else:
            inside &= label == 0
        image[inside] = each.brightness
    light = np.exp(np.tensordot(rng.normal(0.0, 0.3, dims), grid, axes=1))
    shade = np.tensordot(rng.normal(0.0, 0.2, dims), grid, axes=1)
    noisy = image * light + shade + rng.normal(0.0, rng.uniform(0.2, 0.5), size)
    return noisy.astype(np.float32), label
