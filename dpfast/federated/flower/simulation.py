"""Flower's simulation: every site's request is answered in one of Ray's processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from dpfast.federated.flower.messages import client_app, questions, read_name
from dpfast.federated.settings import FederatedSettings, load_federated_settings
from dpfast.federated.site import Site
from dpfast.federated.sites import data_of, make_site
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.data import Data

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

__all__ = ["simulate"]

ResultT = TypeVar("ResultT")
_START_SECONDS = 120.0
_POLL_SECONDS = 0.1


def simulate(
    path: Path,
    folder_of: Callable[[str], Path],
    sites: Sequence[str],
    conduct: Callable[[Grid, Mapping[int, str]], ResultT],
) -> ResultT:
    """Conduct a run whose sites live in Ray's processes.

    A site is opened for each request from its own folder, whichever process answers: what it must
    remember is there.

    Args:
      path: the settings file.
      folder_of: where a site keeps its own.
      sites: their names.
      conduct: the server's side, from the grid and the sites' names by node.

    Returns:
      What `conduct` returns.

    Raises:
      ImportError: Ray is missing. What `conduct` raises.
    """
    with needs_extra("dpfast federate --engine flower", extra="simulation"):
        import ray
        from flwr.simulation import run_simulation
    folders = {name: folder_of(name).resolve() for name in sites}
    names, settings = list(sites), path.resolve()
    # Sums in another order have other bits: all engines use as many threads.
    threads = torch.get_num_threads()
    found: list[Any] = []

    @contextmanager
    def open_site(context: Context) -> Iterator[Site]:
        torch.set_num_threads(threads)
        name = names[int(str(context.node_config["partition-id"]))]
        site = make_site(_settings(settings), name, _data(settings, name), folders[name])
        try:
            yield site
        finally:
            site.close()

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found.append(conduct(grid, _nodes(grid, names)))

    try:
        run_simulation(
            server,
            client_app(open_site),
            num_supernodes=len(names),
            backend_config={
                "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
                "init_args": {"include_dashboard": False},
            },
        )
    finally:
        ray.shutdown()
    result: ResultT = found[0]
    return result


def _nodes(grid: Grid, names: Sequence[str]) -> dict[int, str]:
    """Which node is which site: Flower numbers nodes at random."""
    deadline = time.monotonic() + _START_SECONDS
    while len(nodes := list(grid.get_node_ids())) < len(names) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    replies = grid.send_and_receive(questions(nodes), timeout=_START_SECONDS)
    found = {each.metadata.src_node_id: read_name(each) for each in replies}
    if sorted(found.values()) != sorted(names):
        raise RuntimeError(
            f"simulate: nodes must be {', '.join(names)}, got {sorted(found.values())}"
        )
    return found


# In Ray's processes: settings and images are read once in each.
@lru_cache(maxsize=1)
def _settings(path: Path) -> FederatedSettings:
    return load_federated_settings(path)


@cache
def _data(path: Path, name: str) -> Data:
    return data_of(_settings(path), name)
