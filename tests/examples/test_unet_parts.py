"""The example's parts: data, sampling, gradients, accounting and Dice."""

import os
import random
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from _data import IMAGE_SIZE, VOLUME_SIZE, centre, dark_background, load_folder, make_phantoms
from _privacy import PrivacyGoal, calibrate_noise, epsilon_spent
from _training import (
    GradientEngine,
    Mechanism,
    Plan,
    build_unet,
    mean_foreground_dice,
    poisson_batches,
)
from monai.losses.dice import DiceCELoss
from PIL import Image
from torch import nn
from torch.func import functional_call, grad, vmap

import dpfast

EXPECTED_BATCH_SIZE = 4


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(24, 2, 0)


def plan(physical_batch_size=16):
    return Plan(1, 1, 0.5, EXPECTED_BATCH_SIZE, physical_batch_size, 0.9)


def mechanism(noise_multiplier, clipping="automatic"):
    return Mechanism(clipping, 1.0, noise_multiplier, dpfast.NoiseSource(seed=0))


def small_unet(data):
    return build_unet(2, data.num_classes, (4, 8), 0)


def flat(gradient):
    return torch.cat([value.flatten() for value in gradient.values()]).double()


@pytest.mark.parametrize("clipping", ["automatic", "flat", "auto_v", "psac"])
def test_private_gradient_moves_by_at_most_the_bound_when_a_record_is_removed(phantoms, clipping):
    model = small_unet(phantoms)
    engine = GradientEngine(model, phantoms, plan())
    whole = flat(engine.private([0, 1, 2, 3, 4], mechanism(0.0, clipping)))
    for removed in range(5):
        batch = [record for record in range(5) if record != removed]
        rest = flat(engine.private(batch, mechanism(0.0, clipping)))
        # 1e-5: the sums are rounded to float32.
        assert 0.01 < (whole - rest).norm() * EXPECTED_BATCH_SIZE <= 1.0 + 1e-5


def test_private_gradient_equals_that_of_torch_func(phantoms):
    model = small_unet(phantoms)
    batch = [0, 1, 5]
    criterion = DiceCELoss(include_background=False, softmax=True)
    # One-hot here because MONAI's own conversion writes in place, which vmap forbids.
    one_hot = nn.functional.one_hot(phantoms.labels[batch], phantoms.num_classes).movedim(-1, 1)

    def loss(params, image, target):
        return criterion(functional_call(model, params, (image[None],)), target[None])

    params = {name: value.detach() for name, value in model.named_parameters()}
    grads = vmap(grad(loss), (None, 0, 0))(params, phantoms.images[batch], one_hot.float())
    twin = dpfast.clip_and_noise(
        grads,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        clipping="automatic",
        expected_batch_size=EXPECTED_BATCH_SIZE,
    )
    found = GradientEngine(model, phantoms, plan()).private(batch, mechanism(0.0))
    torch.testing.assert_close(flat(found), flat(twin), rtol=0, atol=1e-5)


def test_private_gradient_does_not_depend_on_the_physical_batches(phantoms):
    model = small_unet(phantoms)
    batch = [0, 3, 4, 7, 9]
    results = [
        flat(GradientEngine(model, phantoms, plan(size)).private(batch, mechanism(1.0)))
        for size in (2, 5, 16)
    ]
    # Noise included: added per physical batch it would differ by about 1 / 4 everywhere.
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)


def test_empty_batch_releases_noise_of_the_stated_scale(phantoms):
    model = small_unet(phantoms)
    noise = flat(GradientEngine(model, phantoms, plan()).private([], mechanism(2.0)))
    # 5 standard errors of a sample standard deviation.
    tolerance = 5 / (2 * noise.numel()) ** 0.5
    assert noise.std() == pytest.approx(2.0 / EXPECTED_BATCH_SIZE, rel=tolerance)


def test_plain_gradient_is_the_mean_over_the_expected_batch(phantoms):
    model = small_unet(phantoms)
    engine = GradientEngine(model, phantoms, plan(2))
    batch = [0, 1, 2, 3, 4]
    mean = sum(flat(engine.plain([record])) for record in batch)
    torch.testing.assert_close(flat(engine.plain(batch)), mean, rtol=1e-4, atol=1e-6)
    assert flat(engine.plain([])).norm() == 0


def test_poisson_batches_include_every_record_at_the_sample_rate():
    batches = list(poisson_batches(50, 0.1, 2000, random.Random(0)))
    assert len(batches) == 2000
    sizes = np.array([len(batch) for batch in batches])
    # 5 standard errors of the mean and, roughly, of the variance of Binomial(50, 0.1).
    assert sizes.mean() == pytest.approx(5.0, abs=5 * (4.5 / 2000) ** 0.5)
    assert sizes.var() == pytest.approx(4.5, rel=5 * (2 / 2000) ** 0.5)
    assert list(poisson_batches(3, 1e-12, 2, random.Random(0))) == [[], []]


def test_epsilon_of_a_known_composition():
    # The value that PLD and PRV accountants agree on to the second decimal.
    assert epsilon_spent(1.0, 0.01, 1000, 1e-5) == pytest.approx(1.828, abs=0.005)


@pytest.mark.parametrize(("epsilon", "sample_rate", "steps"), [(8.0, 0.1, 50), (0.5, 0.3, 10)])
def test_calibrated_noise_spends_the_goal_and_no_more(epsilon, sample_rate, steps):
    noise_multiplier = calibrate_noise(PrivacyGoal(epsilon, 1e-5), sample_rate, steps)
    spent = epsilon_spent(noise_multiplier, sample_rate, steps, 1e-5)
    assert epsilon * 0.99 < spent <= epsilon


def test_dice_of_known_maps():
    labels = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])
    predictions = torch.tensor([[0, 1, 0, 2], [0, 0, 2, 0]])
    # Image 1: 2/3 and 1; image 2: absent from both (1) and a false positive (0).
    assert mean_foreground_dice(predictions, labels, 3) == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


@pytest.mark.parametrize(("dims", "classes"), [(2, 2), (3, 3)])
def test_phantoms_are_standardised_and_the_split_ignores_the_other_records(dims, classes):
    data, more = make_phantoms(30, dims, 0), make_phantoms(31, dims, 0)
    assert data.num_classes == classes
    assert sorted(data.labels.unique().tolist()) == list(range(classes))
    assert data.images.flatten(1).mean(1).abs().max() < 1e-4
    assert (data.images.flatten(1).std(1) - 1).abs().max() < 1e-2
    common = data.num_records
    assert common + len(data.validation_images) == 30
    torch.testing.assert_close(more.images[:common], data.images, rtol=0, atol=0)


def test_bright_background_is_inverted_and_a_dark_one_kept():
    dark = np.full((10, 10), 20.0, dtype=np.float32)
    dark[2:5, 2:5] = 200.0
    np.testing.assert_array_equal(dark_background(dark), dark)
    np.testing.assert_array_equal(dark_background(255 - dark), dark - 255)


def test_centre_crops_and_pads_about_the_middle():
    volume = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(centre(volume, (1, 6)), [[0, 4, 5, 6, 7, 0]])


def test_image_folder_is_read_whatever_the_modes_and_sizes(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(12):
        mask = np.zeros((40 + index, 60), dtype=np.uint16)
        mask[10:20, 10:30] = 300  # an instance number that 8 bits could not hold
        image = np.where(mask > 0, 200, 30).astype(np.uint8)
        colour = np.repeat(image[..., np.newaxis], 3, axis=2) if index % 2 else image
        Image.fromarray(colour).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
    data = load_folder(tmp_path, 2)
    assert data.images.shape[1:] == (1, *IMAGE_SIZE)
    assert data.labels.shape[1:] == IMAGE_SIZE
    inside = data.images[:, 0][data.labels == 1]
    assert inside.numel() > 0
    assert (inside > 0).double().mean() > 0.9
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"--data must hold readable files, got .*4\.png"):
        load_folder(tmp_path, 2)
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"--data must hold masks/3\.png"):
        load_folder(tmp_path, 2)


def test_volume_folder_is_read_and_checked(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for index in range(24):
        label = np.zeros((30, 50, 33), dtype=np.uint8)
        label[10:15, 20:25, 10:20] = 1
        label[15:20, 20:25, 10:20] = 2
        name = f"subject{index}.nii.gz"
        scan = nibabel.Nifti1Image(label * 1000.0 + 5.0, np.eye(4))
        nibabel.save(scan, tmp_path / "images" / name)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "labels" / name)
    data = load_folder(tmp_path, 3)
    assert data.images.shape[1:] == (1, *VOLUME_SIZE)
    assert (data.labels == 2).flatten(1).sum(1).tolist() == [250] * data.num_records
    one, two = (float(data.images[:, 0][data.labels == index].mean()) for index in (1, 2))
    assert 0 < one < two
    (tmp_path / "images" / "subject5.nii.gz").write_bytes(b"no volume")
    with pytest.raises(ValueError, match=r"--data must hold readable files, got .*subject5"):
        load_folder(tmp_path, 3)


@pytest.mark.parametrize(
    ("folder", "dims", "size", "unit", "records"),
    [
        ("dsb2018_nuclei", 2, IMAGE_SIZE, "one image", 664),
        ("msd_hippocampus", 3, VOLUME_SIZE, "one subject", 260),
    ],
)
def test_public_data_set_is_read_whole(folder, dims, size, unit, records):
    root = os.environ.get("DPFAST_DATA")
    if root is None:
        pytest.skip("DPFAST_DATA, the folder of the public data sets, is not set")
    data = load_folder(Path(root) / folder, dims)
    assert data.privacy_unit == unit
    assert data.num_records + len(data.validation_images) == records
    assert 0.1 < len(data.validation_images) / records < 0.3
    assert data.images.shape[1:] == (1, *size)
    assert data.images.isfinite().all()
    assert sorted(data.labels.unique().tolist()) == list(range(dims))
    foreground = data.labels > 0
    assert 0.01 < foreground.double().mean() < 0.3
    if dims == 2:
        # Nuclei must be the bright side after the per-image inversion, nearly everywhere.
        images = data.images[:, 0]
        contrast = [
            float(image[mask].mean() - image[~mask].mean())
            for image, mask in zip(images, foreground, strict=True)
            if mask.any()
        ]
        assert np.mean(np.array(contrast) > 0) > 0.95
