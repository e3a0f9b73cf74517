"""`train`: what `dpfast train` does, from settings to a finished run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from dpfast import _native
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.data import Data, load_data
from dpfast.segmentation.losses import per_sample_loss
from dpfast.segmentation.metrics import validation_dice
from dpfast.segmentation.models import build_model
from dpfast.segmentation.run_folder import RunFolder
from dpfast.segmentation.run_morphology import RunMorphology, prepare_morphology
from dpfast.segmentation.runs import Criterion, PlainRun, PrivateRun, Run
from dpfast.segmentation.settings import (
    OptimizerSettings,
    PrivacySettings,
    Settings,
    load_settings,
)

__all__ = [
    "EVALUATION_BATCH",
    "NOT_COVERED",
    "Observer",
    "WeightAverage",
    "check_delta",
    "make_criterion",
    "make_optimizer",
    "pick_device",
    "train",
]

EVALUATION_BATCH = 16
# What a reader of the results has to know beside epsilon.
NOT_COVERED = (
    "The validation patients: their Dice is computed and written as it is. Trying settings out on "
    "the same data: every run has its own ledger."
)
TRAINING_LOSS = "not recorded: it is computed from the records that are protected"


class Observer(Protocol):
    """Who is told how a run goes; told nothing that is computed from training records alone."""

    def started(self, data: Mapping[str, Any], steps: int, total_steps: int) -> None:
        """Before the first step."""

    def stepped(self, steps: int) -> None:
        """After every step."""

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """After every epoch, with its line of metrics.jsonl."""


class WeightAverage:
    """A running average of a model's weights, which is smoother than the noisy last ones.

    It is computed from released weights alone, so it costs no privacy.

    Args:
      model: whose weights are averaged.
      decay: weight of the past, 0 <= decay < 1; less in the first steps, when the past is short.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def blend(average: torch.Tensor, new: torch.Tensor, count: Any) -> torch.Tensor:
            return torch.lerp(new, average, min(decay, float(count) / (float(count) + 10.0)))

        self._average = AveragedModel(model, avg_fn=blend).requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        module: nn.Module = self._average.module
        return module

    @property
    def count(self) -> int:
        """Steps that are in the average."""
        return int(self._average.n_averaged)

    def update(self, model: nn.Module) -> None:
        """Take the weights after another step in."""
        self._average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._average.load_state_dict(state)


def train(path: Path, observer: Observer) -> dict[str, Any]:
    """Train a model as a settings file says, or go on with it where an earlier process stopped.

    A continuation starts at the last checkpoint, the end of an epoch. Private steps that were taken
    after it are lost and stay counted: the run ends after the planned number of steps, begun ones
    included, so that it never spends more than planned.

    Args:
      path: the settings file; see `Settings`.
      observer: is told about progress.

    Returns:
      What report.json holds.

    Raises:
      ValueError: a wrong setting, unreadable data, or a folder of another run. PrivacyError: with
        these settings there would be no guarantee. ImportError: an optional package is missing.
    """
    settings = load_settings(path)
    folder = RunFolder(settings)
    finished = folder.report()
    if finished is not None:
        return finished
    device = pick_device(settings.training.device)
    data = load_data(settings.data)
    check_delta(settings.privacy, data)
    model = build_model(
        settings.model.name,
        data.task,
        settings.model.arguments,
        weights_seed=settings.model.weights_seed,
    ).to(device)
    average = WeightAverage(model, settings.training.averaging)
    ledger = PrivacyLedger(folder.ledger) if settings.privacy.private else None
    morphology = prepare_morphology(settings, data, folder, ledger)
    run = _start(model, data, settings, ledger, make_criterion(morphology))
    folder.start(path)
    metrics = _resume(folder, run, average, device)
    summary = data.summary(settings.privacy.privacy_unit)
    observer.started(summary, run.steps, run.total_steps)

    def validate() -> float:
        return _validate(average, data, morphology)

    _take_steps(run, average, validate, folder, metrics, observer)
    if metrics and metrics[-1]["step"] == run.steps:
        dice = metrics[-1]["validation_dice"]
    else:  # no step was left after those lost
        dice = validate()
    report = {
        **_report(run, average, summary, dice),
        "task": data.task.to_dict(),
        "morphology": morphology.report,
    }
    folder.write_results(average.model.state_dict(), report)
    return report


def check_delta(privacy: PrivacySettings, data: Data) -> None:
    """Refuse a delta that is no smaller than one over the number of units."""
    units = data.num_training[privacy.privacy_unit]
    if privacy.target_delta is not None and privacy.target_delta >= 1.0 / units:
        raise ValueError(
            f"privacy.target_delta must be < 1 / {units}, one over the number of units, got "
            f"{privacy.target_delta:g}"
        )


def pick_device(name: str) -> torch.device:
    """The device of a setting: "auto", "cpu" or "cuda".

    Raises:
      ValueError: "cuda" where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device must be 'cpu' or 'auto' here: there is no CUDA device")
    return torch.device(name)


def make_criterion(morphology: RunMorphology) -> Criterion:
    """The loss of each sample, (B,), behind the run's morphology."""
    with needs_extra("train"):
        from monai.losses.dice import DiceCELoss
    loss = per_sample_loss(DiceCELoss(include_background=False, to_onehot_y=True, softmax=True))
    morph = morphology.morph
    return loss if morph is None else lambda scores, labels: loss(morph(scores), labels)


def _start(
    model: nn.Module,
    data: Data,
    settings: Settings,
    ledger: PrivacyLedger | None,
    criterion: Criterion,
) -> Run:
    optimizer = make_optimizer(model, settings.training)
    privacy, epochs = settings.privacy, settings.training.epochs
    if ledger is None:
        return PlainRun(model, optimizer, criterion, data.training, privacy, epochs)
    return PrivateRun(
        model, optimizer, criterion, data.training, data.task, privacy, epochs, ledger
    )


def make_optimizer(model: nn.Module, training: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings."""
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    return torch.optim.SGD(
        model.parameters(), lr=training.learning_rate, momentum=training.momentum
    )


def _resume(
    folder: RunFolder, run: Run, average: WeightAverage, device: torch.device
) -> list[dict[str, Any]]:
    """Set everything to the last checkpoint, if there is one; return its metrics."""
    state = folder.checkpoint(device)
    if state is None:
        return []
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    average.load_state_dict(state["average"])
    run.load_state_dict(state["run"])
    torch.set_rng_state(state["rng"].cpu())
    if "cuda_rng" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    metrics: list[dict[str, Any]] = state["metrics"]
    folder.write_metrics(metrics)
    return metrics


def _take_steps(
    run: Run,
    average: WeightAverage,
    validate: Callable[[], float],
    folder: RunFolder,
    metrics: list[dict[str, Any]],
    observer: Observer,
) -> None:
    """All steps that are left; after each epoch a line of metrics and a checkpoint."""
    while run.steps < run.total_steps:
        for _ in run.epoch():
            average.update(run.model)
            observer.stepped(run.steps)
            # Counted from the run's beginning: a continuation may start within an epoch.
            ended = run.steps % run.steps_per_epoch == 0
            if ended:
                metrics.append(
                    {
                        "epoch": run.steps // run.steps_per_epoch,
                        "step": run.steps,
                        "epsilon": run.epsilon(),
                        "validation_dice": validate(),
                    }
                )
                folder.write_checkpoint(_checkpoint(run, average, metrics))
                folder.write_metrics(metrics)
                observer.evaluated(metrics[-1])
            if run.steps >= run.total_steps:
                break


def _checkpoint(
    run: Run, average: WeightAverage, metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "average": average.state_dict(),
        "run": run.state_dict(),
        "metrics": list(metrics),
        "rng": torch.get_rng_state(),
    }
    if next(run.model.parameters()).is_cuda:
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def _validate(average: WeightAverage, data: Data, morphology: RunMorphology) -> float:
    # A generator of its own, for a DataLoader draws from it: training goes on as without this.
    batches = DataLoader(data.validation, batch_size=EVALUATION_BATCH, generator=torch.Generator())
    return validation_dice(
        average.model, batches, data.task.num_classes, class_maps=morphology.class_maps
    )


def _report(
    run: Run, average: WeightAverage, summary: Mapping[str, Any], dice: float
) -> dict[str, Any]:
    return {
        "privacy": {**run.report(), "not_covered": NOT_COVERED},
        "results": {
            "validation_dice": dice,
            "steps": run.steps,
            "steps_lost_in_interruptions": run.steps - average.count,
            "training_loss": TRAINING_LOSS,
        },
        "data": dict(summary),
        "versions": {
            "dpfast": _native.build_info()["version"],
            **{name: version(name) for name in ("torch", "monai")},
        },
    }
