"""What is to be learnt, and how each record is made ready for it by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dpfast import _validate
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.records import NIFTI_SUFFIXES, Record

__all__ = ["Labels", "SegmentationTask", "make_dataset"]

_KEYS = ("image", "label")


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
      in_channels: of the images. Pictures are made gray, which is one.
      labels: "classes": label maps hold class numbers; "foreground": whatever is above 0 is class 1
        (instance maps, masks with 255).
      fit: "resize": scaled to the size; "crop_or_pad": cropped or padded about the middle, with the
        image's mean and background.
      dark_background: images whose background is bright, as stained tissue's is, are inverted.

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
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{function}: {rule}, got {getattr(self, rule.split()[0])}")

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
            from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
            from monai.transforms.intensity.dictionary import NormalizeIntensityd
            from monai.transforms.spatial.dictionary import Resized
            from monai.transforms.utility.array import Lambda
            from monai.transforms.utility.dictionary import EnsureTyped, Lambdad, SelectItemsd
        steps: list[Any] = [Lambda(_Read(self))]
        if self.fit == "resize":
            steps.append(Resized(_KEYS, self.image_size, mode=("area", "nearest-exact")))
        if self.dark_background:
            steps.append(Lambdad("image", darken_background))
        steps.append(NormalizeIntensityd("image", channel_wise=True))
        if self.fit == "crop_or_pad":
            # After the scaling: its zeros are then the mean intensity.
            steps.append(ResizeWithPadOrCropd(_KEYS, self.image_size))
        steps += [
            EnsureTyped(_KEYS, dtype=(torch.float32, torch.int64), track_meta=False),
            SelectItemsd((*_KEYS, "patient_id", "name")),
        ]
        return Compose(steps)


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


class _Read:
    """Image and label of a record as checked tensors (channels, *spatial)."""

    def __init__(self, task: SegmentationTask) -> None:
        self._task = task

    def __call__(self, record: Record) -> dict[str, Any]:
        task, name = self._task, record["name"]
        image, label = self._tensor(record, "image"), self._tensor(record, "label")
        if image.shape[0] != task.in_channels or image.dim() != 1 + task.spatial_dims:
            raise ValueError(
                f"SegmentationTask: images must have {task.in_channels} channels and "
                f"{task.spatial_dims} axes, got shape {tuple(image.shape)} in {name}"
            )
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise ValueError(
                "SegmentationTask: a label map must have one channel and its image's size "
                f"{tuple(image.shape[1:])}, got shape {tuple(label.shape)} in {name}"
            )
        if not image.isfinite().all():
            raise ValueError(f"SegmentationTask: images must be finite, got others in {name}")
        if task.labels == "foreground":
            label = (label > 0).float()
        whole = label == label.round()
        if not (whole & (label >= 0) & (label < task.num_classes)).all():
            raise ValueError(
                f"SegmentationTask: labels must be whole numbers in 0..{task.num_classes - 1}, got "
                f"others in {name}"
            )
        return {**record, "image": image, "label": label}

    def _tensor(self, record: Record, key: str) -> torch.Tensor:
        source = record["image"] if key == "image" else record["label"]
        if isinstance(source, np.ndarray):
            # A copy: some transforms work in place.
            return torch.from_numpy(np.array(source, dtype=np.float32))[None]
        load, reader = _loader(Path(source), key)
        try:
            # Told here, the reader is the only one: given to LoadImage itself, others would be
            # tried after it.
            tensor: torch.Tensor = load(source, reader=reader)
        except Exception as error:
            raise ValueError(
                f"SegmentationTask: {key} must be a readable file, got {source}: "
                f"{error or type(error).__name__}"
            ) from error
        return tensor


def _loader(path: Path, key: str) -> tuple[Any, Any]:
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

            converter = _gray if key == "image" else _as_stored
            reader = PILReader(converter, reverse_indexing=False)
    return LoadImage(image_only=True, ensure_channel_first=True), reader


def _gray(picture: Any) -> Any:
    """One channel; more than 8 bits stay what they are."""
    stored = _as_stored(picture)
    deep = stored.mode.startswith(("I", "F"))
    return stored if deep else stored.convert("L")


def _as_stored(picture: Any) -> Any:
    """The pixels in memory, the file closed."""
    with picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"it holds {picture.n_frames} pictures, and one is wanted")
        picture.load()
        return picture.copy()


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
