"""The example as a user runs it: results, files and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_unet import main, write_atomically

SCRIPT = Path(__file__).parents[2] / "examples" / "train_unet.py"


def run_example(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )


def test_phantom_run_learns_privately_within_its_epsilon(tmp_path):
    weights = tmp_path / "model.pt"
    run = run_example(
        *("--phantoms", 320, "--epochs", 6, "--expected-batch-size", 48),
        *("--seed", 1, "--output", weights),
    )
    assert run.returncode == 0, run.stderr
    for word in ("all background", "untrained", "private", "non-private", "NOT PRIVATE"):
        assert word in run.stdout
    summary = json.loads(weights.with_suffix(".json").read_text())
    dice = {name: row["dice"] for name, row in summary["results"].items()}
    assert dice["all background"] == 0.0
    assert dice["private"] > max(0.6, dice["untrained"] + 0.2)
    assert dice["non-private"] > max(0.7, dice["untrained"] + 0.2)
    privacy = summary["privacy"]
    assert 7.9 < privacy["epsilon_if_not_seeded"] <= 8.0
    assert privacy["epsilon"] is None
    assert privacy["guarantee"].startswith("none")
    assert "seed" not in summary["settings"]
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.json"}
    assert all(value.isfinite().all() for value in torch.load(weights).values())


def test_unseeded_volume_run_reports_a_guarantee(tmp_path):
    weights = tmp_path / "model.pt"
    run = run_example(
        *("--dims", 3, "--phantoms", 30, "--epochs", 2, "--expected-batch-size", 6),
        *("--target-epsilon", 2, "--skip-non-private", "--output", weights),
    )
    assert run.returncode == 0, run.stderr
    assert "NOT PRIVATE" not in run.stdout
    assert "privacy unit: one image" in run.stdout
    assert "neighbouring relation: add or remove one" in run.stdout
    summary = json.loads(weights.with_suffix(".json").read_text())
    assert 1.9 < summary["privacy"]["epsilon"] <= 2.0
    assert summary["privacy"]["epsilon"] == summary["results"]["private"]["epsilon"]
    assert "non-private" not in summary["results"]


def test_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "model.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-delta", "0.5"], "--target-delta must be < 1/n = 1/"),
        (["--target-delta", "0"], "--target-delta must be in (0, 1), got 0.0"),
        (["--target-epsilon", "-1"], "--target-epsilon must be finite and > 0, got -1.0"),
        (["--target-epsilon", "nan"], "--target-epsilon must be finite and > 0, got nan"),
        (["--max-grad-norm", "inf"], "--max-grad-norm must be finite and > 0, got inf"),
        (["--expected-batch-size", "40"], "--expected-batch-size must be < n = "),
        (["--physical-batch-size", "0"], "--physical-batch-size must be >= 1, got 0"),
        (["--phantoms", "1"], "a training and a validation record are needed at least"),
        (["--data", "no/such/folder"], "--data must be a folder, got no/such/folder"),
        (["--output", "no/such/folder/m.pt"], "--output must be in an existing folder"),
        (["--output", "model.json"], "--output must be FILE.pt, got model.json"),
        (["--seed", "-1"], "--seed must be in [0, 2**63)"),
    ],
)
def test_bad_option_is_named_with_its_rule(arguments, message, capsys):
    assert main(["--phantoms", "40", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train_unet: ")
    assert message in printed.err
    assert printed.out == ""


def test_data_folder_of_the_other_dimension_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").touch()
    assert main(["--data", str(tmp_path), "--dims", "3"]) == 2
    assert "--data must hold images/*.nii.gz with --dims 3" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--clipping", "none"], ["--target-eps", "1"]])
def test_misspelt_or_unsafe_privacy_setting_fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "train_unet: error:" in capsys.readouterr().err
