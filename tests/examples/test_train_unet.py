"""The example as a user runs it: results, guarantee and errors."""

import runpy
from pathlib import Path

import pytest
from train_unet import main, parse_arguments, run

from tests.segmentation.folders import make_image_folder, make_volume_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "train_unet.py"


def test_phantom_run_learns_privately_within_its_epsilon():
    options = ["--phantoms", "200", "--epochs", "9", "--batch-size", "48"]
    rows, report = run(parse_arguments(options))
    dice = {model: value for model, value, _, _ in rows}
    assert list(dice) == ["untrained", "private", "non-private"]
    assert dice["private"] > max(0.7, dice["untrained"] + 0.2)
    assert dice["non-private"] > max(0.7, dice["untrained"] + 0.2)
    epsilon = {model: value for model, _, value, _ in rows}
    assert epsilon["untrained"] == 0.0
    assert 7.9 < epsilon["private"] <= 8.0
    assert epsilon["private"] == report["epsilon"]
    assert epsilon["non-private"] == "infinite"
    assert report["guarantee"] == "(epsilon, delta)"
    assert report["steps"] == report["max_steps"]


def test_volume_run_as_a_script_shows_the_comparison_and_the_guarantee(monkeypatch, capsys):
    options = ("--dims", 3, "--phantoms", 30, "--epochs", 2, "--batch-size", 6)
    options += ("--target-epsilon", 0.3)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in ("untrained", "private", "non-private", "infinite"):
        assert word in shown
    assert "guarantee: (epsilon, delta)" in shown
    assert "protects: One entry of the data set is protected" in shown
    assert "adjacency: add_or_remove_one" in shown
    assert "not covered: the validation records and the non-private run" in shown
    assert "loss" not in shown


@pytest.mark.parametrize("dims", [2, 3])
def test_folders_are_trained_on(tmp_path, dims):
    make = make_image_folder if dims == 2 else make_volume_folder
    folder = make(tmp_path, 24)
    options = ["--data", folder, "--dims", dims, "--epochs", 1, "--batch-size", 8]
    options += ["--target-epsilon", 0.2, "--target-delta", 1e-4]
    rows, report = run(parse_arguments([str(each) for each in options]))
    assert len(rows) == 3
    assert 0.19 < report["epsilon"] <= 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-delta", "0.5"], "target_delta must be < 1 / "),
        (["--target-delta", "0"], "target_delta must be finite, > 0"),
        (["--target-epsilon", "-1"], "target_epsilon must be finite, > 0"),
        (["--target-epsilon", "nan"], "target_epsilon must be finite, > 0"),
        (["--batch-size", "41"], "batch_size, the expected number of units in a step, must be <="),
        (["--batch-size", "0"], "batch_size should be a positive integer"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--phantoms", "1"], "a patient for training and one for validation"),
        (["--data", "no/such/folder"], "path must be a folder, got no/such/folder"),
    ],
)
def test_bad_option_is_named_with_its_rule(arguments, message, capsys):
    assert main(["--phantoms", "40", "--batch-size", "8", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train_unet: ")
    assert message in printed.err
    assert printed.out == ""


def test_data_folder_of_the_other_dimension_is_refused(tmp_path, capsys):
    assert main(["--data", str(make_image_folder(tmp_path)), "--dims", "3"]) == 2
    assert "must end in .nii.gz, .nii, got 0.png" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--target-eps", "1"], ["--target-epsilonn", "1"]])
def test_misspelt_privacy_setting_fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "train_unet: error:" in capsys.readouterr().err
