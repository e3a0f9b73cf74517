"""Lungs and infection in CT of COVID-19 patients: the twenty cases of Zenodo 3757476.

Ma et al. 2021, doi:10.1002/mp.14676.
"""

from __future__ import annotations

from pathlib import Path

from dpfast.segmentation.formats._format import Format, files_below, folder, one_of
from dpfast.segmentation.records import NIFTI_SUFFIXES, Record

__all__ = ["COVID_CT", "covid_ct_records"]

_IMAGES = ("COVID-19-CT-Seg_20cases", "ct_scans")
_LABELS = ("Lung_and_Infection_Mask", "lung_and_infection_mask")


def covid_ct_records(path: Path) -> list[Record]:
    """Find `COVID-19-CT-Seg_20cases/CASE.nii.gz` and `Lung_and_Infection_Mask/CASE.nii.gz`.

    `ct_scans` and `lung_and_infection_mask` with `.nii` files are taken as well, where a scan of
    `coronacases_001` may be named `coronacases_org_001`. The column "source" is coronacases or
    radiopaedia, which can be sites.

    Raises:
      ValueError: something is missing.
    """
    function = "covid_ct_records"
    folder(function, path)
    images = one_of(function, path, _IMAGES, "a folder of scans")
    labels = one_of(function, path, _LABELS, "a folder of label maps")
    records = []
    for image in files_below(function, images, "*.nii*", "scans"):
        case = image.name.split(".nii")[0].replace("_org_", "_")
        names = [f"{case}{ending}" for ending in NIFTI_SUFFIXES]
        records.append(
            Record(
                image=image,
                label=one_of(function, labels, names, "the scan's label map"),
                patient_id=case,
                name=case,
                columns={"source": case.split("_")[0]},
            )
        )
    return records


COVID_CT = Format(
    name="COVID-19 CT, lungs and infection",
    find=covid_ct_records,
    spatial_dims=3,
    class_names=("left lung", "right lung", "infection"),
    class_values=(0, 1, 2, 3),
    window=(-1000.0, 400.0),
)
