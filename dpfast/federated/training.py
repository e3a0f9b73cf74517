"""`federate`: what `dpfast federate` does on one machine, from settings to a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dpfast import _validate
from dpfast.federated.flower.in_process import InProcessGrid
from dpfast.federated.flower.simulation import simulate
from dpfast.federated.rounds import Observer, Rounds
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.server import Server, check_site_names
from dpfast.federated.settings import FederatedSettings, RemoteSites, load_federated_settings
from dpfast.federated.sites import make_site, records_by_site
from dpfast.federated.summary import examples, morphology_report, summary
from dpfast.segmentation.data import Data, make_data
from dpfast.segmentation.task import SegmentationTask

__all__ = ["ENGINES", "federate"]

ENGINES = ("in_process", "flower")


def federate(path: Path, observer: Observer, *, engine: str = "in_process") -> dict[str, Any]:
    """Train one model at several sites as a settings file says, or go on where it was stopped.

    Args:
      path: the settings file; see `FederatedSettings`.
      observer: is told about progress.
      engine: "in_process": all sites are in this process, one after the other, with one model in
        memory; "flower": Flower's simulation runs them in Ray's processes. Both give the same
        weights.

    Returns:
      What report.json holds.

    Raises:
      ValueError: a wrong setting, unreadable data, or a folder of another run. PrivacyError: with
        these settings there would be no guarantee. MissingSitesError: too few sites could finish a
        round. ImportError: an optional package is missing.
    """
    _validate.choice("federate", "engine", engine, ENGINES)
    settings = load_federated_settings(path)
    if isinstance(settings.sites, RemoteSites):
        raise ValueError(
            "sites.kind 'remote' needs `dpfast server`, and `dpfast site` at each of the sites"
        )
    folder = FederatedFolder(settings)
    finished = folder.report()
    if finished is not None:
        return finished
    task, records = records_by_site(settings)
    data = {name: make_data(task, own, settings.data) for name, own in records.items()}
    check_site_names(settings, list(data))
    folder.start(path)
    run = _in_process if engine == "in_process" else _simulated
    model, rounds, morphology = run(path, settings, task, data, folder, observer)
    report = summary(
        settings, task, rounds, site_names=list(data), data=data, morphology=morphology
    )
    folder.write_results(model.state_dict(), examples(model, data, morphology), report)
    return report


def _in_process(
    path: Path,
    settings: FederatedSettings,
    task: SegmentationTask,
    data: Mapping[str, Data],
    folder: FederatedFolder,
    observer: Observer,
) -> tuple[Any, Rounds, dict[str, Any]]:
    with ExitStack() as stack:
        sites = {}
        for name, own in sorted(data.items()):
            sites[name] = make_site(settings, name, own, folder.site(name))
            stack.callback(sites[name].close)
        grid = InProcessGrid(sites)
        stack.callback(grid.close)
        server = stack.enter_context(Server(settings, task, folder, grid, grid.nodes))
        model, rounds = server.run(observer)
        told = {name: site.morphology for name, site in sites.items()}
        return model, rounds, morphology_report(settings, task, told)


def _simulated(
    path: Path,
    settings: FederatedSettings,
    task: SegmentationTask,
    data: Mapping[str, Data],
    folder: FederatedFolder,
    observer: Observer,
) -> tuple[Any, Rounds, dict[str, Any]]:
    for name, own in data.items():
        # What a site refuses is told before any process is started.
        make_site(settings, name, own, folder.site(name)).close()

    def conduct(grid: Any, nodes: Mapping[int, str]) -> tuple[Any, Rounds]:
        with Server(settings, task, folder, grid, nodes) as server:
            return server.run(observer)

    model, rounds = simulate(path, folder.site, sorted(data), conduct)
    told = {}
    for name, own in data.items():
        site = make_site(settings, name, own, folder.site(name))
        told[name] = site.morphology
        site.close()
    return model, rounds, morphology_report(settings, task, told)
