"""From data settings to what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dpfast.segmentation.phantoms import phantom_records, phantom_task
from dpfast.segmentation.records import (
    Record,
    image_records,
    nifti_records,
    read_dataset_json,
    split_by_patient,
)
from dpfast.segmentation.settings import DataSettings, ImageData, NiftiData, PhantomData
from dpfast.segmentation.task import SegmentationTask, make_dataset

__all__ = ["Data", "find_records", "load_data", "make_data"]


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


def find_records(settings: DataSettings) -> tuple[SegmentationTask, list[Record]]:
    """The task, and where its records are.

    Raises:
      ValueError: something is missing.
    """
    if isinstance(settings, PhantomData):
        records = phantom_records(
            settings.patients,
            settings.spatial_dims,
            slices_per_patient=settings.slices_per_patient,
            seed=settings.seed,
        )
        return phantom_task(settings.spatial_dims), records
    channels, name, labels = 1, Path(settings.path).resolve().name, "classes"
    if isinstance(settings, ImageData):
        records = image_records(settings.path, patient_column=settings.patient_column)
        classes, labels = settings.num_classes, settings.labels
    else:
        records = nifti_records(settings.path, patient_column=settings.patient_column)
        name, classes, channels = _nifti_facts(settings)
    task = SegmentationTask(
        name=name,
        spatial_dims=len(settings.image_size),
        num_classes=classes,
        image_size=tuple(settings.image_size),
        in_channels=channels,
        labels=labels,
        fit=settings.fit,
        dark_background=settings.dark_background,
    )
    return task, records


def _nifti_facts(settings: NiftiData) -> tuple[str, int, int]:
    """Name, classes and channels: of dataset.json where there is one, else of the settings."""
    described = read_dataset_json(settings.path)
    if described is None:
        if settings.num_classes is None:
            raise ValueError(
                f"data.num_classes must be given, since there is no dataset.json in {settings.path}"
            )
        name = Path(settings.path).resolve().name
        return name, settings.num_classes, settings.in_channels or 1
    for name in ("num_classes", "in_channels"):
        ours, theirs = getattr(settings, name), getattr(described, name)
        if ours not in (None, theirs):
            raise ValueError(f"data.{name} must be {theirs} as in dataset.json, got {ours}")
    return described.name, described.num_classes, described.in_channels


def _count(records: Sequence[Record]) -> dict[str, int]:
    patients = {record["patient_id"] for record in records}
    return {"sample": len(records), "patient": len(patients)}
