"""The federated settings that are shipped."""

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from dpfast.federated.settings import load_federated_settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("federated_*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_shipped_settings_are_valid_and_private(path):
    settings = load_federated_settings(path)
    assert settings.privacy.private
    assert settings.method == "adp_fl"


def test_there_are_shipped_settings_of_pictures_and_volumes():
    assert {load_federated_settings(path).data.kind for path in EXAMPLES} == {"images", "nifti"}
