"""The experiments' settings and tables; they themselves take too long for a test."""

import json
import math

import pytest

from tests import benchmark_modules

pytest.importorskip("pydantic")
benchmark_modules.load()

from benchmarks import _adp_fl_report, adp_fl, thresholds, utility  # noqa: E402
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


@pytest.mark.parametrize("task", adp_fl.TASKS)
@pytest.mark.parametrize("key", [key for key in adp_fl.planned_runs() if key[2] == 2])
def test_federated_settings_of_a_run_are_the_examples_with_another_method(tmp_path, task, key):
    federated = pytest.importorskip("dpfast.federated.settings")
    method, epsilon, seed = key
    file = tmp_path / "settings.toml"
    file.write_text(
        adp_fl.settings_text(task, tmp_path, method, epsilon, seed, tmp_path / "run", 7)
    )
    settings = federated.load_federated_settings(file)
    assert settings.method == {"dp_fl_1": "dp_fl", "dp_fl_small": "dp_fl"}.get(method, method)
    assert settings.privacy.target_epsilon == epsilon
    assert settings.federation.rounds == 7
    assert settings.model.weights_seed == 2
    assert settings.data.path == str(tmp_path / adp_fl.TASKS[task])
    if method in adp_fl.FIXED:
        assert settings.privacy.max_grad_norm == adp_fl.FIXED[method]


def federated_run(method, epsilon, seed, dice):
    scores = {"dice": [dice], "hausdorff95": [4.0]}
    return {
        "task": "nuclei", "method": method, "target_epsilon": epsilon, "seed": seed, "rounds": 20,
        "unit": "sample" if method == "non_private" else "patient", "delta": 1e-3,
        "epsilon": "infinite" if epsilon is None else epsilon,
        "training_units": {"a": 10, "b": 20}, "scores": scores,
        "sites": {"a": {"dice": [dice - 0.1], "hausdorff95": [4.0]},
                  "b": {"dice": [dice + 0.1], "hausdorff95": [None]}},
        "thresholds": {"a": [1.0, 0.5], "b": [1.0, 0.25]},
        "commit": {"hash": "abc", "dirty": False},
    }  # fmt: skip


def test_federated_table_puts_methods_beside_the_claim():
    runs = [federated_run("non_private", None, seed, 0.8) for seed in (0, 1, 2)]
    runs += [federated_run("adp_fl", 8.0, seed, 0.5 + 0.1 * seed) for seed in (0, 1, 2)]
    result = {
        "machine": {"device": "CPU"}, "date": "2026-01-02", "runs": runs,
        "versions": {"torch": "2", "monai": "1"},
    }  # fmt: skip
    text = _adp_fl_report.render([json.loads(json.dumps(result))])
    assert "| ∞ | non-private FL | 0.800 ± 0.000 | 100 % | 0.700 to 0.900 | 4.0 |  |" in text
    assert "| 8 | ADP-FL, from 1 | 0.600 ± 0.100 | 75 % | 0.500 to 0.700 | 4.0 | 8.000 |" in text
    assert "ε = 8: ADP-FL, from 1 loses 25 % (sites apart by 0.200)" in text
    assert "end between 0.25 and 0.5" in text
    assert "patients for training: 10 at a, 20 at b" in text
    assert "patient (nuclei), for each site" in text
    assert "Not measured" in _adp_fl_report.render([])
