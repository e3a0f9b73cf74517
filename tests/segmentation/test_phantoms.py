"""Phantoms: what they show, and that each follows from its number alone."""

import numpy as np
import pytest
import torch

from dpfast.segmentation import make_dataset, phantom_records, phantom_task


@pytest.mark.parametrize(("dims", "classes"), [(2, 2), (3, 3)])
def test_phantoms_fit_their_task_and_are_scaled(dims, classes):
    task = phantom_task(dims)
    dataset = make_dataset(phantom_records(30, dims), task)
    images = torch.stack([entry["image"] for entry in dataset])
    labels = torch.stack([entry["label"] for entry in dataset])
    assert images.shape == labels.shape == (30, 1, *task.image_size)
    assert task.num_classes == classes
    assert labels.unique().tolist() == list(range(classes))
    assert images.flatten(1).mean(1).abs().max() < 1e-4
    assert (images.flatten(1).std(1) - 1).abs().max() < 1e-2
    # Bright and, in 3D, dark ellipses: there is something to learn, and it is not all there is.
    signs = [images[labels == c].mean() - images[labels == 0].mean() for c in range(1, classes)]
    assert [float(sign) > 0 for sign in signs] == [True, False][: classes - 1]
    assert 0.005 < (labels > 0).double().mean() < 0.3


def test_a_phantom_follows_from_seed_and_number_alone():
    few, many = phantom_records(3, seed=4), phantom_records(5, seed=4)
    for one, other in zip(few, many, strict=False):
        assert one["name"] == other["name"]
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    assert not np.array_equal(many[0]["image"], phantom_records(1, seed=5)[0]["image"])
    assert len({record["image"].tobytes() for record in many}) == 5


@pytest.mark.parametrize("dims", [2, 3])
def test_slices_of_a_patient_resemble_one_another(dims):
    records = phantom_records(12, dims, slices_per_patient=3)
    assert len({record["name"] for record in records}) == 36
    patients = [record["patient_id"] for record in records]
    assert [patients.count(p) for p in dict.fromkeys(patients)] == [3] * 12
    labels = np.stack([record["label"].reshape(-1) > 0 for record in records]).reshape(12, 3, -1)
    sizes = labels.sum(-1)
    assert (np.diff(sizes, axis=1) <= 0).all()
    assert (sizes[:, 2] < sizes[:, 0]).mean() > 0.9
    same = (labels[:, 0] & labels[:, 1]).sum() / (labels[:, 0] | labels[:, 1]).sum()
    others = np.roll(labels[:, 1], 1, axis=0)
    different = (labels[:, 0] & others).sum() / (labels[:, 0] | others).sum()
    assert same > 0.4 > 0.2 > different


@pytest.mark.parametrize(
    "settings",
    [{"patients": 0}, {"spatial_dims": 1}, {"slices_per_patient": 0}, {"seed": -1}],
)
def test_phantoms_of_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="phantom_records: patients and slices_per_patient"):
        phantom_records(**{"patients": 2, **settings})
    if "spatial_dims" in settings:
        with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
            phantom_task(1)
