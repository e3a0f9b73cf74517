"""Privacy units: which entries of a data set belong to one sample or one patient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from dpfast import _validate
from dpfast.errors import PrivacyError

__all__ = ["PRIVACY_UNITS", "PrivacyUnits", "find_units"]

PRIVACY_UNITS = ("sample", "patient")
_NAME = "PrivacyEngine"
_STATEMENTS = {
    "sample": (
        "One entry of the data set is protected: adding or removing it changes what is released by "
        "no more than epsilon and delta allow. Patients are not protected: the epsilon of a "
        "patient with several entries is larger. For patients use privacy_unit='patient'."
    ),
    "patient": (
        "All entries of one patient are protected together: adding or removing the patient changes "
        "what is released by no more than epsilon and delta allow."
    ),
}


@dataclass(frozen=True)
class PrivacyUnits:
    """What is added or removed between neighbouring data sets.

    Attributes:
      name: "sample" or "patient".
      order: int64 (entries,): the data set's entries, those of one unit next to one another.
      starts: int64 (units + 1,): where each unit begins in `order`.
    """

    name: str
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def num_units(self) -> int:
        """How many there are, a public figure."""
        return len(self.starts) - 1

    @property
    def statement(self) -> str:
        """Who is protected, in words."""
        return _STATEMENTS[self.name]

    def entries(self, unit: int) -> NDArray[np.int64]:
        """The data set's entries that belong to a unit."""
        return self.order[self.starts[unit] : self.starts[unit + 1]]

    def largest(self) -> int:
        """The entries of the unit that has most."""
        return int(np.diff(self.starts).max())


def find_units(
    dataset: Any, privacy_unit: str, ids: str | Sequence[Hashable] | None
) -> PrivacyUnits:
    """Group a data set's entries into units.

    Args:
      dataset: a map-style data set.
      privacy_unit: "sample": each entry is a unit; "patient": entries of one id are.
      ids: one id per entry, or the key under which the data set's dict records hold it (MONAI's
        `Dataset.data`; images are not read for it).

    Raises:
      PrivacyError: patients without ids, or an entry without one.
      TypeError, ValueError: ids that cannot be read, are of another number, or given for samples.
    """
    _validate.choice(_NAME, "privacy_unit", privacy_unit, PRIVACY_UNITS)
    count = len(dataset)
    if count == 0:
        raise ValueError(f"{_NAME}: the data set must have an entry, got none")
    if privacy_unit == "sample":
        if ids is not None:
            raise ValueError(
                f"{_NAME}: privacy_unit_ids must be None for privacy_unit 'sample'; did you mean "
                "privacy_unit='patient'?"
            )
        return PrivacyUnits("sample", np.arange(count), np.arange(count + 1))
    if ids is None:
        raise PrivacyError(
            f"{_NAME}: privacy_unit 'patient' needs privacy_unit_ids: one id per entry, or the key "
            "of the records that holds it"
        )
    found = _ids_by_key(dataset, ids) if isinstance(ids, str) else list(ids)
    if len(found) != count:
        raise ValueError(
            f"{_NAME}: privacy_unit_ids must hold one id for each of the {count} entries, got "
            f"{len(found)}"
        )
    numbers: dict[Hashable, int] = {}
    unit_of = np.fromiter(
        (numbers.setdefault(_key(each), len(numbers)) for each in found), np.int64
    )
    order = np.argsort(unit_of, kind="stable").astype(np.int64)
    starts = np.zeros(len(numbers) + 1, np.int64)
    np.cumsum(np.bincount(unit_of), out=starts[1:])
    return PrivacyUnits("patient", order, starts)


def _key(value: Any) -> Hashable:
    """An id as a key: 7 and "7" differ, a tensor's or array's number is a number."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{_NAME}: privacy_unit_ids must be int or str, got {type(value).__name__}")
    if value == "":
        raise PrivacyError(f"{_NAME}: privacy_unit_ids must not be empty, got ''")
    return value


def _ids_by_key(dataset: Any, key: str) -> list[Any]:
    if isinstance(dataset, Subset):
        ids = _ids_by_key(dataset.dataset, key)
        return [ids[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [each for part in dataset.datasets for each in _ids_by_key(part, key)]
    records = getattr(dataset, "data", None)
    if not isinstance(records, Sequence) or len(records) != len(dataset):
        raise TypeError(
            f"{_NAME}: privacy_unit_ids={key!r} needs a data set whose .data holds one dict per "
            f"entry, as MONAI's do, got {type(dataset).__name__}; give the ids themselves"
        )
    for record in records:
        if not isinstance(record, Mapping) or key not in record:
            raise PrivacyError(f"{_NAME}: every record must have the key {key!r}, one has not")
    return [record[key] for record in records]
