"""Every public format: its layout is found, its labels are classes, its gaps are named."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("scipy")

from dpfast.segmentation.data import find_records, load_data
from dpfast.segmentation.data_settings import PublicData
from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.formats.retina import layer_map
from dpfast.segmentation.task import make_dataset
from tests.segmentation import public_layouts as layouts

MAKE = {
    "brats": layouts.brats,
    "covid_ct": layouts.covid_ct,
    "duke_oct": layouts.duke_oct,
    "ham10000": layouts.ham10000,
    "isic2018": layouts.isic2018,
    "kits19": layouts.kits,
    "kits23": layouts.kits,
    "lgg": layouts.lgg,
}
SIZES = {2: [16, 16], 3: [8, 8, 8]}


def settings(kind, path, **changes):
    size = SIZES[FORMATS[kind].spatial_dims]
    return PublicData(kind=kind, path=str(path), **{"image_size": size, **changes})


def entries(kind, path, **changes):
    task, records = find_records(settings(kind, path, **changes))
    return task, records, make_dataset(records, task)


def test_every_format_is_tested_and_can_be_chosen():
    assert set(MAKE) == set(FORMATS)
    assert set(PublicData.model_fields["kind"].annotation.__args__) == set(FORMATS)


@pytest.mark.parametrize("kind", FORMATS)
def test_layout_is_found_and_read(kind, tmp_path):
    task, records, dataset = entries(kind, MAKE[kind](tmp_path))
    described = FORMATS[kind]
    assert len(records) > 1
    assert len({record["name"] for record in records}) == len(records)
    assert task.class_names == described.class_names
    for entry in dataset:
        assert entry["image"].shape == (described.in_channels, *task.image_size)
        assert entry["label"].shape == (1, *task.image_size)
        assert 0 <= entry["label"].min() <= entry["label"].max() < task.num_classes
        torch.testing.assert_close(entry["image"].mean(), torch.tensor(0.0), rtol=0, atol=0.05)
    assert max(int(entry["label"].max()) for entry in dataset) >= 1


@pytest.mark.parametrize("kind", FORMATS)
def test_empty_folder_is_an_error_that_says_where_and_what(kind, tmp_path):
    with pytest.raises(ValueError, match=rf"_records: .*{tmp_path.name}.*must hold"):
        find_records(settings(kind, tmp_path))
    with pytest.raises(ValueError, match=r"absent must be a folder"):
        find_records(settings(kind, tmp_path / "absent"))


def test_lesions_stay_together_and_data_sets_can_be_sites(tmp_path):
    _, records = find_records(settings("ham10000", layouts.ham10000(tmp_path)))
    assert [record["patient_id"] for record in records] == ["HAM_0000000"] * 2 + ["HAM_0000001"] * 2
    assert [record["columns"]["dataset"] for record in records] == ["rosendahl"] * 2 + [
        "vidir_modern"
    ] * 2


def test_kits_in_each_years_layout(tmp_path):
    later = layouts.kits(tmp_path / "21", label="aggregated_MAJ_seg.nii.gz")
    assert [r["patient_id"] for r in find_records(settings("kits23", later))[1]] == [
        "case_00000",
        "case_00001",
        "case_00002",
    ]
    flat = layouts.kits(tmp_path / "flat", root=".")
    assert len(find_records(settings("kits19", flat))[1]) == 3


def test_kits_test_cases_are_left_out_and_other_gaps_are_errors(tmp_path):
    layouts.kits(tmp_path)
    shutil.copytree(tmp_path / "data/case_00000", tmp_path / "data/case_00210")
    (tmp_path / "data/case_00210/segmentation.nii.gz").unlink()
    assert len(find_records(settings("kits19", tmp_path))[1]) == 3
    (tmp_path / "data/case_00001/segmentation.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"case_00001 must hold its segmentation: segmentation"):
        find_records(settings("kits19", tmp_path))


def test_volumes_are_turned_to_one_orientation(tmp_path):
    # KiTS has its slices in the first axis; in RAS that is the last.
    _, _, dataset = entries("kits19", layouts.kits(tmp_path), image_size=[20, 16, 6])
    label = dataset[0]["label"][0]
    stored = layouts.blob((6, 16, 20))
    stored[3, 10, 12] = 2
    turned = stored.transpose(2, 1, 0)[::-1, ::-1, ::-1]
    np.testing.assert_array_equal(label.numpy(), turned)


def test_spacing_and_window_are_applied(tmp_path):
    path = layouts.kits(tmp_path)
    _, _, fine = entries("kits19", path, fit="crop_or_pad", image_size=[20, 16, 18])
    _, _, coarse = entries(
        "kits19", path, fit="crop_or_pad", image_size=[20, 16, 18], spacing=[0.8, 0.8, 1.0]
    )
    # Three slices of 3 mm have a label.
    assert [(e["label"][0] > 0).any((0, 1)).sum() for e in (fine[0], coarse[0])] == [3, 9]
    task, _, _ = entries("kits19", path, window=[-10, 10])
    assert task.window == (-10, 10)
    image = entries("kits19", path, window=[-10, 10], image_size=[20, 16, 6])[2][0]["image"]
    # Nearly all of the noise, 200 wide, is cut off at either end: two values are left.
    ends = (image - image.min()).abs() < 1e-3
    ends |= (image - image.max()).abs() < 1e-3
    assert ends.float().mean() > 0.9


def test_brats_in_both_endings_with_institutions(tmp_path):
    path = layouts.brats(tmp_path / "20", ending=".nii")
    _, records = find_records(settings("brats", path))
    assert [record["columns"]["institution"] for record in records] == ["TCIA01", "CBICA", "TCIA01"]
    assert len(records[0]["image"]) == 4
    bare = layouts.brats(tmp_path / "21", below=".", names=False)
    assert all(record["columns"] == {} for record in find_records(settings("brats", bare))[1])
    (bare / "BraTS20_Training_002/BraTS20_Training_002_flair.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"Training_002 must hold the case's flair: .*_flair\.nii"):
        find_records(settings("brats", bare))


def test_brats_classes_and_channels(tmp_path):
    _, _, dataset = entries("brats", layouts.brats(tmp_path), image_size=[12, 12, 8])
    label = dataset[0]["label"][0]
    assert label[8, 8, 4] == 3  # 4 in the file
    assert label.unique().tolist() == [0, 1, 2, 3]
    scans = dataset[0]["image"]
    assert (scans[0] - scans[3]).abs().max() > 0.1


def test_label_values_of_another_format_are_refused(tmp_path):
    layouts.brats(tmp_path)
    file = next(tmp_path.glob("*/BraTS20_Training_002/*_seg.nii.gz"))
    layouts.volume(file, np.full((12, 12, 8), 3, np.uint8))
    with pytest.raises(
        ValueError, match=r"among \[0, 1, 2, 4\], got others in BraTS20_Training_002"
    ):
        entries("brats", tmp_path)


def test_lgg_slices_in_order_by_patient_and_institution(tmp_path):
    _, records = find_records(settings("lgg", layouts.lgg(tmp_path)))
    assert [record["name"].rsplit("_", 1)[1] for record in records] == ["1", "2", "10"] * 2
    assert {record["patient_id"] for record in records} == {"TCGA_CS_4941", "TCGA_HT_7602"}
    assert {record["columns"]["institution"] for record in records} == {"CS", "HT"}


def test_covid_ct_in_both_layouts(tmp_path):
    for kaggle in (False, True):
        path = layouts.covid_ct(tmp_path / str(kaggle), kaggle=kaggle)
        _, records = find_records(settings("covid_ct", path))
        assert [record["name"] for record in records] == [
            "coronacases_001",
            "radiopaedia_10_85902_1",
        ]
        assert [r["columns"]["source"] for r in records] == ["coronacases", "radiopaedia"]


def test_annotated_oct_scans_become_layers(tmp_path):
    path = layouts.duke_oct(tmp_path)
    _, records = find_records(settings("duke_oct", path))
    assert [record["name"] for record in records] == [
        "Subject_01_02",
        "Subject_01_04",
        "Subject_02_02",
        "Subject_02_04",
    ]
    label = records[0]["label"]
    assert records[0]["image"].shape == label.shape == (60, 30)
    # Boundaries at rows 10, 15, ... 45, counted from 1: nothing above and below them.
    layers = np.repeat(np.arange(1, 8), 5)
    np.testing.assert_array_equal(label[:, 0], np.concatenate([[0] * 9, layers, [0] * 16]))
    assert label[27, 5] == label[28, 8] == 8
    # The gap was filled from its sides.
    assert label[18, 15] == 2
    assert label[19, 15] == 3


def test_layers_that_touch_leave_the_upper_one_out():
    lines = np.repeat(np.array([2, 4, 4, 6, 7, 8, 9, 10.0])[:, None], 3, axis=1)
    assert layer_map(lines, None, 12)[:, 0].tolist() == [0, 1, 1, 3, 3, 4, 5, 6, 7, 0, 0, 0]


def test_oct_file_of_another_kind_is_refused(tmp_path):
    from scipy.io import savemat

    folder = tmp_path / "2015_BOE_Chiu"
    folder.mkdir()
    file = folder / "Subject_01.mat"
    file.write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"Subject_01\.mat must be a MATLAB file"):
        find_records(settings("duke_oct", tmp_path))
    savemat(file, {"images": np.zeros((4, 4, 2))})
    with pytest.raises(ValueError, match="got no manualLayers1"):
        find_records(settings("duke_oct", tmp_path))
    shape = (4, 4, 2)
    layers = {"manualLayers1": np.zeros((7, 4, 2)), "manualFluid1": np.zeros(shape)}
    savemat(file, {"images": np.zeros(shape), **layers})
    with pytest.raises(ValueError, match=r"got \(4, 4, 2\), \(4, 4, 2\) and \(7, 4, 2\)"):
        find_records(settings("duke_oct", tmp_path))


def test_mask_that_is_missing_is_named(tmp_path):
    layouts.isic2018(tmp_path)
    mask = tmp_path / "ISIC2018_Task1_Training_GroundTruth/ISIC_0000001_segmentation.png"
    mask.unlink()
    with pytest.raises(ValueError, match=r"GroundTruth must hold the image's mask: ISIC_0000001_"):
        find_records(settings("isic2018", tmp_path))


def test_metadata_without_an_image_are_refused(tmp_path):
    layouts.ham10000(tmp_path)
    extra = tmp_path / "HAM10000_images_part_1/ISIC_9999999.jpg"
    shutil.copy(next(tmp_path.glob("*part_1/*.jpg")), extra)
    with pytest.raises(ValueError, match="ISIC_9999999 must be in the metadata, got no line"):
        find_records(settings("ham10000", tmp_path))


def test_volume_and_label_at_different_places_are_refused(tmp_path):
    layouts.covid_ct(tmp_path)
    file = tmp_path / "Lung_and_Infection_Mask/coronacases_001.nii.gz"
    layouts.volume(file, layouts.blob((16, 16, 6)), np.diag([1, 1, 2.5, 1.0]))
    with pytest.raises(ValueError, match=r"affines that differ by 1\.5 mm in coronacases_001"):
        entries("covid_ct", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": [8, 8]}, "image_size must be 3 numbers with kind 'kits19'"),
        ({"kind": "lgg", "image_size": [8, 8], "spacing": [1, 1, 1]}, "spacing has no effect"),
        ({"kind": "acdc"}, "kind"),
        ({"window": [3, 1]}, "window must be two numbers, the lower first"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_data(
            PublicData(
                **{"kind": "kits19", "path": str(layouts.kits(tmp_path)), "image_size": [8, 8, 8]}
                | change
            )
        )
