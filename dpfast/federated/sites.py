"""The sites of a run: which records they hold, and each of them as its settings say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dpfast.federated.partition import dirichlet_sites, iid_sites, natural_sites
from dpfast.federated.settings import (
    DirichletSites,
    FederatedSettings,
    IidSites,
    NaturalSites,
)
from dpfast.federated.site import Site, SiteFolder
from dpfast.segmentation.data import Data, find_records, make_data
from dpfast.segmentation.records import Record
from dpfast.segmentation.task import SegmentationTask

__all__ = ["data_of", "make_site", "records_by_site"]


def records_by_site(
    settings: FederatedSettings, name: str | None = None
) -> tuple[SegmentationTask, Mapping[str, list[Record]]]:
    """The task, and the records of every site that the data hold.

    Args:
      settings: of the run.
      name: of the site that all records are of, where the settings leave sites to themselves.

    Raises:
      ValueError: unreadable data, or sites that cannot be made of them.
    """
    task, records = find_records(settings.data)
    chosen = settings.sites
    if isinstance(chosen, IidSites):
        return task, iid_sites(records, chosen.number, seed=chosen.seed)
    if isinstance(chosen, DirichletSites):
        dealt = dirichlet_sites(
            records, chosen.number, alpha=chosen.alpha, seed=chosen.seed, key=chosen.column
        )
        return task, dealt
    if isinstance(chosen, NaturalSites):
        return task, natural_sites(records, *chosen.columns)
    if name not in chosen.names:
        raise ValueError(
            f"records_by_site: name must be of {', '.join(chosen.names)} with sites.kind "
            f"'remote', got {name!r}"
        )
    return task, {name: records}


def data_of(settings: FederatedSettings, name: str) -> Data:
    """One site's data.

    Raises:
      ValueError: there is no such site, or its data cannot be read.
    """
    task, records = records_by_site(settings, name)
    if name not in records:
        raise ValueError(f"data_of: name must be of {', '.join(records)}, got {name!r}")
    return make_data(task, records[name], settings.data)


def make_site(settings: FederatedSettings, name: str, data: Data, folder: Path) -> Site:
    """A site as the settings say.

    Raises:
      ValueError, TypeError, PrivacyError: see `Site`.
    """
    seed = settings.federation.seed
    return Site(
        name,
        settings.of_site(folder),
        data,
        SiteFolder(folder),
        local_epochs=settings.training.local_epochs,
        proximal_mu=settings.training.proximal_mu,
        seed=None if seed is None else _seed(seed, name),
    )


def _seed(seed: int, name: str) -> int:
    """The site's own, which no other site has anything to do with."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
