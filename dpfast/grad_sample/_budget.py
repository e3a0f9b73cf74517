"""Keeps steps within a memory budget: the first of its kind is measured, the others are planned."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from dpfast.grad_sample._memory import MemoryTracker
from dpfast.grad_sample._routes import RouteKeeper
from dpfast.grad_sample.planner import Layer, Route, Timeline, choose_routes

__all__ = ["Budget", "Choice", "Profile", "checked_budget"]

_NAME = "per_sample_gradients"


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
    _chosen: dict[tuple[type, float, int], Choice] = field(default_factory=dict)

    def is_new(self, memory_budget: float) -> bool:
        """Whether nothing has been chosen under a budget."""
        return all(key[:2] != (type(memory_budget), memory_budget) for key in self._chosen)

    def choose(self, memory_budget: float, batch_size: int) -> Choice:
        """Routes for a step of B samples; a budget in bytes, or as a share of the ordinary step's.

        All memory but the parameters' grows with B. A share is decided once for all B.
        """
        measured, ordinary = self.timeline.batch_size, self.timeline.ordinary
        if isinstance(memory_budget, float):
            size = measured
            budget = int(memory_budget * ordinary)
        else:
            # Few different plans under a sampler whose batches vary: B rounded up by an eighth.
            step = max(1, batch_size // 8)
            size = (batch_size + step - 1) // step * step
            budget = memory_budget * measured // size
        key = type(memory_budget), memory_budget, size
        if key not in self._chosen:
            routes, peak = choose_routes(self.layers, self.timeline, budget)
            by_name = {layer.name: r for layer, r in zip(self.layers, routes, strict=True)}
            self._chosen[key] = Choice(by_name, budget, ordinary, peak)
        found = self._chosen[key]
        budget, ordinary, predicted = (value * batch_size // measured for value in found[1:])
        return Choice(found.routes, budget, ordinary, predicted)


@dataclass
class _Known:
    """Of one model: its profiles by the kind of step, and kinds that were met unmeasured."""

    profiles: dict[tuple[Any, ...], Profile] = field(default_factory=dict)
    unmeasured: set[tuple[Any, ...]] = field(default_factory=set)


_models: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class Budget:
    """The memory budget of one step.

    Args:
      model: whose steps they are.
      memory_budget: bytes (int) or a share (float).
      trained: names of the parameters that require grad.
      routes: gets its routes before the backward pass, and is read after it.
    """

    def __init__(
        self, model: nn.Module, memory_budget: float, trained: Sequence[str], routes: RouteKeeper
    ) -> None:
        self._memory_budget, self._routes = memory_budget, routes
        self._known = _models.setdefault(model, _Known())
        self._kind: tuple[Any, ...] = (model.training, tuple(trained))
        self._rows = 0
        self._tracker: MemoryTracker | None = None
        self._profile: Profile | None = None
        self._batch_size = 0

    def __enter__(self) -> None:
        # From the start, so that modes end in the reverse order of their beginning: a step of a
        # kind that turns out to be unknown is not measured, but the next steps are.
        if self._known.unmeasured or not self._known.profiles:
            self._tracker = MemoryTracker()
            self._tracker.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def see_first_layer(self, name: str, x: torch.Tensor) -> None:
        """Note what the first layer is called on: a step's kind."""
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._kind += (name, tuple(x.shape[1:]), x.dtype, x.device, low)
        self._rows = x.shape[0] if x.dim() else 0

    def begin_backward(self, batch_size: int) -> None:
        """Choose routes, now that B is known; or begin to measure.

        Raises:
          ValueError: nothing fits. For a budget in bytes this is said of the first step alone:
            whether a batch fits tells how many samples it has, which is private under Poisson
            sampling.
        """
        if batch_size == 0 or self._batch_size:
            return
        self._batch_size = batch_size
        self._kind += (self._rows / batch_size,)
        self._profile = self._known.profiles.get(self._kind)
        if self._profile is not None:
            self._routes.routes = self._choose(self._profile, refuse=True).routes
            return
        self._routes.leanest = True
        if self._tracker is None:
            self._known.unmeasured.add(self._kind)
        else:
            self._routes.tracker = self._tracker

    def end(self, parameter_bytes: int) -> None:
        """Keep what a measured step showed.

        Args:
          parameter_bytes: of all parameters that are trained.

        Raises:
          ValueError: nothing fits in the budget.
        """
        if self._routes.tracker is None:
            return
        profile = Profile(*self._routes.profile(self._batch_size, parameter_bytes))
        self._choose(profile, refuse=True)
        self._profile = self._known.profiles[self._kind] = profile
        self._known.unmeasured.discard(self._kind)

    @property
    def choice(self) -> Choice | None:
        """What was chosen for the step, or would have been for the one that was measured."""
        return None if self._profile is None else self._choose(self._profile, refuse=False)

    def _choose(self, profile: Profile, *, refuse: bool) -> Choice:
        may_refuse = isinstance(self._memory_budget, float) or profile.is_new(self._memory_budget)
        choice = profile.choose(self._memory_budget, self._batch_size)
        if refuse and may_refuse and choice.predicted > choice.budget:
            raise ValueError(
                f"{_NAME}: memory_budget={self._memory_budget} is too small: the least found for "
                f"the step is {choice.predicted / choice.ordinary:.3f} of the ordinary step's "
                f"memory, which is {choice.ordinary / self._batch_size / 2**20:.2f} MiB a sample"
            )
        return choice


def checked_budget(budget: Any) -> float:
    """A memory budget: an int or a float above 0."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            f"{_NAME}: memory_budget must be an int (bytes) or a float (a share of the ordinary "
            f"step's memory), got {type(budget).__name__}"
        )
    if not 0 < budget < math.inf:
        raise ValueError(f"{_NAME}: memory_budget must be finite and > 0, got {budget}")
    return budget
