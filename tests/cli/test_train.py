"""`dpfast train` as a user runs it."""

import sys

import pytest
from typer.testing import CliRunner

from dpfast.cli.app import app
from tests.segmentation.settings_files import WITHOUT_PRIVACY, write_settings


def run_dpfast(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(each) for each in arguments])


def test_train_shows_epochs_and_results_and_then_the_same_results(tmp_path):
    path = write_settings(tmp_path / "settings.toml", {"training.epochs": 2})
    first = run_dpfast("train", path)
    assert first.exit_code == 0, first.output
    assert "phantoms (2D): 36 samples for training and 4 for validation, 2 classes" in first.output
    assert "epoch 1: epsilon " in first.output
    assert "epoch 2: epsilon " in first.output
    for line in ("validation Dice", "privacy unit", "(epsilon, delta)", "The validation patients"):
        assert line in first.output
    assert "loss" not in first.output
    again = run_dpfast("train", path)
    assert again.exit_code == 0
    assert "epoch" not in again.output
    assert again.output.strip() == first.output[first.output.index("┌") :].strip()


def test_train_without_privacy_says_infinite(tmp_path):
    changes = {"training.epochs": 1, "privacy": WITHOUT_PRIVACY}
    shown = run_dpfast("train", write_settings(tmp_path / "settings.toml", changes))
    assert "epoch 1: epsilon infinite" in shown.output
    assert "private = false" in shown.output
    assert "delta" not in shown.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.clipp": "flat"}, "settings.toml: privacy.clipp: there is no such setting"),
        (
            {"data": {"kind": "images", "path": "nowhere", "image_size": [8, 8]}},
            "image_records: path must be a folder, got nowhere",
        ),
        ({"model.arguments": {"norm": "batch"}}, "BatchNorm"),
    ],
)
def test_train_says_what_is_wrong_in_one_line(tmp_path, changes, message):
    shown = run_dpfast("train", write_settings(tmp_path / "settings.toml", changes))
    assert shown.exit_code == 2
    assert shown.stderr.startswith("dpfast train: ")
    assert message in shown.stderr
    assert "Traceback" not in shown.output


def test_train_without_its_extra_names_it(tmp_path, monkeypatch):
    path = write_settings(tmp_path / "settings.toml")
    monkeypatch.setitem(sys.modules, "monai.data.dataset", None)
    shown = run_dpfast("train", path)
    assert shown.exit_code == 2
    assert "the package monai must be installed: pip install 'dpfast[train]'" in shown.stderr


def test_commands_are_listed():
    shown = run_dpfast("--help")
    assert shown.exit_code == 0
    for command in ("doctor", "train"):
        assert command in shown.output
