"""`federate`: what `dpfast federate` does in one process, from settings to a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpfast import _native
from dpfast.federated.flower import InProcessGrid
from dpfast.federated.partition import dirichlet_sites, iid_sites, natural_sites
from dpfast.federated.rounds import Observer, Policy, Rounds
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.settings import (
    DirichletSites,
    FederatedSettings,
    IidSites,
    load_federated_settings,
)
from dpfast.federated.site import Site, SiteFolder
from dpfast.federated.strategies import PrivateSites, make_strategy
from dpfast.federated.weights import load_weights, weights_of
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation.data import Data, find_records, make_data
from dpfast.segmentation.models import build_model
from dpfast.segmentation.records import Record
from dpfast.segmentation.runs import spoken
from dpfast.segmentation.task import SegmentationTask
from dpfast.segmentation.training import NOT_COVERED

__all__ = ["federate"]

_EXAMPLES = 6


def federate(path: Path, observer: Observer) -> dict[str, Any]:
    """Train one model at several sites as a settings file says, or go on where it was stopped.

    All sites are in this process, one after the other, with one model in memory.

    Args:
      path: the settings file; see `FederatedSettings`.
      observer: is told about progress.

    Returns:
      What report.json holds.

    Raises:
      ValueError: a wrong setting, unreadable data, or a folder of another run. PrivacyError: with
        these settings there would be no guarantee. MissingSitesError: too few sites could finish a
        round. ImportError: an optional package is missing.
    """
    settings = load_federated_settings(path)
    folder = FederatedFolder(settings)
    finished = folder.report()
    if finished is not None:
        return finished
    task, records = find_records(settings.data)
    data = {
        name: make_data(task, own, settings.data)
        for name, own in _partition(settings, records).items()
    }
    folder.start(path)
    sites = _sites(settings, data, folder)
    ledger = None if settings.site_privacy is None else PrivacyLedger(folder.server_ledger)
    try:
        rounds = _rounds(settings, task, sites, folder, ledger)
        rounds.run(observer)
    finally:
        for site in sites.values():
            site.close()
        if ledger is not None:
            ledger.close()
    model = _model(settings, task)
    load_weights(model, rounds.weights)
    report = _report(settings, task, data, rounds)
    folder.write_results(model.state_dict(), _examples(model, data), report)
    return report


def _partition(settings: FederatedSettings, records: list[Record]) -> Mapping[str, list[Record]]:
    chosen = settings.sites
    if isinstance(chosen, IidSites):
        return iid_sites(records, chosen.number, seed=chosen.seed)
    if isinstance(chosen, DirichletSites):
        return dirichlet_sites(
            records, chosen.number, alpha=chosen.alpha, seed=chosen.seed, key=chosen.column
        )
    return natural_sites(records, *chosen.columns)


def _model(settings: FederatedSettings, task: SegmentationTask) -> torch.nn.Module:
    chosen = settings.model
    return build_model(chosen.name, task, chosen.arguments, weights_seed=chosen.weights_seed)


def _sites(
    settings: FederatedSettings, data: Mapping[str, Data], folder: FederatedFolder
) -> dict[str, Site]:
    seed = settings.federation.seed
    return {
        name: Site(
            name,
            settings.of_site(folder.site(name)),
            own,
            SiteFolder(folder.site(name)),
            local_epochs=settings.training.local_epochs,
            proximal_mu=settings.training.proximal_mu,
            seed=None if seed is None else seed * len(data) + number,
        )
        for number, (name, own) in enumerate(sorted(data.items()))
    }


def _rounds(
    settings: FederatedSettings,
    task: SegmentationTask,
    sites: Mapping[str, Site],
    folder: FederatedFolder,
    ledger: PrivacyLedger | None,
) -> Rounds:
    federation, promise = settings.federation, settings.site_privacy
    unknown = sorted(set(federation.site_weights) - set(sites))
    if unknown:
        raise ValueError(
            f"federation.site_weights must name sites, {', '.join(sorted(sites))}, got {unknown[0]}"
        )
    grid = InProcessGrid(sites)
    server_epsilon = None
    if promise is None or ledger is None:
        arguments = dict(federation.strategy_arguments)
        if federation.strategy == "fedprox":
            arguments["proximal_mu"] = settings.training.proximal_mu
        strategy = make_strategy(federation.strategy, arguments, num_sites=len(sites))
    else:
        delta = promise.target_delta
        strategy = PrivateSites(
            grid.nodes,
            max_update_norm=promise.max_update_norm,
            noise_multiplier=promise.noise_multiplier,
            sample_rate=promise.sample_rate,
            ledger=ledger,
            seed=federation.seed,
        )

        def server_epsilon() -> float:
            return ledger.epsilon(delta)

    policy = Policy(
        rounds=federation.rounds,
        min_sites=federation.min_sites or len(sites),
        weights=federation.site_weights,
        evaluate_every=federation.evaluate_every,
    )
    return Rounds(
        grid,
        grid.nodes,
        strategy,
        policy,
        weights_of(_model(settings, task)),
        folder,
        server_epsilon,
    )


def _report(
    settings: FederatedSettings,
    task: SegmentationTask,
    data: Mapping[str, Data],
    rounds: Rounds,
) -> dict[str, Any]:
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
        "task": {
            "name": task.name,
            "class_names": [f"class {number}" for number in range(1, task.num_classes)],
        },
        "sites": {
            name: {
                "training_units": each.num_training[privacy.privacy_unit],
                "validation_units": each.num_validation[privacy.privacy_unit],
            }
            for name, each in sorted(data.items())
        },
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


def _reasons(settings: FederatedSettings) -> list[str]:
    found = []
    if not settings.privacy.private and settings.site_privacy is None:
        found.append("private = false: neither clipped nor noisy")
    if settings.privacy.threshold.kind == "percentile_paper":
        found.append("the threshold is a percentile of the batch's own norms")
    if settings.federation.seed is not None:
        found.append("seeded noise: whoever knows the seed can remove it")
    return found


def _examples(model: torch.nn.Module, data: Mapping[str, Data]) -> dict[str, NDArray[Any]]:
    """One validation image of each of the first sites, a middle slice in 3D."""
    arrays: dict[str, NDArray[Any]] = {}
    names = sorted(data)[:_EXAMPLES]
    model.eval()
    for number, name in enumerate(names):
        dataset: Any = data[name].validation
        image, label = dataset[0]["image"], dataset[0]["label"]
        with torch.no_grad():
            found = model(image[None]).argmax(1)[0]
        for kind, array in (("image", image[0]), ("truth", label[0]), ("prediction", found)):
            plane = array if array.dim() == 2 else array[_widest(label[0])]
            arrays[f"{kind}_{number}"] = plane.numpy().astype(
                np.float32 if kind == "image" else np.uint8
            )
    return {**arrays, "sites": np.array(names)}


def _widest(label: torch.Tensor) -> int:
    return int((label > 0).flatten(1).sum(1).argmax())
