"""`dpfast predict`: from a finished run and images to label maps."""

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dpfast.cli.app import app
from dpfast.segmentation.training import train
from tests.segmentation import public_layouts as layouts
from tests.segmentation.settings_files import write_settings

RUNNER = CliRunner()


class Quiet:
    def started(self, *_):
        pass

    def stepped(self, *_):
        pass

    def evaluated(self, *_):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    file = write_settings(folder / "settings.toml", {"output.folder": str(folder / "run")})
    train(file, Quiet())
    return folder / "run"


def test_pictures_become_masks(run, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        layouts.picture(tmp_path / "in" / f"{name}.png", rng.integers(0, 255, (40, 50), np.uint8))
    out = tmp_path / "out"
    done = RUNNER.invoke(app, ["predict", str(run), str(tmp_path / "in"), "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in out.iterdir()) == ["a.png", "b.png"]
    mask = np.asarray(Image.open(out / "a.png"))
    assert mask.shape == (40, 50)
    assert set(np.unique(mask)) <= {0, 1}
    again = RUNNER.invoke(app, ["predict", str(run), str(tmp_path / "in"), "--output", str(out)])
    assert again.exit_code == 2


@pytest.mark.parametrize("missing", ["report.json", "model.pt", "settings.toml"])
def test_unfinished_run_is_refused(run, tmp_path, missing):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / missing).unlink()
    layouts.picture(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    done = RUNNER.invoke(
        app, ["predict", str(copy), str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_volume_for_a_model_of_pictures_is_refused(run, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "v.nii")
    done = RUNNER.invoke(
        app, ["predict", str(run), str(tmp_path / "v.nii"), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
