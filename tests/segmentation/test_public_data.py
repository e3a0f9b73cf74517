"""The public data sets, whole, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dpfast.segmentation import (
    SegmentationTask,
    image_records,
    make_dataset,
    nifti_records,
    split_by_patient,
)

DATA = os.environ.get("DPFAST_DATA")
pytestmark = pytest.mark.skipif(
    DATA is None, reason="DPFAST_DATA, the folder of the public data sets, is not set"
)


def stacked(dataset):
    return (torch.stack([entry[key] for entry in dataset]) for key in ("image", "label"))


def test_nuclei_are_read_whole_and_are_bright():
    records = image_records(Path(DATA) / "dsb2018_nuclei")
    task = SegmentationTask("n", 2, 2, (64, 64), labels="foreground", dark_background=True)
    images, labels = stacked(make_dataset(records, task))
    assert images.shape == labels.shape == (664, 1, 64, 64)
    assert images.isfinite().all()
    assert labels.unique().tolist() == [0, 1]
    assert (labels > 0).double().mean() == pytest.approx(0.139, abs=0.005)
    assert {record["columns"]["colour"] for record in records} == {"gray", "colour"}
    # Nuclei must be the bright side after the per-image inversion, nearly everywhere.
    contrast = [
        float(image[label > 0].mean() - image[label == 0].mean())
        for image, label in zip(images, labels, strict=True)
        if label.any()
    ]
    assert np.mean(np.array(contrast) > 0) > 0.95


def test_hippocampi_are_read_whole():
    records = nifti_records(Path(DATA) / "msd_hippocampus")
    training, validation = split_by_patient(records)
    assert len(training) + len(validation) == 260
    assert 0.1 < len(validation) / 260 < 0.3
    task = SegmentationTask("h", 3, 3, (32, 48, 32), fit="crop_or_pad")
    images, labels = stacked(make_dataset(records, task))
    assert images.shape == labels.shape == (260, 1, 32, 48, 32)
    assert images.isfinite().all()
    # Every subject has both parts of the hippocampus.
    assert all(label.unique().tolist() == [0, 1, 2] for label in labels)
    assert 0.01 < (labels > 0).double().mean() < 0.3


def test_chest_x_rays_have_seven_classes_and_37_patients():
    records = image_records(Path(DATA) / "covid_cxr_multiclass", patient_column="patientid")
    assert len({record["patient_id"] for record in records}) == 37
    training, validation = split_by_patient(records)
    assert not {r["patient_id"] for r in training} & {r["patient_id"] for r in validation}
    _, labels = stacked(make_dataset(records, SegmentationTask("x", 2, 7, (64, 64))))
    assert len(labels) == 44
    assert labels.unique().tolist() == list(range(7))
