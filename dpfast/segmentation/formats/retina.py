"""Layers of the retina in OCT: Duke's ten subjects with diabetic macular oedema.

Chiu et al. 2015, doi:10.1364/BOE.6.001172.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.formats._format import Format, files_below, folder
from dpfast.segmentation.records import Record

__all__ = ["DUKE_OCT", "duke_oct_records", "layer_map"]

_LAYERS = ("NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE", "OS-RPE")
_NUM_BOUNDARIES = len(_LAYERS) + 1


def duke_oct_records(path: Path) -> list[Record]:
    """Read the annotated scans of `Subject_NN.mat`, in `path` or in `2015_BOE_Chiu` below it.

    A file has `images` (depth, width, scans), `manualLayers1` (8 boundaries, width, scans) and
    `manualFluid1` (depth, width, scans). Scans that nobody annotated are left out, and so are the
    columns left and right of the annotation. Of the two experts the first is taken.

    Raises:
      ValueError: something is missing or has another shape. ImportError: SciPy is not installed.
    """
    function = "duke_oct_records"
    folder(function, path)
    below = path / "2015_BOE_Chiu"
    root = below if below.is_dir() else path
    records: list[Record] = []
    for file in files_below(function, root, "Subject_*.mat", "subjects"):
        images, layers, fluid = _read(function, file)
        for number in range(images.shape[2]):
            columns = np.flatnonzero(np.isfinite(layers[:, :, number]).all(axis=0))
            if len(columns) == 0:
                continue
            across = slice(int(columns[0]), int(columns[-1]) + 1)
            records.append(
                Record(
                    image=np.ascontiguousarray(images[:, across, number]),
                    label=layer_map(
                        layers[:, across, number], fluid[:, across, number], images.shape[0]
                    ),
                    patient_id=file.stem,
                    name=f"{file.stem}_{number + 1:02d}",
                    columns={},
                )
            )
    if not records:
        raise ValueError(f"{function}: {root} must hold an annotated scan, got none")
    return records


def layer_map(
    boundaries: NDArray[Any], fluid: NDArray[Any] | None, depth: int
) -> NDArray[np.int64]:
    """Class numbers from boundaries.

    Args:
      boundaries: row of each boundary, from the top and counted from 1, shape (8, width); NaN where
        the annotation has a gap, which is filled from its sides.
      fluid: above 0 where there is fluid, shape (depth, width).
      depth: of the image.

    Returns:
      shape (depth, width): 0 above and below the retina, 1 to 7 its layers, 8 fluid.
    """
    width = boundaries.shape[1]
    filled = np.empty(boundaries.shape)
    places = np.arange(width)
    for number, line in enumerate(boundaries):
        known = np.isfinite(line)
        filled[number] = np.interp(places, places[known], line[known])
    rows = np.arange(1, depth + 1)[:, None]
    # How many boundaries lie above a pixel: the layer that it is in.
    label: NDArray[np.int64] = (rows[None] >= np.round(filled)[:, None]).sum(axis=0)
    label[label == _NUM_BOUNDARIES] = 0
    if fluid is not None:
        label[np.nan_to_num(fluid) > 0] = _NUM_BOUNDARIES
    return label


def _read(function: str, file: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    with needs_extra("duke_oct_records"):
        from scipy.io import loadmat
    names = ("images", "manualLayers1", "manualFluid1")
    try:
        content = loadmat(file, variable_names=names)
    except Exception as error:  # of many kinds, some of them of SciPy's own
        raise ValueError(f"{function}: {file} must be a MATLAB file, got {error}") from error
    for name in names:
        if name not in content:
            raise ValueError(f"{function}: {file} must hold {', '.join(names)}, got no {name}")
    images, layers, fluid = (content[name] for name in names)
    depth_and_width = images.shape[:2]
    wanted = (_NUM_BOUNDARIES, *images.shape[1:])
    if images.ndim != 3 or layers.shape != wanted or fluid.shape != images.shape:
        raise ValueError(
            f"{function}: {file} must hold images and manualFluid1 of one shape (depth, width, "
            f"scans) and manualLayers1 of shape (8, width, scans), got {images.shape}, "
            f"{fluid.shape} and {layers.shape} for {depth_and_width}"
        )
    return images, layers.astype(np.float64), fluid


DUKE_OCT = Format(
    name="Duke OCT, layers of the retina",
    find=duke_oct_records,
    spatial_dims=2,
    class_names=(*_LAYERS, "fluid"),
    class_values=tuple(range(_NUM_BOUNDARIES + 1)),
)
