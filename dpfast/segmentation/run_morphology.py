"""The morphology of a training run: of its settings, or measured on its masks once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dp_accounting
import torch

from dpfast.errors import PrivacyError
from dpfast.morphology import DPMorph, adapt
from dpfast.morphology.label_maps import refine_by
from dpfast.privacy import PrivacyLedger, accounting
from dpfast.segmentation.data import Data
from dpfast.segmentation.run_folder import StateFolder
from dpfast.segmentation.settings import (
    AdaptiveMorphology,
    FixedMorphology,
    NoMorphology,
    Settings,
)
from dpfast.segmentation.task import Labels, SegmentationTask

__all__ = ["RunMorphology", "prepare_morphology", "public_morphology"]


@dataclass(frozen=True)
class RunMorphology:
    """What is done to scores before the loss, and to predictions.

    Attributes:
      morph: between scores and loss; None: nothing.
      at_prediction: what it is applied to where there is no loss: "scores", "class_maps" or
        "nothing".
      num_classes: background included.
      report: the settings that were used, and what was released; JSON-able.
    """

    morph: DPMorph | None
    at_prediction: str
    num_classes: int
    report: dict[str, Any]

    @classmethod
    def from_report(cls, report: Mapping[str, Any], num_classes: int) -> RunMorphology:
        """What a run's report says."""
        if "classes" not in report:
            return cls(None, "nothing", num_classes, dict(report))
        classes = {
            int(name): (each["operation"], each["size"]) for name, each in report["classes"].items()
        }
        morph = DPMorph("identity", 1, classes, footprint=report["footprint"])
        return cls(morph, report["at_prediction"], num_classes, dict(report))

    def scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are used at prediction, (N, num_classes, *spatial)."""
        if self.morph is None or self.at_prediction != "scores":
            return scores
        changed: torch.Tensor = self.morph(scores)
        return changed

    def class_maps(self, scores: torch.Tensor) -> torch.Tensor:
        """Predicted classes, (N, 1, *spatial), from the network's scores."""
        found = self.scores(scores).argmax(1, keepdim=True)
        if self.morph is None or self.at_prediction != "class_maps":
            return found
        return refine_by(self.morph, found, self.num_classes)


def prepare_morphology(
    settings: Settings, data: Data, folder: StateFolder, ledger: PrivacyLedger | None
) -> RunMorphology:
    """The morphology that the settings ask for.

    Adaptive sizes are released once: the folder keeps them, and a continuation takes them from
    there. Their cost is in the ledger before, so that a target epsilon covers it.

    Args:
      settings: of the run.
      data: whose training masks are measured.
      folder: of the run.
      ledger: of the run; None without privacy.

    Raises:
      ValueError: settings that do not fit the task, or leave nothing of the target epsilon.
      PrivacyError: a folder that has lost what was released.
    """
    chosen, task = settings.morphology, data.task
    if not isinstance(chosen, AdaptiveMorphology):
        return public_morphology(chosen, task)
    if ledger is None:
        raise PrivacyError("morphology: kind 'adaptive' needs a private run, which has a ledger")
    released = _released(settings, chosen, data, folder, ledger)
    sizes = released["sizes"]
    morph = DPMorph(
        per_class=[None, *((chosen.operation, sizes[str(c)]) for c in _foreground(task))],
        footprint=chosen.footprint,
    )
    return _made(chosen, task, morph, released)


def public_morphology(
    chosen: FixedMorphology | NoMorphology, task: SegmentationTask
) -> RunMorphology:
    """A morphology that looks at no data.

    Raises:
      ValueError: settings that do not fit the task.
    """
    if isinstance(chosen, NoMorphology):
        return RunMorphology(None, "nothing", task.num_classes, {"kind": chosen.kind})
    return _made(chosen, task, _fixed(chosen, task), {})


def _made(
    chosen: FixedMorphology | AdaptiveMorphology,
    task: SegmentationTask,
    morph: DPMorph,
    released: Mapping[str, Any],
) -> RunMorphology:
    report: dict[str, Any] = {
        "kind": chosen.kind,
        "classes": {
            str(c): {"operation": operation, "size": size}
            for c, (operation, size) in enumerate(morph.refinements(task.num_classes))
        },
        "footprint": morph.footprint,
        "at_prediction": chosen.at_prediction,
    }
    for name in ("fell_back", "noisy_counts"):
        if name in released:
            report[name] = released[name]
    return RunMorphology(morph, chosen.at_prediction, task.num_classes, report)


def _foreground(task: SegmentationTask) -> range:
    return range(1, task.num_classes)


def _fixed(chosen: FixedMorphology, task: SegmentationTask) -> DPMorph:
    beyond = [name for name in chosen.per_class if int(name) not in _foreground(task)]
    if beyond:
        raise ValueError(
            f"morphology.per_class must name classes from 1 to {task.num_classes - 1}, got "
            f"{beyond[0]}"
        )
    per_class = {int(name): (each.operation, each.size) for name, each in chosen.per_class.items()}
    for size in (chosen.size, *(size for _, size in per_class.values())):
        if isinstance(size, tuple) and len(size) != task.spatial_dims:
            raise ValueError(
                f"morphology.size must have {task.spatial_dims} axes like the images, got "
                f"{list(size)}"
            )
    return DPMorph(
        chosen.operation,
        chosen.size,
        per_class,
        background=None if chosen.all_channels else 0,
        footprint=chosen.footprint,
    )


def _released(
    settings: Settings,
    chosen: AdaptiveMorphology,
    data: Data,
    folder: StateFolder,
    ledger: PrivacyLedger,
) -> dict[str, Any]:
    """What the folder keeps of a measurement, which is made where there is none."""
    # JSON, as what it is compared with.
    measured = {
        name: table.model_dump(mode="json", exclude={"at_prediction"})
        for name, table in (("data", settings.data), ("morphology", chosen))
    }
    kept = folder.morphology()
    if kept is not None and kept["ledger"] == ledger.run and kept["settings"] == measured:
        return kept
    if folder.started:
        raise PrivacyError(
            f"morphology: {folder.path} must have the morphology.json that its run began with, and "
            "the ledger that counts it; start a new run folder"
        )
    _refuse_overspending(settings, chosen, ledger)
    dataset: Any = data.training
    result = adapt(
        Labels(dataset),
        [record["patient_id"] for record in dataset.data],
        num_classes=data.task.num_classes,
        noise_multiplier=chosen.noise_multiplier,
        ledger=ledger,
        fixed_size=chosen.fixed_size,
        operation=chosen.operation,
        kappa=chosen.kappa,
        max_octaves=chosen.max_octaves,
        footprint=chosen.footprint,
    )
    assert result.noisy_counts is not None
    released = {
        "ledger": ledger.run,
        "settings": measured,
        "sizes": _by_name(result.sizes),
        "fell_back": list(result.fell_back),
        "noisy_counts": _by_name(result.noisy_counts),
    }
    folder.write_morphology(released)
    return released


def _refuse_overspending(
    settings: Settings, chosen: AdaptiveMorphology, ledger: PrivacyLedger
) -> None:
    """Find out before the release that it would leave nothing to train with."""
    target, delta = settings.privacy.target_epsilon, settings.privacy.target_delta
    if target is None or delta is None:
        return
    event = dp_accounting.GaussianDpEvent(chosen.noise_multiplier)
    cost = accounting.epsilon([*ledger.spent(), (event, 1)], delta)
    if cost >= target:
        raise ValueError(
            "morphology.noise_multiplier must leave something of privacy.target_epsilon, "
            f"{target:g}, to train with: with what was spent before, the measurement costs "
            f"{cost:.4g}"
        )


def _by_name(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(number): value for number, value in values.items()}
