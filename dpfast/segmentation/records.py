"""Records of images and label maps: found in folders, joined with patients, split by patient.

A record names its files; nothing is read here but file names and an index of patients.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from numpy.typing import NDArray

from dpfast import _validate

__all__ = [
    "DatasetDescription",
    "ImageSource",
    "Record",
    "image_records",
    "nifti_records",
    "read_dataset_json",
    "split_by_patient",
]

# JPEG does not store a class number as it was, so it holds images alone.
LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff")
IMAGE_SUFFIXES = (*LOSSLESS_SUFFIXES, ".jpg", ".jpeg")
NIFTI_SUFFIXES = (".nii.gz", ".nii")
INDEX = "index.csv"

Array = NDArray[Any]
ImageSource = Path | tuple[Path, ...] | Array


class Record(TypedDict):
    """One image with its label map, as MONAI's transforms take it.

    Attributes:
      image: a file, files that are a channel each, or an array (*spatial,) or (channels, *spatial).
      label: a file, or an array (*spatial,).
      patient_id: whose it is; a patient may have several records.
      name: of the record, unlike every other's.
      columns: what an index says beside the patient: site, device, ...
    """

    image: ImageSource
    label: Path | Array
    patient_id: str
    name: str
    columns: dict[str, str]


RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class DatasetDescription:
    """What a dataset.json of the Medical Segmentation Decathlon says, all of it public.

    Attributes:
      name: of the data set.
      num_classes: background included.
      in_channels: modalities.
      class_names: of the foreground, from 1.
    """

    name: str
    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]


def image_records(
    path: str | os.PathLike[str], *, patient_column: str | None = None
) -> list[Record]:
    """Find 2D images and their masks: `images/NAME.png` and `masks/NAME.png`.

    Args:
      path: a folder with `images` (PNG, TIFF or JPEG) and `masks` or `labels` (PNG or TIFF) of the
        same names. An `index.csv` beside them, if there is one, holds a line for each image: the
        file's name, with or without its ending, in the first column, anything in the others.
      patient_column: of the index, where the patient's id is. None: each image is taken for a
        patient of its own.

    Returns:
      The records, sorted by name.

    Raises:
      ValueError: something is missing, or there twice; the message says what and where.
    """
    return _records("image_records", path, patient_column, IMAGE_SUFFIXES, LOSSLESS_SUFFIXES)


def nifti_records(
    path: str | os.PathLike[str], *, patient_column: str | None = None
) -> list[Record]:
    """Find NIfTI volumes and their label maps: `images/NAME.nii.gz` and `labels/NAME.nii.gz`.

    Args:
      path: a folder with `images` and `labels`, or with `imagesTr` and `labelsTr` as the Medical
        Segmentation Decathlon has them. An `index.csv` as `image_records` has it may be there.
      patient_column: of the index, where the patient's id is. None: one file is one patient.

    Returns:
      The records, sorted by name.

    Raises:
      ValueError: something is missing, or there twice; the message says what and where.
    """
    return _records("nifti_records", path, patient_column, NIFTI_SUFFIXES, NIFTI_SUFFIXES)


def read_dataset_json(path: str | os.PathLike[str]) -> DatasetDescription | None:
    """Read the dataset.json of a folder; None where there is none.

    Raises:
      ValueError: it cannot be read, or its classes are not numbered from 0 without a gap.
    """
    function, file = "read_dataset_json", Path(path) / "dataset.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        labels, modalities = content["labels"], content.get("modality") or content["channel_names"]
        # {"1": "name"} in the Decathlon, {"name": 1} in later sets of the same layout.
        named = {
            (int(key) if key.isdigit() else int(value)): (str(value) if key.isdigit() else key)
            for key, value in labels.items()
        }
        numbers = sorted(named)
        count = len(modalities)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{function}: {file} must be JSON with labels and modality, got "
            f"{type(error).__name__}: {error}"
        ) from error
    whole = numbers == list(range(len(labels)))
    if not whole or len(numbers) < 2 or count < 1:
        raise ValueError(
            f"{function}: labels in {file} must be numbered 0, 1, ... and modality not be empty, "
            f"got {numbers} and {count}"
        )
    names = tuple(named[number] for number in numbers[1:])
    return DatasetDescription(str(content.get("name", Path(path).name)), len(numbers), count, names)


def split_by_patient(
    records: Sequence[RecordT], validation_fraction: float = 0.2
) -> tuple[list[RecordT], list[RecordT]]:
    """Split records into training and validation, all of a patient on one side.

    The side follows from a hash of the patient's id and nothing else, so that adding or removing
    a patient moves nobody else.

    Args:
      records: as the functions of this module give them.
      validation_fraction: expected share of patients held out, 0 < f < 1.

    Raises:
      ValueError: a bad fraction, or a side without any record.
    """
    function = "split_by_patient"
    fraction = _validate.number(
        function, "validation_fraction", validation_fraction, minimum=0, maximum=1, exclusive=True
    )
    held_out = [_hash(record["patient_id"]) < fraction for record in records]
    pairs = list(zip(records, held_out, strict=True))
    training = [record for record, out in pairs if not out]
    validation = [record for record, out in pairs if out]
    if not training or not validation:
        raise ValueError(
            f"{function}: records must hold a patient for training and one for validation, got "
            f"{len(training)} and {len(validation)} records"
        )
    return training, validation


def _hash(patient_id: str) -> float:
    """A number in [0, 1) that looks random, the same for the same patient everywhere."""
    digest = hashlib.sha256(patient_id.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2.0**32


def _records(
    function: str,
    path: str | os.PathLike[str],
    patient_column: str | None,
    image_suffixes: Sequence[str],
    label_suffixes: Sequence[str],
) -> list[Record]:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{function}: path must be a folder, got {folder}")
    image_folder, label_folder = _folders(function, folder)
    images = _files(function, image_folder, image_suffixes)
    labels = _files(function, label_folder, label_suffixes)
    for name in sorted({**images, **labels}):
        for found, where in ((images, image_folder), (labels, label_folder)):
            if name not in found:
                raise ValueError(
                    f"{function}: {name} must have an image and a label map, got none in {where}"
                )
    rows = _index(function, folder, images, patient_column)
    return [
        Record(
            image=images[name],
            label=labels[name],
            patient_id=name if patient_column is None else rows[name][patient_column],
            name=name,
            columns=rows.get(name, {}),
        )
        for name in sorted(images)
    ]


def _folders(function: str, folder: Path) -> tuple[Path, Path]:
    """Where images are and where label maps."""
    layouts = [("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr")]
    found = [pair for pair in layouts if all((folder / name).is_dir() for name in pair)]
    if len(found) != 1:
        raise ValueError(
            f"{function}: path must hold the folders images and masks, or images and labels, or "
            f"imagesTr and labelsTr, got {'none' if not found else 'several'} of these in {folder}"
        )
    return folder / found[0][0], folder / found[0][1]


def _files(function: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by their names without the ending; hidden ones are left out."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        suffix = next((s for s in suffixes if file.name.lower().endswith(s)), None)
        if suffix is None:
            raise ValueError(
                f"{function}: files of {folder} must end in {', '.join(suffixes)}, got {file.name}"
            )
        name = file.name[: -len(suffix)]
        if name in found:
            raise ValueError(
                f"{function}: {name} must be there once, got {found[name].name} and {file.name} in "
                f"{folder}"
            )
        found[name] = file
    if not found:
        raise ValueError(f"{function}: {folder} must hold {', '.join(suffixes)}, got no such file")
    return found


def _index(
    function: str, folder: Path, images: dict[str, Path], patient_column: str | None
) -> dict[str, dict[str, str]]:
    """The index's line for each image; none without an index."""
    file = folder / INDEX
    if not file.is_file():
        if patient_column is not None:
            raise ValueError(
                f"{function}: patient_column {patient_column!r} needs {INDEX}, got none in {folder}"
            )
        return {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{function}: {file} must be a CSV file, got {error}") from error
    if not columns or (patient_column is not None and patient_column not in columns):
        raise ValueError(
            f"{function}: {file} must have the column {patient_column!r}, got {', '.join(columns)}"
        )
    names = {image.name: name for name, image in images.items()} | {name: name for name in images}
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{function}: line {number} of {file} must have {len(columns)} values")
        name = names.get(row[columns[0]])
        if name is None:
            continue  # of an image that is somewhere else, at another site perhaps
        if name in found:
            raise ValueError(f"{function}: {name} must be in {file} once, got it again")
        found[name] = row
    for name in images:
        if name not in found:
            raise ValueError(
                f"{function}: {name} must be in column {columns[0]!r} of {file}, got no such line"
            )
        if patient_column is not None and not found[name][patient_column].strip():
            raise ValueError(
                f"{function}: {name} must have a {patient_column} in {file}, got an empty one"
            )
    return found
