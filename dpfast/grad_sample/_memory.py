"""Measures the memory of a step's tensors, and remembers the plans made from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.grad_sample.planner import Layer, Route, Timeline, choose_routes

__all__ = ["Choice", "MemoryTracker", "Profile", "profiles_of"]


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that come into being while it is on, and still live.

    A step's tensors are all made by PyTorch's ops, on every device alike; what an op takes for
    itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._seen: dict[int, Any] = {}
        self._highest = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._add(leaf.untyped_storage())
        self._highest = max(self._highest, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return

        def forget(_: Any) -> None:
            if self._seen.pop(key, None) is not None:
                self.live -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size

    def highest(self) -> int:
        """The highest number of bytes since the last call."""
        found, self._highest = max(self._highest, self.live), self.live
        return found


class Choice(NamedTuple):
    """Routes by parameter, and bytes: allowed, of the ordinary step, predicted."""

    routes: dict[str, Route]
    budget: int
    ordinary: int
    predicted: int


@dataclass
class Profile:
    """What the first step of its kind showed: its layers in order, and its memory."""

    layers: tuple[Layer, ...]
    timeline: Timeline
    _chosen: dict[tuple[float | int, int], Choice] = field(default_factory=dict)

    def choose(self, memory_budget: float | int, batch_size: int) -> Choice:
        """Routes for a step of B samples; a budget in bytes, or as a share of the ordinary step's.

        All memory but the parameters' grows with B. A share is decided once for all B.
        """
        if isinstance(memory_budget, float):
            factor = 1.0
            budget = int(memory_budget * self.timeline.ordinary)
        else:
            # Few different plans under a sampler whose batches vary: B rounded up by an eighth.
            step = max(1, batch_size // 8)
            factor = (batch_size + step - 1) // step * step / self.timeline.batch_size
            budget = int(memory_budget / factor)
        key = memory_budget, int(factor * self.timeline.batch_size)
        if key not in self._chosen:
            routes, peak = choose_routes(self.layers, self.timeline, budget)
            by_name = {layer.name: r for layer, r in zip(self.layers, routes, strict=True)}
            self._chosen[key] = Choice(by_name, budget, self.timeline.ordinary, peak)
        found = self._chosen[key]
        scale = batch_size / self.timeline.batch_size
        return found._replace(
            budget=int(found.budget * scale),
            ordinary=int(found.ordinary * scale),
            predicted=int(found.predicted * scale),
        )


# By model, then by what the first layer saw: the steps of a model on inputs of one shape.
_profiles: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Profile]] = (
    weakref.WeakKeyDictionary()
)


def profiles_of(model: nn.Module) -> dict[Hashable, Profile]:
    """The model's profiles, to be read and added to."""
    return _profiles.setdefault(model, {})
