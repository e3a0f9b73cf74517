"""`PrivateLoader`: the data loader whose batches are what the accountant was told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dpfast.errors import PrivacyError
from dpfast.privacy.sampling import Sampled, UnitSampler

__all__ = ["Part", "PrivateLoader", "refuse_foreign_loader"]

_NAME = "PrivacyEngine"


@dataclass(frozen=True)
class Part:
    """What is processed at once: a step's units, or some of them.

    Attributes:
      unit_of_entry: for each entry of the data set in this part, a number that entries of one
        unit share.
      last: whether it is the last of its step.
    """

    unit_of_entry: tuple[int, ...]
    last: bool

    def unit_of_row(self, rows_of_entry: Sequence[int]) -> list[int]:
        """The same per row of the batch, where an entry may have become several."""
        pairs = zip(self.unit_of_entry, rows_of_entry, strict=True)
        return [unit for unit, rows in pairs for _ in range(rows)]


class Steps(Protocol):
    """Who takes the private steps that the loader deals out."""

    def begin_epoch(self) -> int:
        """How many steps this epoch may have; raises where the budget is spent."""

    def open(self, part: Part, unit_of_row: list[int]) -> None:
        """The part is about to be handed out."""

    def require_taken(self) -> None:
        """Raise where the last part was not processed."""

    def abandon(self) -> None:
        """No more parts will come; forget what is open."""


class PrivateLoader:
    """Deals out the sampled batches of a data set, step by step.

    An epoch has `len(loader)` private steps. With `physical_batch_size` a step's batch may come in
    several parts, each of which needs forward, backward and `optimizer.step()`, and the last of
    which changes the weights. A step without any unit comes as a batch of the same structure with
    0 samples; it too must be stepped, since the noise is released all the same.

    Made by `PrivacyEngine.make_private`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: UnitSampler,
        steps: Steps,
        *,
        steps_per_epoch: int,
        physical_batch_size: int | None,
        rank: int,
        num_processes: int,
    ) -> None:
        self.dataset = loader.dataset
        self._collate = _collate_of(loader)
        self._sampler = sampler
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._physical_batch_size = physical_batch_size
        self._rank, self._num_processes = rank, num_processes
        self._allowed = 0
        self._parts: deque[Part] = deque()
        self._template: Any = None
        self._inner = _rebuilt(loader, self, _PartCollate(self._collate))

    def __len__(self) -> int:
        """Private steps in an epoch."""
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        self._steps.abandon()
        self._allowed = self._steps.begin_epoch()
        self._parts.clear()
        batches = iter(self._inner)
        try:
            # The inner loader asks its batch sampler ahead, in the same order.
            for batch, rows_of_entry in batches:
                part = self._parts.popleft()
                unit_of_row = part.unit_of_row(rows_of_entry)
                if not unit_of_row:
                    batch = self._empty_batch()
                elif self._template is None:
                    self._template = _emptied(batch)
                self._steps.open(part, unit_of_row)
                yield batch
                del batch
                self._steps.require_taken()
        finally:
            self._steps.abandon()

    def entries(self) -> Iterator[list[int]]:
        """The data set's entries of one part after the other: the inner loader's batches."""
        self._sampler.begin_epoch()
        for step in range(min(self._steps_per_epoch, self._allowed)):
            mine = self._sampler.draw(step)[self._rank :: self._num_processes]
            groups = _packed(mine, self._physical_batch_size)
            for index, group in enumerate(groups):
                unit_of_entry = [s.unit for s in group for _ in s.entries]
                self._parts.append(Part(tuple(unit_of_entry), index == len(groups) - 1))
                yield np.concatenate([[], *(s.entries for s in group)]).astype(int).tolist()

    def _empty_batch(self) -> Any:
        if self._template is None:
            # Of the first entry the structure alone is used.
            self._template = _emptied(self._collate([self.dataset[0]]))
        return self._template


def _packed(units: Sequence[Sampled], physical_batch_size: int | None) -> list[list[Sampled]]:
    """Units in groups of at most so many entries, a unit never divided; one group at least."""
    groups: list[list[Sampled]] = [[]]
    size = 0
    for unit in units:
        full = physical_batch_size is not None and size + len(unit.entries) > physical_batch_size
        if full and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += len(unit.entries)
    return groups


class _Batches:
    """The batch sampler of the inner loader."""

    def __init__(self, owner: PrivateLoader) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        return self._owner.entries()


class _PartCollate:
    """Collates, and says how many rows each entry became (MONAI's crops come as a list)."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> tuple[Any, list[int]]:
        rows = [len(item) if _is_list_of_crops(item) else 1 for item in items]
        return (self._collate(items) if sum(rows) else None), rows


def _is_list_of_crops(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(crop, Mapping) for crop in item)


def _collate_of(loader: DataLoader[Any]) -> Callable[[list[Any]], Any]:
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    return collate


def _rebuilt(loader: DataLoader[Any], owner: PrivateLoader, collate: Any) -> DataLoader[Any]:
    """The user's loader with the private batch sampler in the place of its own."""
    return DataLoader(
        loader.dataset,
        batch_sampler=_Batches(owner),
        collate_fn=collate,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
    )


def _emptied(batch: Any) -> Any:
    """A batch of the same structure without samples."""
    if isinstance(batch, torch.Tensor):
        shape = (0, *batch.shape[1:])
        return torch.empty(shape, dtype=batch.dtype, device=batch.device)
    if isinstance(batch, np.ndarray):
        return np.empty((0, *batch.shape[1:]), batch.dtype)
    if isinstance(batch, Mapping):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_emptied, batch))
    if isinstance(batch, (list, tuple)):
        # Collated fields one beside the other, or one plain value per sample.
        nested = any(
            isinstance(each, (torch.Tensor, np.ndarray, Mapping, list, tuple)) for each in batch
        )
        return type(batch)(map(_emptied, batch)) if nested else type(batch)()
    return batch


def refuse_foreign_loader(loader: Any) -> None:
    """Raise where the loader draws its batches in a way that an accountant knows nothing of.

    A plain `DataLoader(dataset, batch_size, shuffle)` is taken for its data set, its batch size and
    its workers; its order is replaced.

    Raises:
      TypeError: not a DataLoader. PrivacyError: an iterable data set, a sampler of one's own, or no
        batch size.
    """
    if isinstance(loader, PrivateLoader):
        raise PrivacyError(f"{_NAME}: data_loader is private already; give the original one")
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"{_NAME}: data_loader must be a torch.utils.data.DataLoader, got "
            f"{type(loader).__name__}"
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise PrivacyError(
            f"{_NAME}: data_loader must have a map-style data set of known length: from a stream "
            "nobody can sample with a known chance"
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise PrivacyError(
            f"{_NAME}: data_loader must have a batch_size and no batch_sampler of its own: the "
            "engine draws the batches that it accounts for"
        )
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)
    )
    if not plain:
        raise PrivacyError(
            f"{_NAME}: data_loader must have no sampler of its own, got {type(sampler).__name__}: "
            "the engine draws the batches that it accounts for (give a Subset of the data set, or "
            "nothing; for data-parallel training no DistributedSampler either)"
        )
