"""How a record becomes tensors: reading, sizes, scaling, checks, and by itself alone."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from PIL import Image

from dpfast.segmentation import (
    SegmentationTask,
    image_records,
    make_dataset,
    nifti_records,
)
from tests.segmentation.folders import make_image_folder, make_volume_folder

IMAGES = SegmentationTask("images", 2, 2, (32, 48), labels="foreground")
VOLUMES = SegmentationTask("volumes", 3, 3, (32, 48, 32), fit="crop_or_pad")


def in_memory(image, label, name="one"):
    return {"image": image, "label": label, "patient_id": "p", "name": name, "columns": {}}


def one(record, task):
    return make_dataset([record], task)[0]


def test_pictures_of_any_mode_and_size_become_gray_and_of_one_size(tmp_path):
    dataset = make_dataset(image_records(make_image_folder(tmp_path)), IMAGES)
    assert isinstance(dataset, CacheDataset)
    for entry in dataset:
        assert set(entry) == {"image", "label", "patient_id", "name"}
        assert type(entry["image"]) is type(entry["label"]) is torch.Tensor
        assert (entry["image"].dtype, entry["label"].dtype) == (torch.float32, torch.int64)
        assert entry["image"].shape == entry["label"].shape == (1, 32, 48)
        assert set(entry["label"].unique().tolist()) == {0, 1}
        # Height and width in their places: the mask lies left and above the middle.
        rows, columns = entry["label"][0].nonzero().double().mean(0).tolist()
        assert (rows / 32, columns / 48) == pytest.approx((15 / 42, 20 / 60), abs=0.05)
        inside = entry["image"][entry["label"] == 1]
        assert (inside > 0).double().mean() > 0.9


def test_deep_pictures_keep_their_range(tmp_path):
    make_image_folder(tmp_path, 1)
    pixels = np.linspace(0, 60000, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    image = make_dataset(image_records(tmp_path), IMAGES)[0]["image"]
    # Cut to 8 bits almost all of it would be one value.
    assert len(image.unique()) > 1000


def test_class_maps_in_pictures_keep_their_numbers(tmp_path):
    make_image_folder(tmp_path, 1, labels="labels")
    classes = np.arange(40 * 60).reshape(40, 60) % 7
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "labels" / "0.png")
    task = SegmentationTask("classes", 2, 7, (40, 60))
    label = make_dataset(image_records(tmp_path), task)[0]["label"]
    np.testing.assert_array_equal(label[0].numpy(), classes)


def test_resizing_labels_makes_no_new_class():
    label = np.zeros((21, 21), np.int64)
    label[:, 7:14], label[:, 14:] = 3, 1
    entry = one(
        in_memory(label * 1.0, label), SegmentationTask("classes", 2, 4, (64, 10), fit="resize")
    )
    assert set(entry["label"].unique().tolist()) == {0, 1, 3}
    shares = [(entry["label"] == c).double().mean() for c in (0, 3, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.1)


def test_volumes_are_scaled_then_cropped_and_padded_about_the_middle(tmp_path):
    dataset = make_dataset(nifti_records(make_volume_folder(tmp_path)), VOLUMES)
    for entry in dataset:
        assert entry["image"].shape == entry["label"].shape == (1, 32, 48, 32)
        assert [(entry["label"] == c).sum() for c in (1, 2)] == [250, 250]
        background, first, second = (
            float(entry["image"][entry["label"] == c].mean()) for c in range(3)
        )
        assert background < 0 < first < second
        # Padding (30 to 32 in the first axis) is the image's mean, which is 0.
        assert entry["image"][:, [0, -1]].abs().max() == 0
    volume = np.arange(12.0).reshape(3, 4)
    entry = one(
        in_memory(volume, volume.astype(int) % 2),
        SegmentationTask("x", 2, 2, (1, 6), fit="crop_or_pad"),
    )
    scaled = (volume[1] - volume.mean()) / volume.std()
    np.testing.assert_allclose(entry["image"][0, 0].numpy(), [0, *scaled, 0], rtol=1e-5)
    assert entry["label"][0, 0].tolist() == [0, 0, 1, 0, 1, 0]


def test_channels_are_scaled_each_by_itself(tmp_path):
    records = nifti_records(make_volume_folder(tmp_path, 2, ("imagesTr", "labelsTr"), channels=2))
    task = SegmentationTask("mr", 3, 3, (30, 50, 33), in_channels=2)
    image = make_dataset(records, task)[0]["image"]
    assert image.shape == (2, 30, 50, 33)
    # One is the other and a constant.
    torch.testing.assert_close(image[0], image[1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"must have 1 channels and 3 axes, got shape \(2, 30"):
        make_dataset(records, VOLUMES)


def test_bright_background_is_inverted_and_a_dark_one_kept():
    dark = np.full((10, 10), 20.0, dtype=np.float32)
    dark[2:5, 2:5] = 200.0
    label = (dark > 100).astype(np.int64)
    task = SegmentationTask("x", 2, 2, (10, 10), dark_background=True)
    kept, inverted = (one(in_memory(image, label), task)["image"] for image in (dark, 255 - dark))
    torch.testing.assert_close(kept, inverted, rtol=0, atol=1e-5)
    assert kept[0, 3, 3] > 0 > kept[0, 0, 0]
    asis = SegmentationTask("x", 2, 2, (10, 10))
    assert one(in_memory(255 - dark, label), asis)["image"][0, 3, 3] < 0


def test_a_record_is_the_same_whoever_else_is_there():
    rng = np.random.default_rng(0)
    records = [
        in_memory(rng.normal(i, 1 + i, (20, 20)), rng.integers(0, 2, (20, 20)), str(i))
        for i in range(5)
    ]
    before = [record["image"].copy() for record in records]
    task = SegmentationTask("x", 2, 2, (16, 16), dark_background=True)
    whole = make_dataset(records, task)
    for index, record in enumerate(records):
        for cache in (True, False):
            alone = make_dataset([record], task, cache=cache)[0]
            for key in ("image", "label"):
                torch.testing.assert_close(alone[key], whole[index][key], rtol=0, atol=0)
        np.testing.assert_array_equal(record["image"], before[index])
    assert [record["patient_id"] for record in whole.data] == ["p"] * 5


@pytest.mark.parametrize("cut", [0, 20, 200])
def test_damaged_picture_is_named(tmp_path, cut):
    make_image_folder(tmp_path)
    file = tmp_path / "images" / "4.png"
    file.write_bytes(file.read_bytes()[:cut] if cut < 100 else b"no picture")
    with pytest.raises(ValueError, match=r"image must be a readable file, got .*images/4\.png: "):
        make_dataset(image_records(tmp_path), IMAGES)
    lazy = make_dataset(image_records(tmp_path), IMAGES, cache=False)
    assert lazy[0]["name"] == "0"
    with pytest.raises(ValueError, match=r"^SegmentationTask: image must be a readable file, got"):
        lazy[4]


@pytest.mark.parametrize("cut", [0, 100, 2000])
def test_damaged_volume_is_named(tmp_path, cut):
    records = nifti_records(make_volume_folder(tmp_path, 2))
    file = records[1]["label"]
    file.write_bytes(file.read_bytes()[:cut] if cut < 1000 else b"no volume")
    with pytest.raises(ValueError, match=r"label must be a readable file, got .*labels/subject1"):
        make_dataset(records, VOLUMES)


def test_file_that_vanished_is_named(tmp_path):
    records = nifti_records(make_volume_folder(tmp_path, 2))
    records[0]["image"].unlink()
    with pytest.raises(ValueError, match=r"image must be a readable file, got .*images/subject0"):
        make_dataset(records, VOLUMES)


def test_several_pictures_in_one_file_are_refused(tmp_path):
    make_image_folder(tmp_path, 1)
    (tmp_path / "images" / "0.png").unlink()
    pages = [Image.fromarray(np.zeros((40, 60), np.uint8)) for _ in range(3)]
    pages[0].save(tmp_path / "images" / "0.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="it holds 3 pictures, and one is wanted"):
        make_dataset(image_records(tmp_path), IMAGES)


def test_image_and_label_of_different_sizes_are_refused(tmp_path):
    records = nifti_records(make_volume_folder(tmp_path, 1))
    label = nibabel.Nifti1Image(np.zeros((30, 50, 32), np.uint8), np.eye(4))
    nibabel.save(label, records[0]["label"])
    with pytest.raises(ValueError, match=r"its image's size \(30, 50, 33\), got .* in subject0"):
        make_dataset(records, VOLUMES)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((4, 4)), np.full((4, 4), 2), r"whole numbers in 0\.\.1, got others in one"),
        (np.zeros((4, 4)), np.full((4, 4), -1), "whole numbers in"),
        (np.zeros((4, 4)), np.full((4, 4), 0.5), "whole numbers in"),
        (np.zeros((4, 4)), np.full((4, 4), np.nan), "whole numbers in"),
        (np.full((4, 4), np.nan), np.zeros((4, 4)), "images must be finite, got others in one"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), r"2 axes, got shape \(1, 4, 4, 4\) in one"),
    ],
)
def test_values_that_make_no_sense_are_refused(image, label, message):
    with pytest.raises(ValueError, match=f"SegmentationTask: .*{message}"):
        one(in_memory(image, label), SegmentationTask("x", 2, 2, (4, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"num_classes": 3, "labels": "foreground"}, "num_classes must be 2 with labels"),
        ({"image_size": (4, 4, 4)}, r"image_size must be 2 numbers >= 1, got \(4, 4, 4\)"),
        ({"image_size": (4, 0)}, "image_size must be 2 numbers >= 1"),
        ({"in_channels": 0}, "in_channels must be >= 1, got 0"),
        ({"fit": "stretch"}, "fit must be one of resize, crop_or_pad, got 'stretch'"),
        ({"labels": "masks"}, "labels must be one of classes, foreground, got 'masks'"),
    ],
)
def test_task_breaks_no_rule(change, message):
    settings = {"name": "x", "spatial_dims": 2, "num_classes": 2, "image_size": (4, 4)}
    with pytest.raises(ValueError, match=f"^SegmentationTask: {message}"):
        SegmentationTask(**{**settings, **change})


@pytest.mark.parametrize(
    ("absent", "folder", "find", "task"),
    [
        ("monai.data.dataset", make_image_folder, image_records, IMAGES),
        ("PIL", make_image_folder, image_records, IMAGES),
        ("nibabel", make_volume_folder, nifti_records, VOLUMES),
    ],
)
def test_absent_package_is_an_error_that_names_the_extra(
    tmp_path, monkeypatch, absent, folder, find, task
):
    records = find(folder(tmp_path, 1))
    monkeypatch.setitem(sys.modules, absent, None)
    package = absent.split(".")[0]
    with pytest.raises(
        ImportError, match=rf"the package {package} must be installed: pip install 'dpfast\[train\]"
    ):
        make_dataset(records, task)


def test_importing_dpfast_imports_no_optional_package(tmp_path):
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import dpfast, dpfast.segmentation, sys; print(sorted({'monai', 'nibabel', 'PIL', "
            "'matplotlib', 'pydantic', 'tomli'} & set(sys.modules)))",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
