"""The DP-Morph experiment: one small run of each kind, what is written down, and the table."""

import json
import math

import pytest

from tests import benchmark_modules
from tests.segmentation.folders import make_volume_folder

pytest.importorskip("pydantic")
pytest.importorskip("monai")
benchmark_modules.load()

from benchmarks import _dp_morph_figure, dp_morph  # noqa: E402
from benchmarks._dp_morph_report import render  # noqa: E402
from benchmarks._dp_morph_run import Choice, Experiment  # noqa: E402

SETTINGS = """
[data]
kind = "nifti"
path = "elsewhere"
image_size = [16, 16, 16]
num_classes = 3
validation_fraction = 0.34

[model]
arguments = { channels = [2, 4], strides = [2], num_res_units = 0 }

[training]
epochs = 9
learning_rate = 0.01

[privacy]
privacy_unit = "patient"
target_epsilon = 9.0
target_delta = 1e-2
max_grad_norm = 1.0
expected_batch_size = 2

[output]
folder = "nowhere"
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    make_volume_folder(folder / "data", 9)
    (folder / "settings.toml").write_text(SETTINGS)
    return Experiment(folder / "settings.toml", folder / "data", 1, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", dp_morph.VARIANTS)
def test_a_run_trains_evaluates_and_spends_its_target(experiment, variant):
    record = experiment.run(Choice(variant, "psac", 3.0, 1)).record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert 2.7 < record["spent_epsilon"] <= 3.0
    assert record["steps"] > 0
    sizes = {"none": None, "fixed": [3, 3], "adaptive": [3, 3]}  # too few patients to measure
    assert record["sizes"] == sizes[variant]
    for way in ("scores", "morphed_scores", "refined_scores"):
        assert [len(values) for values in record[way].values()] == [2, 2, 2]
    # The same target again: the noise is known, and no larger.
    again = experiment.run(Choice(variant, "psac", 3.0, 2)).record
    assert again["noise_multiplier"] == record["noise_multiplier"]
    assert again["spent_epsilon"] == pytest.approx(record["spent_epsilon"])


@pytest.mark.slow
def test_the_measurement_leaves_less_for_training(experiment):
    noise = {
        variant: experiment.run(Choice(variant, "flat", 3.0, 0)).record["noise_multiplier"]
        for variant in dp_morph.VARIANTS
    }
    assert noise["none"] == noise["fixed"] < noise["adaptive"]


@pytest.mark.slow
def test_figure_is_drawn(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    _dp_morph_figure.draw({"hippocampus": experiment}, tmp_path / "figures" / "one.png")
    assert (tmp_path / "figures" / "one.png").stat().st_size > 10_000


def run(variant, seed, dice):
    return {
        "variant": variant, "rule": "flat", "epsilon": 3.0, "seed": seed, "epochs": 5,
        "max_grad_norm": 1.0,
        "steps": 9, "noise_multiplier": 1.0, "spent_epsilon": 2.9, "delta": 1e-5,
        "unit": "patient", "training_units": 215, "validation_units": 45,
        "sizes": {"none": None, "fixed": [3, 3], "adaptive": [5, 3]}[variant],
        "scores": {
            "dice": [dice, dice + 0.1], "hausdorff95": [10.0 * (1 - dice), 2.0],
            "surface_dice": [dice, None],
        },
        "commit": {"hash": "abc", "dirty": False},
    }  # fmt: skip


def test_report_says_what_is_clear_and_what_is_not():
    runs = [run("none", s, 0.5 + 0.01 * s) for s in range(3)]
    runs += [run("fixed", s, 0.6 + 0.01 * s) for s in range(3)]
    runs += [run("adaptive", s, 0.5 + 0.02 * s) for s in range(3)]
    result = {
        "task": "hippocampus", "machine": {"device": "CPU"}, "date": "2026-01-02", "runs": runs,
        "versions": {"torch": "2", "monai": "1"},
    }  # fmt: skip
    text = render([json.loads(json.dumps(result))])
    assert "| 3 | flat | fixed | 3 | 0.610 (0.600 to 0.620) | 0.710 (0.700 to 0.720) |" in text
    assert "| 3 | flat | none | 3 | 0.510 (0.500 to 0.520) | not present |" in text
    assert "- Dice, fixed: better by 0.1 on average over 1 settings; clearly better in 1" in text
    assert "- Dice, adaptive: better by 0.01 on average over 1 settings; clearly better in none, "\
        "clearly worse in none." in text  # fmt: skip
    # Results of earlier kinds have no scores after the operation.
    assert "after the closing:" not in text
    for each in runs:
        each["morphed_scores"] = {name: each["scores"][name] for name in each["scores"]}
    both = render([json.loads(json.dumps(result))])
    assert "- Dice, none, after the closing: worse by 0 on average" in both
    assert "- Dice, fixed, after the closing: better by 0.1 on average over 1 settings" in both
    assert "### Dice, after the closing" in both
    # A smaller distance is a better one.
    assert "- 95 % Hausdorff distance, pixels, fixed: better by" in text
    assert "Adaptive sizes: 5, 3." in text
    assert "2.9000 of 3" in text
    assert not math.isnan(sum(r["scores"]["dice"][0] for r in runs))


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch):
    made = []

    class Fake:
        def run(self, choice):
            made.append(choice)
            record = run(choice.variant, choice.seed, 0.5)
            record |= {"rule": choice.rule, "epsilon": choice.epsilon}
            return type("T", (), {"record": record})

    monkeypatch.setattr(dp_morph, "RESULTS", tmp_path)
    monkeypatch.setattr(dp_morph, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(dp_morph, "_experiment", lambda task, data: Fake())
    common = ["--data", str(tmp_path), "--task", "hippocampus", "--seed", "0"]
    assert dp_morph.main([*common, "--rule", "flat"]) == 0
    assert len(made) == 6
    assert dp_morph.main(common) == 0
    assert len(made) == len(set(made)) == 24
    assert "Fewer than two seeds were run" in (tmp_path / "docs" / "dp_morph.md").read_text()
