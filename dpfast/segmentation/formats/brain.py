"""Brain tumours in MRI: BraTS 2020 and 2021 (3D, four sequences), and LGG (2D, three sequences).

Menze et al. 2015, doi:10.1109/TMI.2014.2377694; Baid et al. 2021, arXiv:2107.02314; LGG: Buda,
Saha and Mazurowski 2019, doi:10.1016/j.compbiomed.2019.05.002.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from dpfast.segmentation.formats._format import Format, files_below, folder, one_of
from dpfast.segmentation.records import NIFTI_SUFFIXES, Record

__all__ = ["BRATS", "LGG", "brats_records", "lgg_records"]

_SEQUENCES = ("t1", "t1ce", "t2", "flair")
_CASES = "BraTS*[0-9]"
_NAMES = "name_mapping.csv"


def brats_records(path: Path) -> list[Record]:
    """Find case folders of `CASE_t1`, `_t1ce`, `_t2`, `_flair` and `_seg` (`.nii.gz` or `.nii`).

    They are in `path`, or one folder below it. BraTS 2020's `name_mapping.csv`, if it is beside
    them, gives the column "institution", which can be sites.

    Raises:
      ValueError: something is missing.
    """
    function = "brats_records"
    folder(function, path)
    pattern = _CASES if any(path.glob(_CASES)) else f"*/{_CASES}"
    cases = [each for each in files_below(function, path, pattern, "cases") if each.is_dir()]
    if not cases:
        raise ValueError(f"{function}: {path} must hold folders of cases, got files alone")
    institutions = _institutions(function, cases[0].parent / _NAMES)
    records = []
    for case in cases:
        files = [
            one_of(
                function,
                case,
                [f"{case.name}_{kind}{ending}" for ending in NIFTI_SUFFIXES],
                f"the case's {kind}",
            )
            for kind in (*_SEQUENCES, "seg")
        ]
        where = institutions.get(case.name)
        records.append(
            Record(
                image=tuple(files[:-1]),
                label=files[-1],
                patient_id=case.name,
                name=case.name,
                columns={} if where is None else {"institution": where},
            )
        )
    return records


def _institutions(function: str, file: Path) -> dict[str, str]:
    """By case: the name of 2019, BraTS19_INSTITUTION_CASE_1, has it."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    found = {}
    for row in rows:
        names = {key.lower(): value for key, value in row.items() if isinstance(key, str)}
        now, before = names.get("brats_2020_subject_id"), names.get("brats_2019_subject_id") or ""
        if not now:
            raise ValueError(f"{function}: {file} must have a column BraTS_2020_subject_ID")
        match = re.match(r"BraTS19_([^_]+)_", before)
        found[now] = match[1] if match else "unknown"
    return found


def lgg_records(path: Path) -> list[Record]:
    """Find `TCGA_SITE_PATIENT_DATE/*.tif` with their `*_mask.tif`.

    They are in `path` or in `kaggle_3m` below it. Each picture is a slice: before contrast, FLAIR
    and after contrast as red, green and blue. The column "institution" can be sites.

    Raises:
      ValueError: something is missing.
    """
    function = "lgg_records"
    folder(function, path)
    root = path / "kaggle_3m" if (path / "kaggle_3m").is_dir() else path
    records = []
    for case in files_below(function, root, "TCGA_*_*", "folders of patients"):
        parts = case.name.split("_")
        for image in files_below(function, case, "*.tif", "slices"):
            if image.stem.endswith("_mask"):
                continue
            records.append(
                Record(
                    image=image,
                    label=one_of(function, case, [f"{image.stem}_mask.tif"], "the slice's mask"),
                    patient_id="_".join(parts[:3]),
                    name=image.stem,
                    columns={"institution": parts[1]},
                )
            )
    return sorted(records, key=_by_slice)


def _by_slice(record: Record) -> tuple[str, int]:
    stem, _, number = record["name"].rpartition("_")
    return stem, int(number) if number.isdigit() else 0


BRATS = Format(
    name="BraTS 2020/21, brain tumours",
    find=brats_records,
    spatial_dims=3,
    class_names=("necrotic core", "oedema", "enhancing tumour"),
    class_values=(0, 1, 2, 4),
    in_channels=len(_SEQUENCES),
    case_files=tuple(
        tuple(f"{{case}}_{kind}{ending}" for ending in NIFTI_SUFFIXES) for kind in _SEQUENCES
    ),
)
LGG = Format(
    name="LGG, brain tumours",
    find=lgg_records,
    spatial_dims=2,
    class_names=("tumour",),
    class_values=(0, 255),
    in_channels=3,
    foreground=True,
)
