"""What is kept of a finished run: report.json and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpfast import _native
from dpfast.federated.rounds import Rounds
from dpfast.federated.settings import FederatedSettings
from dpfast.segmentation.data import Data
from dpfast.segmentation.run_morphology import RunMorphology, public_morphology
from dpfast.segmentation.runs import spoken
from dpfast.segmentation.settings import AdaptiveMorphology
from dpfast.segmentation.task import SegmentationTask
from dpfast.segmentation.training import NOT_COVERED

__all__ = ["examples", "morphology_report", "summary"]

_EXAMPLES = 6


def summary(
    settings: FederatedSettings,
    task: SegmentationTask,
    rounds: Rounds,
    *,
    site_names: Sequence[str],
    data: Mapping[str, Data],
    morphology: Mapping[str, Any],
) -> dict[str, Any]:
    """What report.json holds.

    Args:
      settings: of the run.
      task: of the run.
      rounds: finished.
      site_names: of all sites.
      data: of those that are in this process.
      morphology: see `morphology_report`.
    """
    privacy, promise = settings.privacy, settings.site_privacy
    epsilon = spoken(rounds.epsilon())
    unit = "site" if promise is not None else privacy.privacy_unit
    last = rounds.lines[-1]
    return {
        "run": {
            "method": settings.method,
            "strategy": settings.federation.strategy,
            "clipping": privacy.clipping if privacy.private else None,
            "morphology": settings.morphology.kind,
            "rounds": settings.federation.rounds,
            "seed": settings.federation.seed,
        },
        "task": task.to_dict(),
        "morphology": dict(morphology),
        "sites": {name: _units(settings, data.get(name)) for name in sorted(site_names)},
        "privacy": {
            "guarantee": "none" if epsilon == "infinite" else "(epsilon, delta)",
            "epsilon": epsilon,
            "delta": privacy.target_delta if promise is None else promise.target_delta,
            "privacy_unit": unit,
            "reasons": _reasons(settings),
            "not_covered": NOT_COVERED,
            "over_sites": "the largest of the sites', whose patients must not be the same",
        },
        "results": {
            "scores": last["scores"],
            "sites": {name: each["scores"] for name, each in last["sites"].items()},
        },
        "versions": {
            "dpfast": _native.build_info()["version"],
            **{name: version(name) for name in ("torch", "monai", "flwr")},
        },
    }


def _units(settings: FederatedSettings, data: Data | None) -> dict[str, int]:
    """How many units a site has; nothing where its data are its own."""
    if data is None:
        return {}
    unit = settings.privacy.privacy_unit
    return {
        "training_units": data.num_training[unit],
        "validation_units": data.num_validation[unit],
    }


def morphology_report(
    settings: FederatedSettings, task: SegmentationTask, sites: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """What was done to scores and predictions.

    Args:
      settings: of the run.
      task: of the run.
      sites: where sizes are measured at each site, what each did; empty where nobody told.
    """
    chosen = settings.morphology
    if not isinstance(chosen, AdaptiveMorphology):
        return public_morphology(chosen, task).report
    common = {"kind": chosen.kind, "at_prediction": chosen.at_prediction}
    return {**common, "footprint": chosen.footprint, "sites": dict(sites)}


def _reasons(settings: FederatedSettings) -> list[str]:
    found = []
    if not settings.privacy.private and settings.site_privacy is None:
        found.append("private = false: neither clipped nor noisy")
    if settings.privacy.threshold.kind == "percentile_paper":
        found.append("the threshold is a percentile of the batch's own norms")
    if settings.federation.seed is not None:
        found.append("seeded noise: whoever knows the seed can remove it")
    return found


def examples(
    model: torch.nn.Module, data: Mapping[str, Data], morphology: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """One validation image of each of the first sites, a middle slice in 3D."""
    arrays: dict[str, NDArray[Any]] = {}
    names = sorted(data)[:_EXAMPLES]
    model.eval()
    for number, name in enumerate(names):
        dataset: Any = data[name].validation
        image, label = dataset[0]["image"], dataset[0]["label"]
        own = morphology.get("sites", {}).get(name, morphology)
        predicted = RunMorphology.from_report(own, data[name].task.num_classes)
        with torch.no_grad():
            found = predicted.class_maps(model(image[None]))[0, 0]
        for kind, array in (("image", image[0]), ("truth", label[0]), ("prediction", found)):
            plane = array if array.dim() == 2 else array[_widest(label[0])]
            arrays[f"{kind}_{number}"] = plane.numpy().astype(
                np.float32 if kind == "image" else np.uint8
            )
    return {**arrays, "sites": np.array(names)}


def _widest(label: torch.Tensor) -> int:
    return int((label > 0).flatten(1).sum(1).argmax())
