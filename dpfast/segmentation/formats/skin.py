"""Skin lesions in dermoscopic images: ISIC 2018 (task 1) and HAM10000.

Codella et al. 2019, arXiv:1902.03368; Tschandl, Rosendahl and Kittler 2018,
doi:10.1038/sdata.2018.161; masks of HAM10000: Tschandl et al. 2020, doi:10.1038/s41591-020-0942-0.
"""

from __future__ import annotations

import csv
from pathlib import Path

from dpfast.segmentation.formats._format import Format, files_below, folder, one_of
from dpfast.segmentation.records import Record

__all__ = ["HAM10000", "ISIC2018", "ham10000_records", "isic2018_records"]

_MASK = "_segmentation.png"


def isic2018_records(path: Path) -> list[Record]:
    """Find `ISIC2018_Task1-2_PART_Input/*.jpg` and their masks, `ISIC2018_Task1_PART_GroundTruth`.

    Nobody says whose an image is, so each is taken for a patient of its own. The column "part" is
    Training, Validation or Test, whichever are there.

    Raises:
      ValueError: something is missing.
    """
    function = "isic2018_records"
    inputs = files_below(
        function, folder(function, path), "ISIC2018_Task1-2_*_Input", "folders of images"
    )
    records = []
    for images in inputs:
        part = images.name.removeprefix("ISIC2018_Task1-2_").removesuffix("_Input")
        masks = folder(function, path / f"ISIC2018_Task1_{part}_GroundTruth")
        for image in files_below(function, images, "*.jpg", "images"):
            mask = one_of(function, masks, [f"{image.stem}{_MASK}"], "the image's mask")
            records.append(_record(image, mask, image.stem, {"part": part}))
    return records


def ham10000_records(path: Path) -> list[Record]:
    """Find `HAM10000_images_part_1` and `_2` (or `images`), masks and metadata.

    A lesion may be in several images; they stay together in every split. Whose a lesion is nobody
    says. The metadata's columns can be sites: `dataset` is where an image was taken.

    Raises:
      ValueError: something is missing, or the metadata lack an image.
    """
    function = "ham10000_records"
    folder(function, path)
    parts = [each for each in sorted(path.glob("HAM10000_images_part_[12]")) if each.is_dir()]
    parts = parts or [
        one_of(function, path, ["HAM10000_images_part_1", "images"], "a folder of images")
    ]
    masks = one_of(
        function, path, ["HAM10000_segmentations_lesion_tschandl", "masks"], "a folder of masks"
    )
    lines = _metadata(
        function,
        one_of(function, path, ["HAM10000_metadata", "HAM10000_metadata.csv"], "a table of images"),
    )
    records = []
    for part in parts:
        for image in files_below(function, part, "*.jpg", "images"):
            if image.stem not in lines:
                raise ValueError(f"{function}: {image.stem} must be in the metadata, got no line")
            mask = one_of(function, masks, [f"{image.stem}{_MASK}"], "the image's mask")
            line = lines[image.stem]
            records.append(_record(image, mask, line["lesion_id"], line))
    return sorted(records, key=lambda record: record["name"])


def _metadata(function: str, file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        if not row.get("image_id") or not row.get("lesion_id"):
            raise ValueError(f"{function}: lines of {file} must have image_id and lesion_id")
    return {row["image_id"]: row for row in rows}


def _record(image: Path, mask: Path, owner: str, columns: dict[str, str]) -> Record:
    return Record(image=image, label=mask, patient_id=owner, name=image.stem, columns=columns)


ISIC2018 = Format(
    name="ISIC 2018, skin lesions",
    find=isic2018_records,
    spatial_dims=2,
    class_names=("lesion",),
    class_values=(0, 255),
    in_channels=3,
    foreground=True,
    has_patients=False,
)
HAM10000 = Format(
    name="HAM10000, skin lesions",
    find=ham10000_records,
    spatial_dims=2,
    class_names=("lesion",),
    class_values=(0, 255),
    in_channels=3,
    foreground=True,
    has_patients=False,
)
