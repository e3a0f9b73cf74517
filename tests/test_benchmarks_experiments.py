"""The experiments' settings and tables; they themselves take too long for a test."""

import json
import math

import pytest

from tests import benchmark_modules

pytest.importorskip("pydantic")
benchmark_modules.load()

from benchmarks import thresholds, utility  # noqa: E402
from dpfast.segmentation.settings import load_settings  # noqa: E402


@pytest.mark.parametrize("task", utility.TASKS)
@pytest.mark.parametrize("epsilon", utility.EPSILONS)
def test_settings_of_a_run_are_the_examples_with_another_target(tmp_path, task, epsilon):
    text = utility.settings_text(task, tmp_path, epsilon, 2, tmp_path / "run", 7)
    file = tmp_path / "settings.toml"
    file.write_text(text)
    settings = load_settings(file)
    assert settings.privacy.private is (epsilon is not None)
    assert settings.privacy.target_epsilon == epsilon
    assert settings.model.weights_seed == 2
    assert settings.training.epochs == 7
    assert settings.data.path == str(tmp_path / utility.TASKS[task])
    assert settings.output.folder == str(tmp_path / "run")
    before = load_settings(utility.ROOT / "examples" / f"{task}.toml")
    assert settings.privacy.expected_batch_size == before.privacy.expected_batch_size
    assert settings.model.arguments == before.model.arguments


def test_setting_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="must have one epochs, got 0"):
        utility.set_value("[training]\n", "epochs", "3")


def run(seed, epsilon, dice):
    ledger = {
        "epsilon": epsilon, "delta": 1e-5, "releases": 120, "noise_multiplier": 1.5,
        "sample_rate": 0.25,
    }  # fmt: skip
    return {
        "task": "nuclei", "target_epsilon": epsilon, "seed": seed, "validation_dice": dice,
        "epochs": 30, "unit": "image", "training_units": 542, "validation_units": 122,
        "commit": {"hash": "abc", "dirty": False},
        "ledger": None if epsilon is None else ledger,
    }  # fmt: skip


def test_table_has_the_spread_over_seeds_and_what_each_ledger_says():
    runs = [run(seed, eps, 0.1 * seed + 0.2) for seed in (0, 1, 2) for eps in (3.0, None)]
    result = {
        "machine": {"device": "CPU"}, "date": "2026-01-02", "runs": runs,
        "versions": {"torch": "2", "monai": "1"},
    }  # fmt: skip
    text = utility.render([json.loads(json.dumps(result))])
    assert "542 units for training, 122 for validation; the unit is one image" in text
    assert "| 3 | 0.300 | 0.200 to 0.400 (3 seeds) | 3.0000, 3.0000, 3.0000 | 1e-05 |" in text
    assert "| ∞ | 0.300 | 0.200 to 0.400 (3 seeds) | ∞: not private |" in text


@pytest.mark.parametrize("kind", thresholds.KINDS)
def test_simulated_threshold_comes_to_the_truth(kind):
    found = thresholds.simulated(kind, 50.0, 0.05)
    late = [math.log(value) for value in found["threshold"][-50:]]
    assert found["truth"] == pytest.approx(1.0)
    # Noise of a batch of 64: the mean over 50 steps stays within 20 %.
    assert abs(sum(late) / len(late)) < 0.2
