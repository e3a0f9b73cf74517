"""Sends the layers' gradients down their routes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from dpfast.grad_sample._deferred import LayerGradient
from dpfast.grad_sample._memory import MemoryTracker
from dpfast.grad_sample._target import Target
from dpfast.grad_sample.planner import Cost, Layer, Route, Timeline, fastest, leanest, weigh

__all__ = ["RouteKeeper"]


class RouteKeeper:
    """Sends each layer's gradient down its route, and notes what became of it.

    Attributes:
      layers: so far, in the order of the backward pass.
      routes: by parameter, where a plan has been made.
      forced: the route of all that can take it; the others are kept.
      leanest: whether what has no planned route holds as little as it can, not what is fastest.
      tracker: where the step is measured.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.routes: Mapping[str, Route] | None = None
        self.forced: Route | None = None
        self.leanest = False
        self.tracker: MemoryTracker | None = None
        self._by_target: dict[Target, Layer] = {}
        self._peaks: list[int] = []
        self._held = 0  # by the routes so far
        self._since = 0  # what the last layer holds, still in use in its own backward pass
        self._seen: set[int] = set()  # addresses of what is held
        self._ordinary = 0  # the weights' gradients that the ordinary step would have by now
        self._ordinary_peak = 0

    def take(self, target: Target, gradient: LayerGradient) -> None:
        """See Collector.take."""
        self._mark()
        start = time.perf_counter()
        first = target.is_empty
        if not first:
            self._keep_the_first(target)
        # A second use adds to the first, and what is computed from parameters is pulled back: both
        # need the gradient itself. So does an empty batch, which has nothing to hold.
        deferrable = first and target.output is None and gradient.shape[0] > 0
        deferrable = deferrable and target.tensor.dtype in (torch.float32, torch.float64)
        costs = weigh(gradient) if deferrable else {}
        route = self._route(target.name, costs)
        layer = Layer(target.name, costs, gradient.held_storages, route, 0)
        if route is Route.KEEP:
            formed, squares = gradient.form_measured()
            target.add(formed, squares)
            layer.bytes = formed.numel() * formed.element_size() if first else 0
            self._held += layer.bytes
        else:
            gradient.measure(ghost=route is Route.GHOST)
            target.deferred = gradient
            layer.bytes = sum(layer.held.values())
            self._since = sum(n for key, n in layer.held.items() if key not in self._seen)
            self._seen.update(layer.held)
        if first:
            self._ordinary += target.tensor.numel() * target.tensor.element_size()
            self._by_target[target] = layer
        if gradient.device.type == "cpu":
            layer.add_seconds(time.perf_counter() - start)
            gradient.note_seconds = layer.add_seconds
        self.layers.append(layer)

    def _keep_the_first(self, target: Target) -> None:
        """Before a second gradient is added: the first is formed, and no plan may defer it."""
        layer = self._by_target.get(target)
        if layer is None:  # a rule without routes was first
            return
        if target.deferred is not None:
            # What it held may be held by others too, and is let go of only then: still counted.
            target.form()
            assert target.grad_sample is not None
            layer.bytes = target.grad_sample.numel() * target.grad_sample.element_size()
            self._held += layer.bytes
        layer.route, layer.costs = Route.KEEP, {}

    def _route(self, name: str, costs: dict[Route, Cost]) -> Route:
        if not costs:
            return Route.KEEP
        if self.forced is not None:
            return self.forced if self.forced in costs else Route.KEEP
        planned = None if self.routes is None else self.routes.get(name)
        if planned in costs:
            return planned
        return leanest(costs) if self.leanest else fastest(costs)

    def _mark(self) -> None:
        if self.tracker is None:
            return
        peak = self.tracker.highest() - self._held
        self._held, self._since = self._held + self._since, 0
        self._peaks.append(peak)
        self._ordinary_peak = max(self._ordinary_peak, peak + self._ordinary)

    def profile(self, batch_size: int, parameter_bytes: int) -> tuple[tuple[Layer, ...], Timeline]:
        """What the measured step showed, once its backward pass has ended.

        Args:
          batch_size: B.
          parameter_bytes: of all parameters that are trained.
        """
        assert self.tracker is not None
        self._mark()
        end = self.tracker.live - self._held + parameter_bytes
        ordinary = max(self._ordinary_peak, end)
        return tuple(self.layers), Timeline(batch_size, self._peaks, end, ordinary)
