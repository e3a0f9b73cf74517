"""Phantoms of tasks: they fit their task, sites differ, and each follows from its number alone."""

import numpy as np
import pytest
import torch

from dpfast.segmentation import make_dataset
from dpfast.segmentation.data_settings import PhantomData
from dpfast.segmentation.phantoms import LOOKS, look_records, look_task, site_shift


@pytest.mark.parametrize("look", LOOKS)
def test_phantoms_have_every_class_of_their_task(look):
    task = look_task(look)
    dataset = make_dataset(look_records(look, 12, sites=3), task)
    labels = torch.stack([entry["label"] for entry in dataset])
    assert dataset[0]["image"].shape == (task.in_channels, *task.image_size)
    assert labels.unique().tolist() == list(range(task.num_classes))
    assert 0.01 < (labels > 0).double().mean() < 0.7


@pytest.mark.parametrize("look", LOOKS)
def test_classes_can_be_told_apart_by_what_is_seen(look):
    """The mean intensity of a class is not that of the background, or not that of the others."""
    task = look_task(look)
    entry = make_dataset(look_records(look, 1, seed=2), task)[0]
    image, label = entry["image"], entry["label"][0]
    present = [c for c in range(1, task.num_classes) if (label == c).any()]
    for number in present:
        own = image[:, label == number].mean(1)
        others = [image[:, label == 0], image[:, (label > 0) & (label != number)]]
        apart = max(float((own - each.mean(1)).abs().max()) for each in others if each.numel())
        assert apart > 0.2, (look, number)


@pytest.mark.parametrize("look", LOOKS)
def test_a_phantom_follows_from_seed_and_number_alone(look):
    few, many = look_records(look, 3, sites=3), look_records(look, 6, sites=3)
    for one, other in zip(few, many, strict=False):
        assert one["name"] == other["name"]
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    assert [r["columns"]["site"] for r in many] == ["site 1", "site 2", "site 3"] * 2
    assert not np.array_equal(few[0]["image"], look_records(look, 1, seed=1)[0]["image"])


def test_sites_differ_in_contrast_noise_zoom_and_prevalence():
    shifts = [site_shift(site, 0) for site in range(5)]
    for name in ("contrast", "noise", "zoom", "prevalence"):
        assert len({getattr(shift, name) for shift in shifts}) == 5


def test_prevalence_is_the_share_with_a_tumour():
    records = look_records("kidney", 60, sites=2, seed=3)
    for site in (0, 1):
        with_tumour = [(record["label"] == 2).any() for record in records[site::2]]
        # 30 patients: within three standard deviations of the share.
        assert abs(np.mean(with_tumour) - site_shift(site, 3).prevalence) < 3 * 0.5 / 30**0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liver", 3), "look must be one of brain, kidney, retina, skin, got 'liver'"),
        (("skin", 0), "patients >= sites"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        look_records(*arguments)
    with pytest.raises(ValueError, match="sites has no effect with look 'ellipses'"):
        PhantomData(kind="phantoms", sites=3)
    with pytest.raises(ValueError, match="spatial_dims has no effect with look 'skin'"):
        PhantomData(kind="phantoms", look="skin", spatial_dims=2)
