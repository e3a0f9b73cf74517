"""Settings files: what is written is what is used, and what is wrong is named."""

import importlib
import sys
from pathlib import Path

import pytest

import dpfast
from dpfast.segmentation.settings import load_settings
from tests.segmentation.settings_files import WITHOUT_PRIVACY, write_settings

# Settings of federated runs have their own reader and their own test.
EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").glob("*.toml")
    if not path.name.startswith("federated_")
)
FOLDER = {"kind": "images", "path": "x", "image_size": [8, 8]}
VOLUMES = {"kind": "nifti", "path": "x", "image_size": [8, 8, 8]}


def load(tmp_path, changes=None):
    return load_settings(write_settings(tmp_path / "settings.toml", changes))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_shipped_settings_are_valid(path):
    settings = load_settings(path)
    assert settings.privacy.private
    assert settings.privacy.target_epsilon == 8.0


def test_there_are_shipped_settings_of_every_kind():
    kinds = {load_settings(path).data.kind for path in EXAMPLES}
    assert kinds == {"phantoms", "images", "nifti"}


def test_what_is_written_is_what_is_read(tmp_path):
    settings = load(
        tmp_path,
        {
            "data": {**VOLUMES, "num_classes": 3, "cache": False},
            "training.optimizer": "sgd",
            "training.momentum": 0.5,
            "privacy.privacy_unit": "patient",
            "privacy.max_samples_per_unit": 2,
            "privacy.max_grad_norm": 1,
        },
    )
    assert (settings.data.num_classes, settings.data.cache, settings.data.fit) == (
        3,
        False,
        "crop_or_pad",
    )
    assert settings.model.arguments == {"channels": [4, 8], "strides": [2]}
    assert (settings.training.optimizer, settings.training.momentum) == ("sgd", 0.5)
    assert (settings.privacy.privacy_unit, settings.privacy.max_samples_per_unit) == ("patient", 2)
    assert settings.output.folder == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("threshold", "built"),
    [
        ({"kind": "fixed"}, None),
        (
            {"kind": "private_quantile", "target_percentile": 30.0, "count_noise": 9.0, "lower": 1},
            dpfast.PrivateQuantile(target_percentile=30.0, count_noise=9.0, lower=1.0),
        ),
        (
            {"kind": "histogram", "num_bins": 7, "memory": 0.5, "upper": 2.0},
            dpfast.NoisyHistogram(num_bins=7, memory=0.5, upper=2.0),
        ),
    ],
)
def test_thresholds_are_what_the_engine_takes(tmp_path, threshold, built):
    settings = load(tmp_path, {"privacy.threshold": threshold})
    assert settings.privacy.threshold.build() == built


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, {"kind": "none"}),
        ({"kind": "none"}, {"kind": "none"}),
        (
            {"kind": "fixed"},
            {"operation": "closing", "size": 3, "per_class": {}, "at_prediction": "scores"},
        ),
        (
            {
                "kind": "fixed",
                "operation": "open",
                "size": [3, 5],
                "footprint": "cross",
                "at_prediction": "class_maps",
                "per_class": {"2": {"operation": "both", "size": 7}},
            },
            {
                "operation": "opening",
                "size": (3, 5),
                "footprint": "cross",
                "at_prediction": "class_maps",
                "per_class": {"2": {"operation": "opening_closing", "size": 7}},
            },
        ),
        (
            {"kind": "adaptive", "noise_multiplier": 5, "kappa": 0.25, "fixed_size": 7},
            {
                "noise_multiplier": 5.0,
                "kappa": 0.25,
                "fixed_size": 7,
                "max_octaves": 6.0,
                "operation": "opening_closing",
            },
        ),
    ],
)
def test_morphology_is_read_as_written(tmp_path, written, read):
    changes = {"privacy.privacy_unit": "patient"}
    if written is not None:
        changes["morphology"] = written
    found = load(tmp_path, changes).morphology.model_dump()
    assert {name: found[name] for name in read} == read


def test_paper_threshold_takes_the_place_of_the_bound(tmp_path):
    paper = {"kind": "percentile_paper", "percentile": 75.0}
    settings = load(tmp_path, {"privacy.threshold": paper, "privacy.max_grad_norm": None})
    assert settings.privacy.threshold.build() == dpfast.PercentilePaper(75.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Misspelt or in the wrong table.
        ({"privacy.target_epsilonn": 8.0}, "privacy.target_epsilonn: there is no such setting"),
        ({"privacy.epochs": 3}, "privacy.epochs: there is no such setting"),
        ({"data.pacients": 3}, "data.pacients: there is no such setting"),
        ({"data.path": "x"}, "data.path: there is no such setting"),
        ({"privcy": {"private": False}}, "privcy: there is no such setting"),
        (
            {"privacy.threshold": {"kind": "histogram", "count_noise": 3.0}},
            "privacy.threshold.count_noise: there is no such setting",
        ),
        # Of the wrong type: nothing is converted.
        ({"training.epochs": "3"}, "training.epochs: .* valid integer, got '3'"),
        ({"training.epochs": 3.0}, "training.epochs: .* valid integer, got 3.0"),
        ({"training.epochs": True}, "training.epochs: .* valid integer, got True"),
        ({"privacy.max_grad_norm": "1.0"}, "privacy.max_grad_norm: .* valid number, got '1.0'"),
        ({"privacy.private": 0}, "privacy.private: .* valid boolean, got 0"),
        ({"data": {**FOLDER, "image_size": [8]}}, "data.image_size: .* at least 2 items"),
        ({"data": {**VOLUMES, "image_size": [8, 8]}}, "data.image_size: .* at least 3 items"),
        ({"data": {**FOLDER, "image_size": [8, 0]}}, "data.image_size.1: .*got 0"),
        # Out of range.
        ({"privacy.max_grad_norm": 0.0}, "privacy.max_grad_norm: .*greater than 0, got 0.0"),
        ({"privacy.target_delta": 1.0}, "privacy.target_delta: .*less than 1, got 1.0"),
        ({"privacy.noise_multiplier": 0.0}, "privacy.noise_multiplier: .*got 0.0"),
        ({"privacy.clipping": "none"}, "privacy.clipping: .*'flat', .*got 'none'"),
        ({"privacy.clipping": "flatt"}, "privacy.clipping: .*got 'flatt'"),
        ({"privacy.privacy_unit": "site"}, "privacy.privacy_unit: .*got 'site'"),
        ({"model.name": "vnet"}, "model.name: .*got 'vnet'"),
        ({"training.averaging": 1.0}, "training.averaging: .*got 1.0"),
        ({"data": {**FOLDER, "kind": "dicom"}}, "data: .*'kind'"),
        ({"morphology": {"kind": "fixd"}}, "morphology: .*'none', 'fixed', 'adaptive'"),
        (
            {"morphology": {"kind": "fixed", "operation": "opn"}},
            "morphology.operation: must be one of open, close, both, .*got 'opn'",
        ),
        (
            {"morphology": {"kind": "fixed", "size": 0}},
            "morphology.size: must be a whole number >= 1, or one for each .*got 0",
        ),
        (
            {"morphology": {"kind": "fixed", "size": [3, 2.5]}},
            r"morphology.size: must be a whole number >= 1.*got \[3, 2.5\]",
        ),
        (
            {"morphology": {"kind": "fixed", "footprint": "disk"}},
            "morphology.footprint: .*got 'disk'",
        ),
        (
            {"morphology": {"kind": "fixed", "per_class": {"0": {"operation": "open", "size": 3}}}},
            "morphology.per_class.0.*pattern",
        ),
        (
            {"morphology": {"kind": "fixed", "per_class": {"1": {"operation": "open"}}}},
            "morphology.per_class.1.size: must be given",
        ),
        (
            {"morphology": {"kind": "fixed", "noise_multiplier": 5.0}},
            "morphology.noise_multiplier: there is no such setting",
        ),
        (
            {"morphology": {"kind": "none", "at_prediction": "scores"}},
            "morphology.at_prediction: there is no such setting",
        ),
        (
            {"morphology": {"kind": "adaptive"}, "privacy.privacy_unit": "patient"},
            "morphology.noise_multiplier: must be given",
        ),
        (
            {"morphology": {"kind": "adaptive", "noise_multiplier": 0.0}},
            "morphology.noise_multiplier: .*greater than 0, got 0.0",
        ),
        (
            {"morphology": {"kind": "adaptive", "noise_multiplier": 5.0, "kappa": 1.5}},
            "morphology.kappa: .*less than or equal to 1, got 1.5",
        ),
        (
            {"morphology": {"kind": "adaptive", "noise_multiplier": 5.0, "max_octaves": 16.0}},
            "morphology.max_octaves: .*less than or equal to 15, got 16.0",
        ),
        # Missing.
        ({"privacy": None}, "privacy: must be given"),
        ({"privacy.expected_batch_size": None}, "privacy.expected_batch_size: must be given"),
        ({"privacy.target_delta": None}, "privacy: target_delta must be given"),
        ({"privacy.max_grad_norm": None}, "privacy: max_grad_norm must be given"),
        ({"privacy.noise_multiplier": None}, "privacy: one of target_epsilon and noise_multiplier"),
        # At odds with one another.
        (
            {"morphology": {"kind": "adaptive", "noise_multiplier": 5.0}},
            "the file: morphology.kind 'adaptive' needs privacy.private = true and privacy_unit",
        ),
        (
            {
                "morphology": {"kind": "adaptive", "noise_multiplier": 5.0},
                "privacy": WITHOUT_PRIVACY,
            },
            "the file: morphology.kind 'adaptive' needs privacy.private = true",
        ),
        (
            {"morphology": {"kind": "fixed", "all_channels": True, "at_prediction": "class_maps"}},
            "morphology: at_prediction must not be 'class_maps' with all_channels",
        ),
        ({"privacy.target_epsilon": 8.0}, "privacy: one of target_epsilon and noise_multiplier"),
        ({"privacy.max_samples_per_unit": 2}, "privacy: max_samples_per_unit has no effect"),
        ({"privacy.threshold": {"kind": "percentile_paper"}}, "privacy: max_grad_norm has no eff"),
        ({"training.momentum": 0.9}, "training: momentum has no effect with optimizer 'adam'"),
        (
            {"privacy": {**WITHOUT_PRIVACY, "target_epsilon": 8.0, "clipping": "flat"}},
            "privacy: clipping, target_epsilon must not be given with private = false",
        ),
        (
            {"data": FOLDER, "privacy.privacy_unit": "patient"},
            "the file: privacy_unit 'patient' needs data.patient_column",
        ),
    ],
)
def test_wrong_setting_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"settings\.toml: {message}"):
        load(tmp_path, changes)


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_numbers_must_be_finite(tmp_path, number):
    path = write_settings(tmp_path / "settings.toml", {"privacy.noise_multiplier": 77.0})
    path.write_text(path.read_text().replace("77.0", number))
    with pytest.raises(ValueError, match=r"privacy\.noise_multiplier: .*finite number"):
        load_settings(path)


def test_every_wrong_setting_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)model\.nam: there is.*\n.*training\.epochs: "):
        load(tmp_path, {"training.epochs": 0, "model.nam": "unet"})


def test_file_that_is_no_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml: settings must be a readable file"):
        load_settings(tmp_path / "none.toml")
    path = tmp_path / "settings.toml"
    path.write_text("[data\n")
    with pytest.raises(ValueError, match=r"settings\.toml: settings must be TOML, got"):
        load_settings(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"settings\.toml: settings must be a readable file"):
        load_settings(path)


def test_settings_without_pydantic_name_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "dpfast.segmentation.settings")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match=r"pydantic must be installed: .* 'dpfast\[train\]'"):
        importlib.import_module("dpfast.segmentation.settings")
