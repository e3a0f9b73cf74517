"""A federation over the network: Flower's SuperLink and SuperNodes around our server and sites.

TLS everywhere between machines; a site is who holds the private key that the server knows it by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dpfast.federated.certificates import site_keys
from dpfast.federated.flower.messages import client_app
from dpfast.federated.flower.processes import super_link, super_node
from dpfast.federated.flower.runtime import answer_next, serving_grid
from dpfast.federated.rounds import MissingSitesError, Observer
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.server import Server
from dpfast.federated.settings import FederatedSettings, RemoteSites, load_federated_settings
from dpfast.federated.sites import data_of, make_site, records_by_site
from dpfast.federated.summary import morphology_report, summary
from dpfast.segmentation.data import find_task

__all__ = ["serve", "take_part"]

_START_SECONDS = 60.0
_POLL_SECONDS = 1.0
_AGAIN_SECONDS = 3.0


def serve(
    path: Path,
    observer: Observer,
    *,
    certificates: Path,
    host: str,
    port: int,
    seconds_to_join: float = 600.0,
    reply_seconds: float = 3600.0,
) -> dict[str, Any]:
    """Conduct a run for sites on other machines, or go on with it where it was stopped.

    Whoever can reach the port can ask Flower for a run of his own, with his own weights: let the
    sites' machines reach it alone. What sites give away stays within their own budgets whoever
    asks.

    Args:
      path: the settings file.
      observer: is told about progress.
      certificates: `make_certificates`' folder "server", or one like it.
      host: address to listen at.
      port: to listen at.
      seconds_to_join: that all sites are waited for at the beginning.
      reply_seconds: that replies are waited for in a round.

    Returns:
      What report.json holds.

    Raises:
      ValueError: a wrong setting, missing certificates, or a folder of another run.
      MissingSitesError: too few sites came, or could finish a round. RuntimeError: Flower's
        processes failed.
    """
    settings = load_federated_settings(path)
    folder = FederatedFolder(settings)
    finished = folder.report()
    if finished is not None:
        return finished
    keys = site_keys(certificates)
    names = _site_names(settings)
    if sorted(keys) != sorted(names):
        raise ValueError(
            f"serve: {certificates} must hold the keys of {', '.join(sorted(names))}, got "
            f"{', '.join(sorted(keys))}"
        )
    task = find_task(settings.data)
    folder.start(path)
    with ExitStack() as stack:
        link = stack.enter_context(super_link(folder.path / "flower", certificates, host, port))
        nodes = link.register(keys)
        link.submit()
        grid = stack.enter_context(serving_grid(link.runtime, _START_SECONDS))
        _wait_for(nodes, grid.get_node_ids, seconds_to_join, settings.federation.min_sites)
        server = stack.enter_context(
            Server(settings, task, folder, grid, nodes, timeout=reply_seconds)
        )
        model, rounds = server.run(observer)
    morphology = morphology_report(settings, task, {})
    report = summary(settings, task, rounds, site_names=names, data={}, morphology=morphology)
    folder.write_results(model.state_dict(), {"sites": np.array([], dtype="U1")}, report)
    return report


def take_part(
    path: Path,
    name: str,
    said: Callable[[str], None],
    *,
    certificates: Path,
    server: str,
    folder: Path,
    seconds_to_join: float = 600.0,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Take part in a run as one of its sites until the process is stopped.

    The settings are the site's own: its data, its privacy, its budget. The server sends weights and
    the round's number and nothing else that is listened to.

    Args:
      path: the settings file.
      name: the site's.
      said: is told what happens.
      certificates: `make_certificates`' folder of the site, or one like it.
      server: HOST:PORT.
      folder: the site's own, kept between rounds and over crashes.
      seconds_to_join: that a server which is not there, or refuses the site, is tried again.
      stopped: asked now and then whether to stop.

    Raises:
      ValueError, PrivacyError: see `Site`; before anything is sent. RuntimeError: the server does
        not know the site, or its certificate is not the authority's.
    """
    settings = load_federated_settings(path)
    site = make_site(settings, name, data_of(settings, name), folder)
    app = client_app(lambda context: nullcontext(site))
    said(f"{name}: waiting for {server}")
    with closing(site):
        deadline = time.monotonic() + seconds_to_join
        while not stopped():
            with super_node(certificates, server, folder) as node:
                while not (node.ended or stopped()):
                    if answer_next(node.runtime, app, _POLL_SECONDS):
                        said(f"{name}: answered a request")
                    if node.connected:
                        deadline = time.monotonic() + seconds_to_join
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"take_part: {server} must let {name} in, got: {node.complaint} (a key "
                        "that is not registered, or a certificate that is not the authority's)"
                    )
            time.sleep(_AGAIN_SECONDS)


def _site_names(settings: FederatedSettings) -> list[str]:
    """Of all sites; those of a trial on one machine follow from the data."""
    if isinstance(settings.sites, RemoteSites):
        return list(settings.sites.names)
    return sorted(records_by_site(settings)[1])


def _wait_for(
    nodes: Mapping[int, str], online: Callable[[], Any], seconds: float, least: int | None
) -> None:
    """Until all sites are there; or, after that time, as many as a round needs."""
    deadline = time.monotonic() + seconds
    while True:
        there = set(online()) & set(nodes)
        if len(there) == len(nodes):
            return
        if time.monotonic() > deadline:
            if len(there) >= (least or len(nodes)):
                return
            missing = ", ".join(sorted(nodes[each] for each in set(nodes) - there))
            raise MissingSitesError(
                f"serve: all sites must join within {seconds:g} s, got none of {missing}"
            )
        time.sleep(_POLL_SECONDS)
