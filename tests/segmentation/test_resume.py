"""A run that was interrupted, and its continuation."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpfast
from dpfast.segmentation.training import train
from tests.segmentation.settings_files import WITHOUT_PRIVACY, write_settings
from tests.segmentation.test_training import Watcher, lines

PER_EPOCH = 5  # steps: 36 training phantoms in batches of 8
DROPOUT = {"model.arguments": {"channels": [4, 8], "strides": [2], "dropout": 0.2}}


class InterruptionError(Exception):
    pass


class Interrupter(Watcher):
    """Stops the run after a step, as an error or a key would."""

    def __init__(self, step):
        super().__init__()
        self.last = step

    def stepped(self, steps):
        super().stepped(steps)
        if steps == self.last:
            raise InterruptionError


def settings(tmp_path, changes=None):
    return write_settings(tmp_path / "settings.toml", changes)


def interrupted(path, step):
    # The traceback would keep the ledger open.
    try:
        train(path, Interrupter(step))
    except InterruptionError:
        return
    pytest.fail("the run ended before it was interrupted")


def ledger_steps(folder):
    return dpfast.PrivacyLedger(folder / "ledger.jsonl").spending(0).steps


def test_phantoms_are_as_many_as_these_tests_think(tmp_path):
    watcher = Watcher()
    train(settings(tmp_path, {"training.epochs": 1}), watcher)
    assert watcher.start == (0, PER_EPOCH)


def test_private_run_goes_on_and_counts_the_lost_steps(tmp_path):
    path, folder = settings(tmp_path, DROPOUT), tmp_path / "run"
    interrupted(path, PER_EPOCH + 2)
    assert ledger_steps(folder) == PER_EPOCH + 2
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    before = lines(folder / "metrics.jsonl")
    watcher = Watcher()
    report = train(path, watcher)
    # Two steps were taken after the checkpoint: they are paid for, and not taken again.
    assert watcher.start == (PER_EPOCH + 2, 3 * PER_EPOCH)
    assert watcher.steps == list(range(PER_EPOCH + 3, 3 * PER_EPOCH + 1))
    assert ledger_steps(folder) == 3 * PER_EPOCH
    assert report["results"]["steps"] == 3 * PER_EPOCH
    assert report["results"]["steps_lost_in_interruptions"] == 2
    metrics = lines(folder / "metrics.jsonl")
    assert metrics[:1] == before == checkpoint["metrics"]
    assert [entry["epoch"] for entry in metrics] == [1, 2, 3]
    assert metrics[-1]["epsilon"] == report["privacy"]["epsilon"]


def test_continuation_starts_from_the_checkpoint(tmp_path):
    path, folder = settings(tmp_path), tmp_path / "run"
    interrupted(path, PER_EPOCH + 1)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    # All steps but the one in flight are spent: nothing may change the checkpoint's weights.
    ledger = dpfast.PrivacyLedger(folder / "ledger.jsonl")
    ledger.record(0, steps=2 * PER_EPOCH - 1, spends=2 * PER_EPOCH - 1)
    del ledger
    watcher = Watcher()
    report = train(path, watcher)
    assert watcher.steps == []
    assert report["results"]["steps_lost_in_interruptions"] == 2 * PER_EPOCH
    weights = torch.load(folder / "model.pt")
    for name, value in weights.items():
        torch.testing.assert_close(value, checkpoint["average"][f"module.{name}"], rtol=0, atol=0)
    assert report["results"]["validation_dice"] == pytest.approx(
        checkpoint["metrics"][0]["validation_dice"], rel=1e-6
    )


@pytest.mark.parametrize("step", [PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 3])
def test_run_without_privacy_goes_on_as_if_nothing_had_been(tmp_path, step):
    changes = {**DROPOUT, "privacy": WITHOUT_PRIVACY, "training.optimizer": "sgd"}
    changes["training.momentum"] = 0.9
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    torch.manual_seed(0)
    whole = train(settings(tmp_path / "whole", changes), Watcher())
    path = settings(tmp_path / "cut", changes)
    torch.manual_seed(0)
    interrupted(path, step)
    # Before the first checkpoint, written after that step, there is no generator to go on with.
    torch.manual_seed(0 if step <= PER_EPOCH else 99)
    cut = train(path, Watcher())
    assert cut == whole
    one, other = (torch.load(tmp_path / name / "run" / "model.pt") for name in ("whole", "cut"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)
    metrics = [lines(tmp_path / name / "run" / "metrics.jsonl") for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_run_interrupted_before_its_first_checkpoint_starts_anew_and_pays(tmp_path):
    path, folder = settings(tmp_path, {"training.epochs": 1}), tmp_path / "run"
    interrupted(path, PER_EPOCH - 1)
    assert not (folder / "checkpoint.pt").exists()
    watcher = Watcher()
    report = train(path, watcher)
    assert watcher.start == (PER_EPOCH - 1, PER_EPOCH)
    assert watcher.steps == [PER_EPOCH]
    assert report["results"]["steps_lost_in_interruptions"] == PER_EPOCH - 1


def test_finished_run_is_not_trained_again(tmp_path):
    path = settings(tmp_path, {"training.epochs": 1})
    report = train(path, Watcher())
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    watcher = Watcher()
    assert train(path, watcher) == report
    # The copied settings are settings, too.
    assert train(tmp_path / "run" / "settings.toml", watcher) == report
    assert watcher.start is None
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_lost_ledger_is_carried_over_from_the_checkpoint(tmp_path):
    path, folder = settings(tmp_path), tmp_path / "run"
    interrupted(path, PER_EPOCH + 1)
    (folder / "ledger.jsonl").unlink()
    watcher = Watcher()
    train(path, watcher)
    assert watcher.start == (PER_EPOCH, 3 * PER_EPOCH)
    assert ledger_steps(folder) == 3 * PER_EPOCH


def test_damaged_checkpoint_or_ledger_is_named(tmp_path):
    path, folder = settings(tmp_path), tmp_path / "run"
    interrupted(path, PER_EPOCH + 1)
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"run/checkpoint\.pt must be a checkpoint, got"):
        train(path, Watcher())
    (folder / "checkpoint.pt").write_bytes(whole)
    ledger = folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"steps": 1', '"steps": 0', 1))
    with pytest.raises(dpfast.PrivacyError, match=r"of .*ledger\.jsonl does not follow"):
        train(path, Watcher())


def test_run_killed_within_an_epoch_goes_on(tmp_path):
    path, folder = settings(tmp_path), tmp_path / "run"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dpfast.segmentation.training import train\n"
        # After dpfast, which the repository's source folder would hide.
        f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
        "from tests.segmentation.test_training import Watcher\n"
        "class Killer(Watcher):\n"
        "    def stepped(self, steps):\n"
        f"        if steps == {PER_EPOCH + 2}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(Path(sys.argv[1]), Killer())\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "report.json").exists()
    watcher = Watcher()
    report = train(path, watcher)
    assert watcher.start == (PER_EPOCH + 2, 3 * PER_EPOCH)
    assert report["results"]["steps_lost_in_interruptions"] == 2
    assert json.loads((folder / "report.json").read_text()) == report
    assert ledger_steps(folder) == 3 * PER_EPOCH
