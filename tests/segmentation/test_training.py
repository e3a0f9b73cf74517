"""Training from a settings file: results, privacy, folders."""

import copy
import json
import math

import pytest
import torch
from monai.losses.dice import DiceCELoss
from torch.utils.data import DataLoader

import dpfast
from dpfast.segmentation import (
    make_dataset,
    phantom_records,
    phantom_task,
    split_by_patient,
    validation_dice,
)
from dpfast.segmentation.models import build_model
from dpfast.segmentation.run_folder import write_atomically
from dpfast.segmentation.training import WeightAverage, train
from tests.segmentation.folders import make_image_folder, make_volume_folder
from tests.segmentation.settings_files import SMALL, WITHOUT_PRIVACY, write_settings


class Watcher:
    """Remembers what it is told."""

    def __init__(self):
        self.start = None
        self.steps = []
        self.metrics = []

    def started(self, data, steps, total_steps):
        self.start = (steps, total_steps)

    def stepped(self, steps):
        self.steps.append(steps)

    def evaluated(self, metrics):
        self.metrics.append(metrics)


def run(tmp_path, changes=None):
    """Train; returns the report, what was told, and the folder."""
    watcher = Watcher()
    report = train(write_settings(tmp_path / "settings.toml", changes), watcher)
    return report, watcher, tmp_path / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def phantoms(part):
    return make_dataset(split_by_patient(phantom_records(40))[part], phantom_task(2))


def small_model():
    return build_model("unet", phantom_task(2), SMALL["model"]["arguments"])


def test_private_run_leaves_results_that_belong_together(tmp_path):
    report, watcher, folder = run(tmp_path)
    steps_per_epoch = math.ceil(len(phantoms(0)) / 8)
    total = 3 * steps_per_epoch
    assert watcher.start == (0, total)
    assert watcher.steps == list(range(1, total + 1))
    assert {path.name for path in folder.iterdir()} == {
        *("settings.toml", "ledger.jsonl", "checkpoint.pt", "metrics.jsonl"),
        *("model.pt", "report.json"),
    }
    assert report == json.loads((folder / "report.json").read_text())
    metrics = lines(folder / "metrics.jsonl")
    assert metrics == watcher.metrics
    assert [entry["step"] for entry in metrics] == [steps_per_epoch * e for e in (1, 2, 3)]
    # What is computed from the protected records, a loss above all, is nowhere in it.
    assert {frozenset(e) for e in metrics} == {
        frozenset(("epoch", "step", "epsilon", "validation_dice"))
    }
    # Epsilon is that of the ledger, and grows.
    epsilons = [entry["epsilon"] for entry in metrics]
    assert 0 < epsilons[0] < epsilons[1] < epsilons[2] == report["privacy"]["epsilon"]
    ledger = dpfast.PrivacyLedger(folder / "ledger.jsonl")
    assert ledger.spending(0).steps == total
    assert ledger.epsilon(1e-3) == report["privacy"]["epsilon"]
    assert report["privacy"]["guarantee"] == "(epsilon, delta)"
    assert report["privacy"]["not_covered"].startswith("The validation patients")
    assert report["results"]["steps_lost_in_interruptions"] == 0
    # The weights that are kept are those that were evaluated.
    model = small_model()
    model.load_state_dict(torch.load(folder / "model.pt"))
    dice = validation_dice(model, DataLoader(phantoms(1), batch_size=4), 2)
    assert dice == pytest.approx(report["results"]["validation_dice"], rel=1e-6)
    assert dice == pytest.approx(metrics[-1]["validation_dice"], rel=1e-6)


def test_target_epsilon_is_spent_and_not_exceeded(tmp_path):
    changes = {"privacy.noise_multiplier": None, "privacy.target_epsilon": 0.5}
    report, _, _ = run(tmp_path, {**changes, "training.epochs": 2})
    assert 0.49 < report["privacy"]["epsilon"] <= 0.5
    assert report["privacy"]["max_steps"] == report["privacy"]["steps"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"clipping": "automatic", "noise_multiplier": 1.5, "max_grad_norm": 1.0}),
        ({"privacy.clipping": "psac", "privacy.max_grad_norm": 0.3}, {"clipping": "psac"}),
        ({"privacy.mechanism": "laplace"}, {"mechanism": "laplace", "norm": "l1"}),
        (
            {"privacy.threshold": {"kind": "private_quantile", "target_percentile": 30.0}},
            {"threshold": {"type": "PrivateQuantile", "target_percentile": 30.0}},
        ),
        (
            {"privacy.threshold": {"kind": "histogram", "num_bins": 7}},
            {"threshold": {"type": "NoisyHistogram", "num_bins": 7}},
        ),
        (
            {
                "data.slices_per_patient": 3,
                "privacy.privacy_unit": "patient",
                "privacy.max_samples_per_unit": 2,
            },
            {"max_samples_per_unit": 2, "expected_batch_size": 8.0},
        ),
    ],
)
def test_privacy_settings_reach_the_engine(tmp_path, changes, expected):
    report, _, _ = run(tmp_path, {**changes, "training.epochs": 1})
    privacy = report["privacy"]
    (mechanism,) = privacy["mechanisms"]
    found = mechanism["description"]
    for name, value in expected.items():
        part = found[name]
        assert ({key: part[key] for key in value} if isinstance(value, dict) else part) == value
    patients = {r["patient_id"] for r in split_by_patient(phantom_records(40))[0]}
    assert found["num_units"] == len(patients)
    assert privacy["privacy_unit"] == changes.get("privacy.privacy_unit", "sample")
    assert isinstance(privacy["epsilon"], float)


def test_paper_threshold_is_reported_without_a_guarantee(tmp_path):
    changes = {
        "privacy.threshold": {"kind": "percentile_paper"},
        "privacy.max_grad_norm": None,
        "privacy.physical_batch_size": None,
        "training.epochs": 1,
    }
    report, watcher, _ = run(tmp_path, changes)
    assert report["privacy"]["epsilon"] == "infinite"
    assert report["privacy"]["guarantee"] == "none"
    assert report["privacy"]["reasons"][0].startswith("percentile_paper")
    assert 0 < report["privacy"]["conditional_epsilon"] < math.inf
    assert watcher.metrics[-1]["epsilon"] == "infinite"


@pytest.mark.parametrize("physical_batch_size", [None, 3])
def test_run_without_privacy_is_the_ordinary_loop_and_says_infinite(tmp_path, physical_batch_size):
    privacy = {**WITHOUT_PRIVACY, "physical_batch_size": physical_batch_size}
    privacy = {name: value for name, value in privacy.items() if value is not None}
    torch.manual_seed(3)
    report, watcher, folder = run(
        tmp_path,
        {
            "privacy": privacy,
            "training.averaging": 0.0,
            "training.epochs": 2,
            "training.optimizer": "sgd",
            "training.learning_rate": 0.1,
            "training.momentum": 0.9,
        },
    )
    assert report["privacy"]["epsilon"] == "infinite"
    assert report["privacy"]["guarantee"] == "none"
    assert [entry["epsilon"] for entry in watcher.metrics] == ["infinite"] * 2
    assert not (folder / "ledger.jsonl").exists()

    torch.manual_seed(3)
    model, criterion = small_model(), DiceCELoss(False, to_onehot_y=True, softmax=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(phantoms(0), batch_size=8, shuffle=True)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            criterion(model(batch["image"]), batch["label"]).backward()
            optimizer.step()
    weights = torch.load(folder / "model.pt")
    for name, value in model.state_dict().items():
        # Sums over physical batches are rounded otherwise.
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)


def test_training_learns_with_and_without_privacy(tmp_path):
    changes = {"data.patients": 60, "training.learning_rate": 0.02, "training.epochs": 4}
    for name in ("private", "plain"):
        (tmp_path / name).mkdir()
        plain = {"privacy": WITHOUT_PRIVACY} if name == "plain" else {}
        report, _, _ = run(tmp_path / name, {**changes, **plain})
        task = phantom_task(2)
        held_out = make_dataset(split_by_patient(phantom_records(60))[1], task)
        untrained = validation_dice(small_model(), DataLoader(held_out, batch_size=8), 2)
        assert report["results"]["validation_dice"] > untrained + 0.2


def test_patients_with_several_slices_are_counted_and_their_slices_are_not(tmp_path):
    report, _, _ = run(
        tmp_path,
        {
            "data.slices_per_patient": 3,
            "privacy.privacy_unit": "patient",
            "training.epochs": 1,
        },
    )
    # How many slices the patients have is theirs to know, so it is told nowhere.
    assert report["data"] == {
        "name": "phantoms (2D)",
        "classes": 2,
        "image_size": [64, 64],
        "unit": "patient",
        "training_units": 36,
        "validation_units": 4,
    }
    assert report["privacy"]["mechanisms"][0]["description"]["num_units"] == 36


def test_folders_of_pictures_and_of_volumes_are_trained_on(tmp_path):
    pictures = make_image_folder(tmp_path / "pictures", 20)
    volumes = make_volume_folder(tmp_path / "volumes", 20, ("imagesTr", "labelsTr"), channels=2)
    (volumes / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Small",
                "labels": {"0": "a", "1": "b", "2": "c"},
                "modality": {"0": "T1", "1": "T2"},
            }
        )
    )
    for path, kind, size in ((pictures, "images", [16, 16]), (volumes, "nifti", [16, 24, 16])):
        for cache in (True, False):
            folder = tmp_path / f"{kind}-{cache}"
            folder.mkdir()
            data = {"kind": kind, "path": str(path), "image_size": size, "cache": cache}
            report, _, _ = run(
                folder,
                {"data": data, "training.epochs": 1, "privacy.expected_batch_size": 4},
            )
            assert report["data"]["classes"] == (2 if kind == "images" else 3)
            assert report["privacy"]["steps"] > 0
    with pytest.raises(ValueError, match=r"data\.num_classes must be 3 as in dataset\.json, got 2"):
        run(folder, {"data": {**data, "num_classes": 2}, "output": {"folder": "other"}})
    (volumes / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"data\.num_classes must be given, since there is no dat"):
        run(folder, {"data": data, "output": {"folder": "other"}})


def test_weight_average_is_that_of_its_recurrence():
    model = small_model()
    average = WeightAverage(model, 0.9)
    expected = None
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model)
        decay = min(0.9, step / (step + 10))
        new = copy.deepcopy(list(model.parameters()))
        old = new if expected is None else expected
        expected = [
            decay * o.detach() + (1 - decay) * n.detach() for o, n in zip(old, new, strict=True)
        ]
    for found, value in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert average.count == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.target_delta": 0.4}, r"privacy\.target_delta must be < 1 / 3\d, one over"),
        ({"privacy.expected_batch_size": 50}, "batch_size, the expected number of units"),
        ({"data.patients": 1}, "a patient for training and one for validation"),
        ({"model.arguments": {"chanels": [4]}}, "build_model: arguments of unet"),
        ({"model.arguments": {"norm": "batch"}}, "BatchNorm"),
        ({"privacy.threshold": {"kind": "percentile_paper"}}, "max_grad_norm has no effect"),
    ],
)
def test_run_that_cannot_start_can_be_mended_in_the_same_folder(tmp_path, changes, message):
    with pytest.raises((ValueError, dpfast.PrivacyError), match=message):
        run(tmp_path, changes)
    folder = tmp_path / "run"
    assert not (folder / "settings.toml").exists()
    report, _, _ = run(tmp_path, {"training.epochs": 1})
    assert report["results"]["steps"] > 0


def test_folder_of_another_run_or_of_something_else_is_refused(tmp_path):
    run(tmp_path, {"training.epochs": 1})
    with pytest.raises(
        ValueError,
        match=r"must be a new folder or one of the same settings, got .*/run, where "
        r"privacy\.clipping is 'automatic' and not 'flat'",
    ):
        run(tmp_path, {"training.epochs": 1, "privacy.clipping": "flat"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for folder in (tmp_path / "other", tmp_path / "other" / "thesis.tex"):
        with pytest.raises(ValueError, match=r"must be a run folder, empty or new, got .*/other"):
            train(write_settings(tmp_path / "settings.toml", folder=folder), Watcher())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
