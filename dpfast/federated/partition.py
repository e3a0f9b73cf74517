"""Which records lie at which site: as the data say, or dealt out for a simulation.

Patients are never torn apart. Dealing out by what records hold looks at data that no epsilon
covers, unless the column is public; real federations have their sites already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dpfast import _validate
from dpfast.segmentation.records import Record

__all__ = ["dirichlet_sites", "iid_sites", "natural_sites"]

RecordT = TypeVar("RecordT", bound=Record)
_MOST_DRAWS = 1000


def natural_sites(records: Sequence[RecordT], *columns: str) -> dict[str, list[RecordT]]:
    """Sites by columns of the records' index, such as the hospital or the device.

    Args:
      records: with `columns`.
      columns: one or several, whose values together are the sites' names: "gray, dark".

    Returns:
      Records by site, in the order of the names.

    Raises:
      ValueError: a record without the column, a patient at two sites, or a single site.
    """
    function = "natural_sites"
    sites: dict[str, list[RecordT]] = {}
    site_of: dict[str, str] = {}
    for record in records:
        site = ", ".join(_value(function, record, column) for column in columns)
        if site_of.setdefault(record["patient_id"], site) != site:
            raise ValueError(
                f"{function}: each patient must be at one site, got one with two values of "
                f"{', '.join(columns)}"
            )
        sites.setdefault(site, []).append(record)
    if len(sites) < 2:
        raise ValueError(
            f"{function}: {', '.join(columns)} must have two values or more, got {len(sites)}"
        )
    return dict(sorted(sites.items()))


def iid_sites(
    records: Sequence[RecordT], num_sites: int, *, seed: int = 0
) -> dict[str, list[RecordT]]:
    """Patients dealt out at random, as evenly as they can be.

    Args:
      records: in any order.
      num_sites: >= 2, and no more than there are patients.
      seed: >= 0.

    Returns:
      Records by site, "site 1" and so on.

    Raises:
      ValueError: a bad number, or fewer patients than sites.
    """
    patients = _patients("iid_sites", records, num_sites, seed)
    order = np.random.default_rng(seed).permutation(len(patients))
    return _dealt(records, {patients[p]: i % num_sites for i, p in enumerate(order)}, num_sites)


def dirichlet_sites(
    records: Sequence[RecordT], num_sites: int, *, alpha: float, key: str, seed: int = 0
) -> dict[str, list[RecordT]]:
    """Patients dealt out unevenly: each category's by shares drawn from Dirichlet(alpha).

    Args:
      records: in any order, with `columns`.
      num_sites: >= 2, and no more than there are patients.
      alpha: > 0; the smaller, the more a category sticks to few sites.
      key: a column with a patient's category: that of the patient's first record by name.
      seed: >= 0.

    Returns:
      Records by site, "site 1" and so on; no site is empty.

    Raises:
      ValueError: a bad number, a record without the column, fewer patients than sites, or shares
        so uneven that sites kept being left without a patient.

    References:
      Hsu, Qi and Brown 2019, arXiv:1909.06335.
    """
    function = "dirichlet_sites"
    alpha = _validate.number(function, "alpha", alpha, minimum=0.0, maximum=1e6, exclusive=True)
    patients = _patients(function, records, num_sites, seed)
    category: dict[str, str] = {}
    for record in sorted(records, key=lambda each: each["name"]):
        category.setdefault(record["patient_id"], _value(function, record, key))
    groups = [
        [patient for patient in patients if category[patient] == name]
        for name in sorted(set(category.values()))
    ]
    rng = np.random.default_rng(seed)
    for _ in range(_MOST_DRAWS):
        site_of: dict[str, int] = {}
        for group in groups:
            shares = rng.dirichlet([alpha] * num_sites)
            ends = np.round(np.cumsum(shares) * len(group)).astype(int)
            order = rng.permutation(len(group))
            for place, number in enumerate(order):
                site = int(np.searchsorted(ends, place, side="right"))
                site_of[group[number]] = min(site, num_sites - 1)
        if len(set(site_of.values())) == num_sites:
            return _dealt(records, site_of, num_sites)
    raise ValueError(
        f"{function}: alpha must leave a patient for each of {num_sites} sites, got {alpha:g} with "
        f"{len(patients)} patients, where sites stayed empty {_MOST_DRAWS} times"
    )


def _value(function: str, record: Record, column: str) -> str:
    value = record["columns"].get(column, "").strip()
    if not value:
        raise ValueError(
            f"{function}: {record['name']} must have a value of {column!r}, got none (columns: "
            f"{', '.join(record['columns']) or 'none'})"
        )
    return value


def _patients(function: str, records: Sequence[Record], num_sites: int, seed: int) -> list[str]:
    """In an order that has to do with nothing but their ids."""
    for name, value, least in (("num_sites", num_sites, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{function}: {name} must be an int >= {least}, got {value!r}")
    ids = {record["patient_id"] for record in records}
    if len(ids) < num_sites:
        raise ValueError(
            f"{function}: num_sites must be <= {len(ids)}, the number of patients, got {num_sites}"
        )
    return sorted(ids, key=lambda each: hashlib.sha256(each.encode()).digest())


def _dealt(
    records: Sequence[RecordT], site_of: dict[str, int], num_sites: int
) -> dict[str, list[RecordT]]:
    width = len(str(num_sites))
    sites: dict[str, list[RecordT]] = {
        f"site {number:0{width}d}": [] for number in range(1, num_sites + 1)
    }
    names = list(sites)
    for record in sorted(records, key=lambda each: each["name"]):
        sites[names[site_of[record["patient_id"]]]].append(record)
    return sites
