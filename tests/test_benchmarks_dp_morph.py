"""The DP-Morph experiment: one small run of each kind, what is written down, and the table."""

import json
import math
import random

import pytest

from tests import benchmark_modules
from tests.segmentation.folders import make_volume_folder

pytest.importorskip("pydantic")
pytest.importorskip("monai")
benchmark_modules.load()

from benchmarks import _dp_morph_figure, dp_morph  # noqa: E402
from benchmarks._dp_morph_report import render  # noqa: E402
from benchmarks._dp_morph_run import Choice, Experiment  # noqa: E402
from benchmarks._dp_morph_verdict import Setting, clear_settings, difference  # noqa: E402

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


def result_of(runs):
    return json.loads(json.dumps({
        "task": "hippocampus", "machine": {"device": "CPU"}, "date": "2026-01-02", "runs": runs,
        "versions": {"torch": "2", "monai": "1"},
    }))  # fmt: skip


def test_report_says_what_is_clear_and_what_is_not():
    runs = [run("none", s, 0.5 + 0.01 * s) for s in range(3)]
    runs += [run("fixed", s, 0.6 + 0.01 * s) for s in range(3)]
    runs += [run("adaptive", s, 0.5 + 0.02 * s) for s in range(3)]
    text = render([result_of(runs)])
    assert "| 3 | flat | fixed | 3 | 0.610 (0.600 to 0.620) | 0.710 (0.700 to 0.720) |" in text
    assert "| 3 | flat | none | 3 | 0.510 (0.500 to 0.520) | not present |" in text
    # 0.1 with standard errors of 0.01 / sqrt(3) each and 4 degrees of freedom: t = 2.776.
    row = "| fixed against none | +0.100 (+0.077 to +0.123) | 1 | 1 (flat at ε = 3) | none |"
    assert row in text
    assert "| adaptive against none | +0.010 (-0.0" in text
    dice = text[text.index("#### Dice") : text.index("#### 95 %")]
    assert "**Better**: fixed against none. **No difference shown**: adaptive against none." in dice
    # A smaller distance is a better one: 10 (1 - Dice) and 2, of which the mean is a run's score.
    assert "| fixed against none | +0.5 (+0.4 to +0.6) | 1 | 1 (flat at ε = 3) | none |" in text
    # Results of earlier kinds have no scores after the operation.
    assert "after the closing" not in text[text.index("### Dice") :]
    for each in runs:
        each["morphed_scores"] = {
            name: [None if v is None else v + 0.01 for v in values]
            for name, values in each["scores"].items()
        }
    both = render([result_of(runs)])
    # The same networks: by pairs, so that what varies between seeds does not matter.
    assert "| none after the closing against none | +0.010 (+0.010 to +0.010) | 1 | 1" in both
    assert "| fixed after the closing against none | +0.110 (" in both
    assert "| fixed after the closing against none after the closing | +0.100 (" in both
    assert "### Dice, after the closing" in both
    assert "Adaptive sizes: 5, 3." in text
    assert "2.9000 of 3" in text


def test_differences_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    here, there = [0.2, 0.5, 0.35, 0.3], [0.1, 0.12, 0.2]
    one = difference([Setting("one", here, there)])
    expected = stats.ttest_ind(here, there, equal_var=False).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    paired = difference([Setting("pairs", [a - b for a, b in zip(here[:3], there, strict=True)])])
    expected = stats.ttest_rel(here[:3], there).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    # Two settings alike: the same mean, an error smaller by the root of two, twice the freedom.
    two = difference([Setting("a", here, there), Setting("b", here, there)])
    assert two.mean == pytest.approx(one.mean)
    assert two.high - two.mean < (one.high - one.mean) / math.sqrt(2)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw = random.Random(3)
    missed = 0
    for _ in range(600):
        settings = [
            Setting("", [draw.gauss(1, s) for _ in range(4)], [draw.gauss(0, 1) for _ in range(4)])
            for s in (0.5, 1.0, 3.0)
        ]
        found = difference(settings)
        missed += not found.low <= 1.0 <= found.high
    assert 12 <= missed <= 48  # 30 expected, 5.3 the standard deviation


def test_clear_settings_are_corrected_for_their_number():
    noise = [0.0, 0.01, -0.01, 0.0]
    clear = Setting("clear", [0.5 + n for n in noise], noise)
    doubtful = Setting("doubtful", [0.0155 + n for n in noise], noise[::-1])
    stats = pytest.importorskip("scipy.stats")
    chance = stats.ttest_ind(doubtful.scores, doubtful.others, equal_var=False).pvalue
    assert 0.05 / 2 < chance < 0.05  # clear by itself, not as the third of four
    worse = Setting("worse", [-1.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0])
    alike = Setting("alike", [1.0, 1.0], [1.0, 1.0])
    assert clear_settings([alike, doubtful, clear, worse]) == (["clear"], ["worse"])


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
