"""Records found in folders, joined with patients, and split by patient."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dpfast.segmentation import (
    image_records,
    nifti_records,
    read_dataset_json,
    split_by_patient,
)
from tests.segmentation.folders import make_image_folder, make_volume_folder


def write_index(folder, text):
    (folder / "index.csv").write_text(text, encoding="utf-8-sig")


def record(patient, name="r"):
    return {"image": None, "label": None, "patient_id": patient, "name": name, "columns": {}}


def test_image_records_pair_files_by_name_whatever_their_endings(tmp_path):
    make_image_folder(tmp_path, 3, labels="labels")
    picture = tmp_path / "images" / "1.png"
    Image.open(picture).convert("L").save(tmp_path / "images" / "1.JPG")
    picture.unlink()
    (tmp_path / "images" / ".hidden.txt").touch()
    records = image_records(tmp_path)
    assert [r["name"] for r in records] == ["0", "1", "2"]
    assert [r["image"].name for r in records] == ["0.png", "1.JPG", "2.png"]
    assert [r["label"].name for r in records] == ["0.png", "1.png", "2.png"]
    assert [r["patient_id"] for r in records] == ["0", "1", "2"]


def test_index_gives_patients_and_columns(tmp_path):
    make_image_folder(tmp_path, 3)
    write_index(tmp_path, "file,who,site\n2,b,north\n0.png,a,north\n1,b,south\nelsewhere,c,x\n")
    records = image_records(tmp_path, patient_column="who")
    assert [r["patient_id"] for r in records] == ["a", "b", "b"]
    assert [r["columns"]["site"] for r in records] == ["north", "south", "north"]
    # Without the column's name each image is its own patient, the index notwithstanding.
    assert [r["patient_id"] for r in image_records(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("file,who\n0,a\n1,b\n", r"2 must be in column 'file' of .*index\.csv, got no such line"),
        ("file,who\n0,a\n1,b\n2, \n", r"2 must have a who in .*index\.csv, got an empty one"),
        ("file,who\n0,a\n0.png,b\n1,b\n2,c\n", r"0 must be in .*index\.csv once"),
        ("file,site\n0,a\n1,b\n2,c\n", r"must have the column 'who', got file, site"),
        ("file,who\n0,a\n1\n2,c\n", r"line 3 of .*index\.csv must have 2 values"),
        ("file,who\n0,a\n1,b,c\n2,c\n", r"line 3 of .*index\.csv must have 2 values"),
        ("", r"must have the column 'who'"),
        ('file,who\n0,"a\n', r"must be a CSV file"),
        (None, r"patient_column 'who' needs index\.csv, got none in .*nuclei"),
    ],
)
def test_index_that_does_not_name_every_patient_is_refused(tmp_path, index, message):
    folder = make_image_folder(tmp_path / "nuclei", 3)
    if index is not None:
        write_index(folder, index)
    with pytest.raises(ValueError, match=rf"^image_records: .*{message}"):
        image_records(folder, patient_column="who")


def test_missing_files_and_folders_are_named_with_where_they_were_sought(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder, got .*nowhere"):
        image_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold the folders images and masks.* got none of"):
        image_records(tmp_path)
    folder = make_image_folder(tmp_path / "a", 3)
    (folder / "masks" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2 must have an image and a label map.* in .*a/masks"):
        image_records(folder)
    (folder / "images" / "2.png").unlink()
    (folder / "images" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 must have an image and a label map.* in .*a/images"):
        image_records(folder)
    (folder / "labels").mkdir()
    with pytest.raises(ValueError, match="got several of these"):
        image_records(folder)


def test_files_that_cannot_be_paired_are_refused(tmp_path):
    folder = make_image_folder(tmp_path, 2)
    with pytest.raises(ValueError, match=r"must end in \.nii\.gz, \.nii, got 0\.png"):
        nifti_records(folder)
    (folder / "images" / "0.tif").touch()
    with pytest.raises(ValueError, match=r"0 must be there once, got 0\.png and 0\.tif"):
        image_records(folder)
    (folder / "images" / "0.tif").unlink()
    # A JPEG's values are not those that were stored, so it cannot hold classes.
    (folder / "masks" / "0.png").rename(folder / "masks" / "0.jpg")
    with pytest.raises(ValueError, match=r"must end in \.png, \.tif, \.tiff, got 0\.jpg"):
        image_records(folder)
    for name in ("images", "masks"):
        for file in (folder / name).iterdir():
            file.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'images'} must hold .png")):
        image_records(folder)


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr")])
def test_nifti_records_of_both_layouts(tmp_path, folders):
    make_volume_folder(tmp_path, 2, folders)
    # Archives packed on a Mac bring such files along.
    (tmp_path / folders[0] / "._subject0.nii.gz").touch()
    records = nifti_records(tmp_path)
    assert [r["name"] for r in records] == ["subject0", "subject1"]
    assert [r["patient_id"] for r in records] == ["subject0", "subject1"]
    assert {r["label"].parent.name for r in records} == {folders[1]}


@pytest.mark.parametrize(
    "content",
    [
        {"name": "Hippo", "labels": {"0": "bg", "1": "a", "2": "b"}, "modality": {"0": "MRI"}},
        {"name": "Hippo", "labels": {"bg": 0, "a": 1, "b": 2}, "channel_names": {"0": "MRI"}},
    ],
)
def test_dataset_json_says_how_many_classes_and_modalities(tmp_path, content):
    assert read_dataset_json(tmp_path) is None
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    found = read_dataset_json(tmp_path)
    assert (found.name, found.num_classes, found.in_channels) == ("Hippo", 3, 1)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"labels": {"0": "a"}, "modality": {"0": "CT"}}',
        '{"labels": {"0": "a", "2": "b"}, "modality": {"0": "CT"}}',
        '{"labels": {"a": 0, "b": [1, 2]}, "modality": {"0": "CT"}}',
        '{"labels": {"0": "a", "1": "b"}, "modality": {}}',
    ],
)
def test_dataset_json_that_makes_no_sense_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"read_dataset_json: .*dataset\.json"):
        read_dataset_json(tmp_path)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30), st.data())
def test_split_keeps_patients_whole_and_ignores_the_others(patients, data):
    fixed = [record(f"fixed{i}") for i in range(40)]  # so that no side is ever empty
    drawn = [record(p, str(i)) for i, p in enumerate(patients) for _ in range(2)]
    training, validation = split_by_patient(fixed + drawn)
    assert not {r["patient_id"] for r in training} & {r["patient_id"] for r in validation}
    assert len(training) + len(validation) == len(fixed) + len(drawn)
    gone = data.draw(st.sampled_from(patients))
    rest = [r for r in fixed + drawn if r["patient_id"] != gone]
    for part, before in zip(split_by_patient(rest), (training, validation), strict=True):
        assert part == [r for r in before if r["patient_id"] != gone]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_split_holds_out_the_fraction(fraction):
    records = [record(f"patient {i}") for i in range(4000)]
    _, validation = split_by_patient(records, fraction)
    # 5 standard errors; the hash is fixed, so this either holds or never does.
    assert abs(len(validation) / 4000 - fraction) < 5 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_split_refuses_an_empty_side_and_a_bad_fraction():
    with pytest.raises(ValueError, match="a patient for training and one for validation, got 1 an"):
        split_by_patient([record("fixed0")])
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="validation_fraction must be"):
            split_by_patient([record("a"), record("b")], fraction)
