"""Reading a record: image and label map as checked tensors of one task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.records import NIFTI_SUFFIXES, ImageSource, Record

if TYPE_CHECKING:
    from dpfast.segmentation.task import SegmentationTask

__all__ = ["RecordReader", "read_image"]

_COLOURS = 3
# Voxel sizes and places, in mm: what files say with the last digits of a float32.
_AFFINE_TOLERANCE = 1e-2


class RecordReader:
    """From a record to its image and its label map as checked tensors (channels, *spatial).

    Args:
      task: what they must fit.
    """

    def __init__(self, task: SegmentationTask) -> None:
        self._task = task

    def __call__(self, record: Record) -> dict[str, Any]:
        """Read a record.

        Raises:
          ValueError: a file cannot be read, or does not fit the task or the other file.
        """
        task, name = self._task, record["name"]
        image = read_image(task, record["image"], name)
        label = _tensor(record["label"], "label", in_channels=1, spatial_dims=task.spatial_dims)
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise ValueError(
                "SegmentationTask: a label map must have one channel and its image's size "
                f"{tuple(image.shape[1:])}, got shape {tuple(label.shape)} in {name}"
            )
        places = [getattr(each, "affine", None) for each in (image, label)]
        if places[0] is not None and places[1] is not None:
            distance = float((torch.as_tensor(places[0]) - torch.as_tensor(places[1])).abs().max())
            if distance > _AFFINE_TOLERANCE:
                raise ValueError(
                    "SegmentationTask: a label map must lie where its image does, got affines that "
                    f"differ by {distance:.3g} mm in {name}"
                )
        return {**record, "image": image, "label": self._classes(label, name)}

    def _classes(self, label: torch.Tensor, name: str) -> torch.Tensor:
        """Class numbers of a label map's values."""
        task = self._task
        if task.labels == "foreground":
            return (label > 0).float()
        values = task.class_values
        known = torch.zeros_like(label, dtype=torch.bool)
        classes = torch.zeros_like(label)
        for number, value in enumerate(values):
            here = label == value
            known |= here
            classes[here] = float(number)
        if not known.all():
            whole = values == tuple(range(task.num_classes))
            rule = f"whole numbers in 0..{values[-1]}" if whole else f"among {list(values)}"
            raise ValueError(f"SegmentationTask: labels must be {rule}, got others in {name}")
        return classes


def read_image(task: SegmentationTask, source: ImageSource, name: str) -> torch.Tensor:
    """An image of a task, float, shape (in_channels, *spatial); a MetaTensor where it has a header.

    Raises:
      ValueError: it cannot be read, has another shape, or numbers that are not finite.
    """
    image = _tensor(source, "image", in_channels=task.in_channels, spatial_dims=task.spatial_dims)
    if image.shape[0] != task.in_channels or image.dim() != 1 + task.spatial_dims:
        raise ValueError(
            f"SegmentationTask: images must have {task.in_channels} channels and "
            f"{task.spatial_dims} axes, got shape {tuple(image.shape)} in {name}"
        )
    if not image.isfinite().all():
        raise ValueError(f"SegmentationTask: images must be finite, got others in {name}")
    return image


def _tensor(source: ImageSource, key: str, *, in_channels: int, spatial_dims: int) -> torch.Tensor:
    if isinstance(source, np.ndarray):
        with needs_extra("SegmentationTask"):
            from monai.data.meta_tensor import MetaTensor
        # A copy: some transforms work in place.
        array = torch.from_numpy(np.array(source, dtype=np.float32))
        if not (in_channels > 1 and array.dim() == 1 + spatial_dims):
            array = array[None]
        # An array's axes are taken to be those of RAS.
        return MetaTensor(array) if spatial_dims == 3 else array
    files: Sequence[Path] = source if isinstance(source, tuple) else (source,)
    load, reader = _loader(Path(files[0]), key, in_channels)
    try:
        # Told here, the reader is the only one: given to LoadImage itself, others would be
        # tried after it.
        tensor: torch.Tensor = load(source, reader=reader)
    except Exception as error:
        named = ", ".join(map(str, files))
        raise ValueError(
            f"SegmentationTask: {key} must be a readable file, got {named}: "
            f"{error or type(error).__name__}"
        ) from error
    return tensor


def _loader(path: Path, key: str, in_channels: int) -> tuple[Any, Any]:
    """MONAI's LoadImage, and its reader for a kind of file."""
    with needs_extra("SegmentationTask"):
        from monai.transforms.io.array import LoadImage

        if path.name.lower().endswith(NIFTI_SUFFIXES):
            import nibabel  # noqa: F401  MONAI would only warn of its absence
            from monai.data.image_reader import NibabelReader

            reader: Any = NibabelReader()
        else:
            import PIL  # noqa: F401
            from monai.data.image_reader import PILReader

            picture = _colour if in_channels == _COLOURS else _gray
            reader = PILReader(picture if key == "image" else _as_stored, reverse_indexing=False)
    return LoadImage(image_only=True, ensure_channel_first=True), reader


def _gray(picture: Any) -> Any:
    """One channel; more than 8 bits stay what they are."""
    stored = _as_stored(picture)
    deep = stored.mode.startswith(("I", "F"))
    return stored if deep else stored.convert("L")


def _colour(picture: Any) -> Any:
    """Red, green and blue."""
    return _as_stored(picture).convert("RGB")


def _as_stored(picture: Any) -> Any:
    """The pixels in memory, the file closed."""
    with picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"it holds {picture.n_frames} pictures, and one is wanted")
        picture.load()
        return picture.copy()
