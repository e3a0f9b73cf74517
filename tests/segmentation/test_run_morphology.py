"""`dpfast train` with morphology: fixed, measured, continued."""

import json
import math

import pytest
import torch

import dpfast
from dpfast.morphology import DPMorph, adaptive, refine
from dpfast.segmentation import training, validation_dice
from dpfast.segmentation.run_folder import RunFolder
from dpfast.segmentation.run_morphology import RunMorphology
from dpfast.segmentation.training import train
from tests.segmentation.settings_files import WITHOUT_PRIVACY, write_settings
from tests.segmentation.test_training import Watcher, phantoms, run, small_model

QUICK = {"training.epochs": 1}
PATIENT = {"privacy.privacy_unit": "patient", "data.slices_per_patient": 2}
ADAPTIVE = {"kind": "adaptive", "noise_multiplier": 4.0, "fixed_size": 5}
MEASURED = {**QUICK, **PATIENT, "morphology": ADAPTIVE}


@pytest.fixture
def seen(monkeypatch):
    """The modules that losses were taken after, in order."""
    modules = []
    forward = DPMorph.forward

    def watched(self, scores):
        modules.append((self, scores.requires_grad))
        return forward(self, scores)

    monkeypatch.setattr(DPMorph, "forward", watched)
    return modules


def test_without_a_table_nothing_is_between_network_and_loss(tmp_path, seen):
    report, _, folder = run(tmp_path, QUICK)
    assert report["morphology"] == {"kind": "none"}
    assert not seen
    assert not (folder / "morphology.json").exists()


@pytest.mark.parametrize("private", [True, False])
def test_fixed_morphology_is_in_the_loss_and_not_in_the_evaluation(tmp_path, seen, private):
    morphology = {
        "kind": "fixed",
        "operation": "open",
        "size": [3, 5],
        "footprint": "ellipse",
        "per_class": {"1": {"operation": "both", "size": 3}},
        "at_prediction": "nothing",
    }
    changes = {} if private else {"privacy": WITHOUT_PRIVACY}
    report, _, folder = run(tmp_path, {**QUICK, **changes, "morphology": morphology})
    assert report["morphology"] == {
        "kind": "fixed",
        "classes": {
            "0": {"operation": "identity", "size": 1},
            "1": {"operation": "opening_closing", "size": 3},
        },
        "footprint": "ellipse",
        "at_prediction": "nothing",
    }
    assert {repr(module) for module, _ in seen} == {
        repr(DPMorph("open", (3, 5), {1: ("both", 3)}, footprint="ellipse"))
    }
    # In the evaluation there is no gradient.
    assert seen
    assert all(requires_grad for _, requires_grad in seen)
    model = small_model()
    model.load_state_dict(torch.load(folder / "model.pt"))
    dice = validation_dice(model, torch.utils.data.DataLoader(phantoms(1), batch_size=4), 2)
    assert dice == pytest.approx(report["results"]["validation_dice"], rel=1e-6)


def test_fixed_morphology_costs_nothing(tmp_path):
    epsilons = []
    for name, changes in (("without", {}), ("with", {"morphology": {"kind": "fixed"}})):
        (tmp_path / name).mkdir()
        report, _, _ = run(tmp_path / name, {**QUICK, **changes})
        epsilons.append(report["privacy"]["epsilon"])
    assert epsilons[0] == epsilons[1]


def test_all_channels_are_changed_as_in_the_published_code(tmp_path):
    report, _, _ = run(tmp_path, {**QUICK, "morphology": {"kind": "fixed", "all_channels": True}})
    closing = {"operation": "closing", "size": 3}
    assert report["morphology"]["classes"] == {"0": closing, "1": closing}


@pytest.mark.parametrize(
    ("at_prediction", "class_maps"),
    [
        ("scores", lambda scores: DPMorph("open", 3)(scores).argmax(1, keepdim=True)),
        ("class_maps", lambda scores: refine(scores.argmax(1, keepdim=True), "open", 3)),
        ("nothing", lambda scores: scores.argmax(1, keepdim=True)),
    ],
)
def test_operation_is_applied_at_prediction_where_asked_for(tmp_path, at_prediction, class_maps):
    morphology = {"kind": "fixed", "operation": "open", "at_prediction": at_prediction}
    report, _, folder = run(tmp_path, {**QUICK, "morphology": morphology})
    model = small_model()
    model.load_state_dict(torch.load(folder / "model.pt"))
    dice = validation_dice(
        model, torch.utils.data.DataLoader(phantoms(1), batch_size=4), 2, class_maps=class_maps
    )
    assert dice == pytest.approx(report["results"]["validation_dice"], rel=1e-6)
    again = RunMorphology.from_report(report["morphology"], 2)
    scores = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.class_maps(scores), class_maps(scores))
    assert (at_prediction == "nothing") == torch.equal(
        again.class_maps(scores), scores.argmax(1, keepdim=True)
    )


def test_measured_sizes_are_used_reported_and_counted(tmp_path, seen):
    report, _, folder = run(tmp_path, MEASURED)
    kept = json.loads((folder / "morphology.json").read_text())
    size = kept["sizes"]["1"]
    assert report["morphology"] == {
        "kind": "adaptive",
        "classes": {
            "0": {"operation": "identity", "size": 1},
            "1": {"operation": "opening_closing", "size": size},
        },
        "footprint": "box",
        "at_prediction": "scores",
        "fell_back": kept["fell_back"],
        "noisy_counts": kept["noisy_counts"],
    }
    assert {module.refinements(2)[1] for module, _ in seen} == {("opening_closing", size)}
    measurement, steps = report["privacy"]["mechanisms"]
    assert measurement["description"]["release"] == "thickness of each class"
    assert (measurement["spends"], measurement["description"]["fixed_sizes"]) == (1, [5])
    assert measurement["event"] == {"type": "GaussianDpEvent", "noise_multiplier": 4.0}
    assert measurement["description"]["num_units"] == steps["description"]["num_units"]
    ledger = dpfast.PrivacyLedger.read(folder / "ledger.jsonl")
    assert ledger.epsilon(1e-3) == report["privacy"]["epsilon"]


@pytest.mark.slow
def test_a_target_epsilon_covers_the_measurement(tmp_path):
    target = {"privacy.noise_multiplier": None, "privacy.target_epsilon": 2.0}
    report, _, _ = run(tmp_path, {**MEASURED, **target})
    assert 1.98 < report["privacy"]["epsilon"] <= 2.0


def test_a_measurement_that_leaves_nothing_to_train_with_is_refused_before_it(tmp_path):
    changes = {
        "privacy.noise_multiplier": None,
        "privacy.target_epsilon": 0.5,
        "morphology": {**ADAPTIVE, "noise_multiplier": 1.0},
    }
    with pytest.raises(ValueError, match=r"morphology.noise_multiplier must leave something"):
        run(tmp_path, {**MEASURED, **changes})
    assert dpfast.PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl").epsilon(1e-3) == 0.0


def interrupted(path, monkeypatch, function, owner=training):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, stop)
        with pytest.raises(KeyboardInterrupt):
            train(path, Watcher())


@pytest.mark.parametrize("function", ["_start", "_take_steps"])
def test_a_continuation_takes_the_sizes_and_does_not_measure_again(tmp_path, monkeypatch, function):
    path = write_settings(tmp_path / "settings.toml", MEASURED)
    interrupted(path, monkeypatch, function)
    kept = (tmp_path / "run" / "morphology.json").read_text()
    report = train(path, Watcher())
    assert (tmp_path / "run" / "morphology.json").read_text() == kept
    assert report["privacy"]["mechanisms"][0]["spends"] == 1
    assert report["morphology"]["classes"]["1"]["size"] == json.loads(kept)["sizes"]["1"]


def test_a_measurement_lost_in_a_crash_is_made_anew_and_both_count(tmp_path, monkeypatch):
    path = write_settings(tmp_path / "settings.toml", MEASURED)
    interrupted(path, monkeypatch, "clip_and_noise", owner=adaptive)
    interrupted(path, monkeypatch, "write_morphology", owner=RunFolder)
    report = train(path, Watcher())
    assert report["privacy"]["mechanisms"][0]["spends"] == 3


def test_other_settings_before_the_start_measure_anew(tmp_path, monkeypatch):
    interrupted(write_settings(tmp_path / "settings.toml", MEASURED), monkeypatch, "_start")
    changes = {**MEASURED, "morphology": {**ADAPTIVE, "kappa": 0.25}}
    report = train(write_settings(tmp_path / "settings.toml", changes), Watcher())
    assert [each["spends"] for each in report["privacy"]["mechanisms"][:2]] == [1, 1]


@pytest.mark.parametrize("lost", ["morphology.json", "ledger.jsonl"])
def test_a_started_run_without_its_measurement_or_ledger_does_not_go_on(
    tmp_path, monkeypatch, lost
):
    path = write_settings(tmp_path / "settings.toml", MEASURED)
    interrupted(path, monkeypatch, "_take_steps")
    (tmp_path / "run" / lost).unlink()
    with pytest.raises(dpfast.PrivacyError, match=r"must have the morphology.json that its run"):
        train(path, Watcher())
    if lost == "morphology.json":
        ledger = dpfast.PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")
        assert ledger.spending(0).spends == 1
        assert math.isfinite(ledger.epsilon(1e-3))


@pytest.mark.parametrize(
    ("morphology", "message"),
    [
        ({"per_class": {"2": {"operation": "open", "size": 3}}}, "classes from 1 to 1, got 2"),
        ({"size": [3, 3, 3]}, "size must have 2 axes like the images"),
    ],
)
def test_morphology_that_does_not_fit_the_task_is_refused(tmp_path, morphology, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, {**QUICK, "morphology": {"kind": "fixed", **morphology}})
