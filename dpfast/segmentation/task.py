"""What is to be learnt, and how each record is made ready for it by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dpfast import _validate
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.reading import RecordReader
from dpfast.segmentation.records import Record

__all__ = ["Labels", "SegmentationTask", "make_dataset"]

_KEYS = ("image", "label")
_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True)
class SegmentationTask:
    """The public facts of a segmentation task, the same at every site that takes part.

    Nothing is learnt from the data set as a whole: a record is read, resized or cropped, inverted
    and scaled by rules that look at that record alone. Adding or removing one record therefore
    changes no other.

    Args:
      name: for people.
      spatial_dims: 2 or 3.
      num_classes: background included, >= 2.
      image_size: to which every record is brought, spatial_dims numbers.
      in_channels: of the images. Pictures are made gray, which is one, or red, green and blue,
        which is three.
      labels: "classes": label maps hold class numbers; "foreground": whatever is above 0 is class 1
        (instance maps, masks with 255).
      fit: "resize": scaled to the size; "crop_or_pad": cropped or padded about the middle, with the
        image's mean and background.
      dark_background: images whose background is bright, as stained tissue's is, are inverted.
      class_names: of the foreground classes, for people; "class 1" and so on where there are none.
      class_values: by which label maps say a class, background first; 0, 1, ... where there are
        none.
      spacing: voxel size in mm to which NIfTI volumes are brought before anything else.
      window: intensities are cut off at these two numbers, such as Hounsfield units.

    Raises:
      ValueError: an argument breaks its rule.
    """

    name: str
    spatial_dims: int
    num_classes: int
    image_size: tuple[int, ...]
    in_channels: int = 1
    labels: str = "classes"
    fit: str = "resize"
    dark_background: bool = False
    class_names: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        function = "SegmentationTask"
        _validate.choice(function, "labels", self.labels, ("classes", "foreground"))
        _validate.choice(function, "fit", self.fit, ("resize", "crop_or_pad"))
        rules = {
            "spatial_dims must be 2 or 3": self.spatial_dims in (2, 3),
            "num_classes must be >= 2": self.num_classes >= 2,
            "num_classes must be 2 with labels 'foreground'": self.labels == "classes"
            or self.num_classes == 2,
            f"image_size must be {self.spatial_dims} numbers >= 1": len(self.image_size)
            == self.spatial_dims
            and min(self.image_size) >= 1,
            "in_channels must be >= 1": self.in_channels >= 1,
            "class_names must be one for each foreground class": len(self.class_names)
            in (0, self.num_classes - 1),
            "class_values must be whole numbers, all different, one for each class": len(
                set(self.class_values)
            )
            == len(self.class_values)
            in (0, self.num_classes),
            f"spacing must be {self.spatial_dims} numbers > 0": self.spacing is None
            or (len(self.spacing) == self.spatial_dims and min(self.spacing) > 0),
            "spacing must be None with spatial_dims 2": self.spacing is None
            or self.spatial_dims == 3,
            "window must be two numbers, the lower first": self.window is None
            or (len(self.window) == 2 and self.window[0] < self.window[1]),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{function}: {rule}, got {getattr(self, rule.split()[0])}")
        if not self.class_names:
            names = tuple(f"class {number}" for number in range(1, self.num_classes))
            object.__setattr__(self, "class_names", names)
        if not self.class_values:
            object.__setattr__(self, "class_values", tuple(range(self.num_classes)))

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON would give it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> SegmentationTask:
        """What `to_dict` gave, read from JSON.

        Raises:
          ValueError, TypeError: something else.
        """
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in facts.items()
        }
        return cls(**tuples)

    def transform(self) -> Any:
        """MONAI's transforms from a record to tensors.

        Returns:
          A Compose, from a Record to a dict of
          image: float32, shape (in_channels, *image_size), mean 0 and standard deviation 1;
          label: int64, shape (1, *image_size), class numbers;
          patient_id and name as they are.

        Raises:
          ImportError: MONAI is not installed.
        """
        with needs_extra("SegmentationTask"):
            from monai.transforms.compose import Compose
            from monai.transforms.utility.array import Lambda
            from monai.transforms.utility.dictionary import EnsureTyped, SelectItemsd
        return Compose(
            [
                Lambda(RecordReader(self)),
                *self.preparation(_KEYS),
                EnsureTyped(_KEYS, dtype=(torch.float32, torch.int64), track_meta=False),
                SelectItemsd((*_KEYS, "patient_id", "name")),
            ]
        )

    def preparation(self, keys: Sequence[str], *, crop: bool = True) -> list[Any]:
        """What is done to an image, and to its label map if that is there, after it is read.

        Args:
          keys: "image", or "image" and "label".
          crop: False: fit "crop_or_pad" changes no size.

        Raises:
          ImportError: MONAI is not installed.
        """
        with needs_extra("SegmentationTask"):
            from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
            from monai.transforms.intensity.dictionary import NormalizeIntensityd
            from monai.transforms.spatial.dictionary import Orientationd, Resized, Spacingd
            from monai.transforms.utility.dictionary import Lambdad
        steps: list[Any] = []
        if self.spatial_dims == 3:
            steps.append(Orientationd(keys, axcodes="RAS", labels=_AXES))
        if self.spacing is not None:
            steps.append(Spacingd(keys, self.spacing, mode=("bilinear", "nearest")[: len(keys)]))
        if self.window is not None:
            steps.append(Lambdad("image", _Window(*self.window)))
        if self.fit == "resize":
            modes = ("area", "nearest-exact")[: len(keys)]
            steps.append(Resized(keys, self.image_size, mode=modes))
        if self.dark_background:
            steps.append(Lambdad("image", darken_background))
        steps.append(NormalizeIntensityd("image", channel_wise=True))
        if self.fit == "crop_or_pad" and crop:
            # After the scaling: its zeros are then the mean intensity.
            steps.append(ResizeWithPadOrCropd(keys, self.image_size))
        return steps


class _Window:
    """Cut intensities off."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.clamp(self._low, self._high)


def make_dataset(
    records: Sequence[Record], task: SegmentationTask, *, cache: bool = True
) -> Dataset[dict[str, Any]]:
    """A MONAI data set of records, each made ready as the task says.

    Args:
      records: kept as the data set's `data`, where PrivacyEngine finds the patients
        (`privacy_unit_ids="patient_id"`).
      task: see `SegmentationTask.transform` for what an entry is.
      cache: read everything now and keep it in memory, or each record whenever it is asked for.

    Raises:
      ValueError: a record cannot be read or does not fit the task; without cache, only when it is
        asked for. ImportError: MONAI, nibabel or Pillow is missing.
    """
    with needs_extra("make_dataset"):
        from monai.data.dataset import CacheDataset
        from monai.data.dataset import Dataset as PlainDataset
    transform = task.transform()
    if not cache:

        class Uncached(PlainDataset):
            def _transform(self, index: int) -> Any:
                try:
                    return super()._transform(index)
                except RuntimeError as error:
                    raise _first_cause(error) from error

        plain: Dataset[dict[str, Any]] = Uncached(list(records), transform)
        return plain
    try:
        # Entries are not changed by whoever gets them, so copies would only cost time.
        cached: Dataset[dict[str, Any]] = CacheDataset(
            list(records), transform, progress=False, copy_cache=False
        )
    except RuntimeError as error:
        raise _first_cause(error) from error
    return cached


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong, below MONAI's "applying transform"."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def darken_background(image: torch.Tensor) -> torch.Tensor:
    """Invert an image whose background is bright.

    Most pixels are background, so the median lies on the background's side of the range.
    """
    low, median, high = np.percentile(np.asarray(image), (1, 50, 99))
    return -image if median - low > high - median else image


class Labels:
    """The label maps of a data set by number, as `dpfast.morphology.adapt` takes them.

    Args:
      dataset: of dicts with a "label", such as `make_dataset` gives.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        label: torch.Tensor = self._dataset[index]["label"]
        return label
