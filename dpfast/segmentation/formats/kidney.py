"""Kidneys and their tumours in CT: KiTS19, KiTS21 and KiTS23.

Heller et al. 2021, doi:10.1016/j.media.2020.101821; Heller et al. 2023, arXiv:2307.01984.
"""

from __future__ import annotations

from pathlib import Path

from dpfast.segmentation.formats._format import Format, files_below, folder, one_of
from dpfast.segmentation.records import Record

__all__ = ["KITS19", "KITS23", "kits_records"]

# Published without segmentations, beside those with them.
_TEST_CASES = range(210, 300)
_LABELS = ("segmentation.nii.gz", "aggregated_MAJ_seg.nii.gz")


def kits_records(path: Path) -> list[Record]:
    """Find `case_NNNNN` folders of `imaging.nii.gz` with a segmentation.

    They are in `data` or `dataset` as the challenge's repositories have them, or in `path` itself.
    The segmentation is `segmentation.nii.gz`, or in KiTS21 `aggregated_MAJ_seg.nii.gz`. Cases 210
    to 299 are left out where they have none: they were the first challenge's test.

    Raises:
      ValueError: something is missing.
    """
    function = "kits_records"
    folder(function, path)
    root = next((path / name for name in ("data", "dataset") if (path / name).is_dir()), path)
    records = []
    for case in files_below(function, root, "case_[0-9]*", "folders of cases"):
        held = any((case / name).is_file() for name in _LABELS)
        number = case.name.removeprefix("case_")
        if not held and number.isdigit() and int(number) in _TEST_CASES:
            continue
        records.append(
            Record(
                image=one_of(function, case, ["imaging.nii.gz"], "the case's CT"),
                label=one_of(function, case, _LABELS, "its segmentation"),
                patient_id=case.name,
                name=case.name,
                columns={},
            )
        )
    if not records:
        raise ValueError(f"{function}: {root} must hold a case with a segmentation, got none")
    return records


# From fat to enhanced vessels.
_WINDOW = (-80.0, 300.0)
_CASE_FILES = (("imaging.nii.gz",),)
KITS19 = Format(
    name="KiTS19, kidneys and tumours",
    find=kits_records,
    spatial_dims=3,
    class_names=("kidney", "tumour"),
    class_values=(0, 1, 2),
    window=_WINDOW,
    case_files=_CASE_FILES,
)
KITS23 = Format(
    name="KiTS21/23, kidneys, tumours and cysts",
    find=kits_records,
    spatial_dims=3,
    class_names=("kidney", "tumour", "cyst"),
    class_values=(0, 1, 2, 3),
    window=_WINDOW,
    case_files=_CASE_FILES,
)
