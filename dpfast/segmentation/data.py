"""From data settings to what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dpfast.segmentation.data_settings import (
    DataSettings,
    ImageData,
    NiftiData,
    PhantomData,
    PublicData,
)
from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.phantoms import (
    look_records,
    look_task,
    phantom_records,
    phantom_task,
)
from dpfast.segmentation.records import (
    DatasetDescription,
    Record,
    image_records,
    nifti_records,
    read_dataset_json,
    split_by_patient,
)
from dpfast.segmentation.task import SegmentationTask, make_dataset

__all__ = ["Data", "find_records", "find_task", "load_data", "make_data"]


@dataclass(frozen=True)
class Data:
    """A task with its records, split by patient.

    Attributes:
      num_training, num_validation: how many there are, by privacy unit ("sample", "patient"). The
        number of protected units is public; how many samples protected patients have is not.
    """

    task: SegmentationTask
    training: Dataset[dict[str, Any]]
    validation: Dataset[dict[str, Any]]
    num_training: dict[str, int]
    num_validation: dict[str, int]

    def summary(self, unit: str) -> dict[str, Any]:
        """The public facts where `unit` is protected; JSON-able."""
        return {
            "name": self.task.name,
            "classes": self.task.num_classes,
            "image_size": list(self.task.image_size),
            "unit": unit,
            "training_units": self.num_training[unit],
            "validation_units": self.num_validation[unit],
        }


def load_data(settings: DataSettings) -> Data:
    """Find the records, split them by patient, and read them as their task says.

    Raises:
      ValueError: something is missing or cannot be read.
    """
    return make_data(*find_records(settings), settings)


def make_data(task: SegmentationTask, records: Sequence[Record], settings: DataSettings) -> Data:
    """Split records by patient, and read them as their task says.

    Raises:
      ValueError: a record cannot be read, or there are too few patients.
    """
    training, validation = split_by_patient(records, settings.validation_fraction)
    cache = isinstance(settings, PhantomData) or settings.cache
    return Data(
        task,
        make_dataset(training, task, cache=cache),
        make_dataset(validation, task, cache=cache),
        _count(training),
        _count(validation),
    )


def find_task(settings: DataSettings) -> SegmentationTask:
    """The task; no image is looked for.

    Raises:
      ValueError: its settings do not fit.
    """
    if isinstance(settings, PhantomData):
        ellipses = settings.look == "ellipses"
        return phantom_task(settings.spatial_dims) if ellipses else look_task(settings.look)
    if isinstance(settings, PublicData):
        return _public_task(settings)
    return _image_task(settings) if isinstance(settings, ImageData) else _nifti_task(settings)


def find_records(settings: DataSettings) -> tuple[SegmentationTask, list[Record]]:
    """The task, and where its records are.

    Raises:
      ValueError: something is missing.
    """
    return find_task(settings), _records(settings)


def _records(settings: DataSettings) -> list[Record]:
    if isinstance(settings, PhantomData):
        if settings.look != "ellipses":
            return look_records(
                settings.look, settings.patients, sites=settings.sites, seed=settings.seed
            )
        return phantom_records(
            settings.patients,
            settings.spatial_dims,
            slices_per_patient=settings.slices_per_patient,
            seed=settings.seed,
        )
    if isinstance(settings, PublicData):
        return FORMATS[settings.kind].find(Path(settings.path))
    find = image_records if isinstance(settings, ImageData) else nifti_records
    return find(settings.path, patient_column=settings.patient_column)


def _public_task(settings: PublicData) -> SegmentationTask:
    described = FORMATS[settings.kind]
    return SegmentationTask(
        name=described.name,
        spatial_dims=described.spatial_dims,
        num_classes=len(described.class_values),
        image_size=tuple(settings.image_size),
        in_channels=described.in_channels,
        labels="foreground" if described.foreground else "classes",
        fit=settings.fit,
        class_names=described.class_names,
        class_values=described.class_values,
        spacing=None if settings.spacing is None else tuple(settings.spacing),
        window=described.window if settings.window is None else _pair(settings.window),
    )


def _image_task(settings: ImageData) -> SegmentationTask:
    return SegmentationTask(
        name=Path(settings.path).resolve().name,
        spatial_dims=2,
        num_classes=settings.num_classes,
        image_size=tuple(settings.image_size),
        labels=settings.labels,
        fit=settings.fit,
        dark_background=settings.dark_background,
    )


def _nifti_task(settings: NiftiData) -> SegmentationTask:
    described = _nifti_facts(settings)
    return SegmentationTask(
        name=described.name,
        spatial_dims=3,
        num_classes=described.num_classes,
        image_size=tuple(settings.image_size),
        in_channels=described.in_channels,
        fit=settings.fit,
        dark_background=settings.dark_background,
        class_names=described.class_names,
        spacing=None if settings.spacing is None else tuple(settings.spacing),
        window=None if settings.window is None else _pair(settings.window),
    )


def _nifti_facts(settings: NiftiData) -> DatasetDescription:
    """Name, classes and channels: of dataset.json where there is one, else of the settings."""
    described = read_dataset_json(settings.path)
    if described is None:
        if settings.num_classes is None:
            raise ValueError(
                f"data.num_classes must be given, since there is no dataset.json in {settings.path}"
            )
        name = Path(settings.path).resolve().name
        return DatasetDescription(name, settings.num_classes, settings.in_channels or 1, ())
    for name in ("num_classes", "in_channels"):
        ours, theirs = getattr(settings, name), getattr(described, name)
        if ours not in (None, theirs):
            raise ValueError(f"data.{name} must be {theirs} as in dataset.json, got {ours}")
    return described


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return low, high


def _count(records: Sequence[Record]) -> dict[str, int]:
    patients = {record["patient_id"] for record in records}
    return {"sample": len(records), "patient": len(patients)}
