"""Predictions: in the image's own geometry, with its header, never over an existing file."""

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.prediction import ImageFiles, find_images, predict, write_prediction
from dpfast.segmentation.run_morphology import RunMorphology
from dpfast.segmentation.task import SegmentationTask
from tests.segmentation import public_layouts as layouts


class Bright(torch.nn.Module):
    """Class 1 where the first channel is bright; it has learnt that."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.steepness = torch.nn.Parameter(torch.tensor(20.0))
        self.num_classes = num_classes
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        scores = torch.zeros(len(images), self.num_classes, *images.shape[2:])
        scores[:, 1] = self.steepness * (images[:, 0] - 1.0)
        return scores


def square(size, low, high):
    image = np.zeros(size, np.float32)
    image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 100.0
    return image


def test_picture_of_another_size_comes_back_in_its_own(tmp_path):
    image = square((60, 90), (12, 30), (30, 60))
    layouts.picture(tmp_path / "a.png", image.astype(np.uint8))
    task = SegmentationTask("x", 2, 2, (30, 30))
    model = Bright()
    found = predict(model, task, tmp_path / "a.png")
    assert model.shapes == [(1, 1, 30, 30)]
    assert found.shape == (60, 90)
    wrong = found != (image > 0)
    # Half a pixel of the coarser grid, at the edges.
    assert wrong.mean() < 0.02
    assert not wrong[13:29, 33:57].any()


def test_volume_comes_back_in_its_own_orientation_and_spacing(tmp_path):
    affine = np.array([[0, 0, -0.8, 5], [0, -0.8, 0, 6], [-3.0, 0, 0, 7], [0, 0, 0, 1]])
    image = square((8, 30, 40), (2, 5, 8), (5, 15, 24))
    layouts.volume(tmp_path / "v.nii.gz", image, affine)
    task = SegmentationTask(
        "x", 3, 2, (40, 30, 24), spacing=(0.8, 0.8, 1.0), fit="crop_or_pad", window=(0, 100)
    )
    found = predict(Bright(), task, tmp_path / "v.nii.gz")
    assert found.shape == image.shape
    assert (found != (image > 0)).mean() < 0.02
    assert found[3, 10, 15] == 1


def test_windows_slide_over_what_is_larger_than_the_network_saw():
    image = square((50, 70), (5, 3), (15, 12)) + square((50, 70), (40, 60), (48, 69))
    task = SegmentationTask("x", 2, 2, (24, 24), fit="crop_or_pad")
    model = Bright()
    found = predict(model, task, image)
    assert set(model.shapes) == {(1, 1, 24, 24)}
    np.testing.assert_array_equal(found, image > 0)


def test_what_is_smaller_is_padded_and_comes_back():
    image = square((10, 12), (2, 3), (6, 8))
    found = predict(Bright(), SegmentationTask("x", 2, 2, (24, 24), fit="crop_or_pad"), image)
    np.testing.assert_array_equal(found, image > 0)


def test_model_is_left_as_it_was_and_morphology_is_applied():
    model = Bright().train()
    task = SegmentationTask("x", 2, 2, (16, 16))
    image = square((16, 16), (2, 2), (6, 6))
    erased = {"0": {"operation": "identity", "size": 1}, "1": {"operation": "opening", "size": 5}}
    for where, largest in (("scores", 0), ("class_maps", 0), ("nothing", 1)):
        report = {"kind": "fixed", "classes": erased, "footprint": "box", "at_prediction": where}
        morphology = RunMorphology.from_report(report, 2)
        assert predict(model, task, image, morphology=morphology).max() == largest
    assert model.training


def test_volume_is_written_with_its_header(tmp_path):
    affine = np.array([[0, 0, -0.8, 5], [0, -0.8, 0, 6], [-3.0, 0, 0, 7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"scanner of the north"
    image.set_qform(affine, code=1)
    image.header.set_slope_inter(2.0, 1.0)
    nibabel.save(image, tmp_path / "v.nii.gz")
    classes = np.zeros((4, 5, 6), np.int64)
    classes[1, 2, 3] = 3
    task = SegmentationTask("x", 3, 4, (4, 4, 4), class_values=(0, 1, 2, 4))
    out = tmp_path / "out"
    out.mkdir()
    file = write_prediction(out, ImageFiles("v", (tmp_path / "v.nii.gz",)), classes, task)
    assert file == out / "v.nii.gz"
    written = nibabel.load(file)
    np.testing.assert_allclose(written.affine, affine)
    assert written.get_data_dtype() == np.uint8
    values = np.asanyarray(written.dataobj)
    assert values[1, 2, 3] == 4
    assert values.sum() == 4
    assert written.header["descrip"] == b"scanner of the north"
    assert written.header["qform_code"] == 1
    assert written.header.get_xyzt_units() == ("mm", "sec")
    with pytest.raises(ValueError, match=r"v\.nii\.gz must not be there yet"):
        write_prediction(out, ImageFiles("v", (tmp_path / "v.nii.gz",)), classes, task)


def test_masks_of_pictures_are_black_and_white(tmp_path):
    classes = np.array([[0, 1], [1, 0]])
    mask = SegmentationTask("x", 2, 2, (4, 4), labels="foreground")
    write_prediction(tmp_path, ImageFiles("m", (tmp_path / "m.jpg",)), classes, mask)
    assert np.asarray(Image.open(tmp_path / "m.png")).tolist() == [[0, 255], [255, 0]]
    numbers = SegmentationTask("x", 2, 2, (4, 4))
    write_prediction(tmp_path, ImageFiles("n", (tmp_path / "n.png",)), classes, numbers)
    assert np.asarray(Image.open(tmp_path / "n.png")).tolist() == [[0, 1], [1, 0]]


def test_images_are_found_by_file_folder_and_patient(tmp_path):
    layouts.kits(tmp_path / "kits")
    layouts.brats(tmp_path / "brats")
    case = tmp_path / "kits/data/case_00001"
    alone = find_images([case], 3, FORMATS["kits19"])
    assert alone == [ImageFiles("case_00001", (case / "imaging.nii.gz",))]
    everybody = find_images([tmp_path / "kits/data"], 3, FORMATS["kits19"])
    assert [each.name for each in everybody] == ["case_00000", "case_00001", "case_00002"]
    patients = tmp_path / "brats/MICCAI_BraTS2020_TrainingData"
    patient = find_images([patients], 3, FORMATS["brats"])[0]
    kinds = [file.name.removeprefix(f"{patient.name}_") for file in patient.files]
    assert kinds == ["t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz"]
    layouts.picture(tmp_path / "p/a.png", np.zeros((4, 4), np.uint8))
    layouts.picture(tmp_path / "p/b.jpg", np.zeros((4, 4), np.uint8))
    (tmp_path / "p/notes.txt").touch()
    assert [each.name for each in find_images([tmp_path / "p"], 2)] == ["a", "b"]
    assert [each.name for each in find_images([tmp_path / "p/a.png"], 2)] == ["a"]


def test_images_that_are_not_there_or_share_a_name_are_errors(tmp_path):
    layouts.picture(tmp_path / "p/a.png", np.zeros((4, 4), np.uint8))
    layouts.picture(tmp_path / "q/a.png", np.zeros((4, 4), np.uint8))
    for paths, message in (
        ([tmp_path / "p", tmp_path / "q"], "must have names of their own"),
        ([tmp_path / "r"], r"r must be a file that ends in \.png"),
        ([tmp_path], "must hold images"),
        ([], "must name an image"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images(paths, 2)
    with pytest.raises(ValueError, match=r"a\.png must be a file that ends in \.nii\.gz"):
        find_images([tmp_path / "p/a.png"], 3)


def test_task_survives_json():
    import json

    task = SegmentationTask(
        "x", 3, 3, (4, 4, 4), class_names=("a", "b"), class_values=(0, 1, 4), window=(0, 1)
    )
    assert SegmentationTask.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    with pytest.raises(TypeError):
        SegmentationTask.from_dict({"name": "x", "colour": 3})
