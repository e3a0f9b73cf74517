"""Which layer's per-sample gradient is kept, and which is only measured and summed later.

Three routes for the weight of a convolution or a linear layer (DP_SPEC calls for equal results):

- keep: the per-sample gradients are formed and held, B times the size of the weight;
- recompute (book-keeping, Bu et al. 2022, arXiv:2210.00038): they are formed for their norms only;
  the layer's input and its output's gradient are held, and the clipped sum is one ordinary
  gradient of the weight;
- ghost (mixed ghost clipping, Bu et al. 2022, arXiv:2205.10683): likewise, with the norms from
  inner products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from dpfast.grad_sample._deferred import LayerGradient
from dpfast.ops.ghost_norms import ghost_bytes

__all__ = [
    "Cost",
    "Layer",
    "Plan",
    "Route",
    "Timeline",
    "choose_routes",
    "fastest",
    "leanest",
    "weigh",
]


class Route(Enum):
    """What becomes of a layer's per-sample gradient."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    GHOST = "ghost"


@dataclass(frozen=True)
class Cost:
    """Of one route, for the whole batch: work in floating-point operations, bytes that stay."""

    work: float
    bytes: int


@dataclass
class Layer:
    """One weight in one step, in the order of the backward pass.

    Attributes:
      name: of the parameter.
      costs: of the routes that it can take; empty where its gradient is kept in any case.
      held: address and bytes of what the deferring routes hold; two layers may hold the same.
      route: what was done.
      bytes: that stayed in memory.
      seconds: on the host, for the norms, the gradient or the sum; None on other devices, which do
        not let the host wait.
    """

    name: str
    costs: dict[Route, Cost]
    held: dict[int, int]
    route: Route
    bytes: int
    seconds: float | None = None

    def add_seconds(self, seconds: float) -> None:
        """Add to the time."""
        self.seconds = seconds + (self.seconds or 0.0)


# What moving a value costs, in the operations that a core does meanwhile (about 100 a ns): per
# element of a gradient that is kept (written to fresh memory, read by clip_and_noise), and per
# element of an output's gradient that is weighted. Measured: docs/design/per_sample_gradients.md.
_KEPT, _WEIGHTED = 130.0, 100.0
_DOUBLE = 3.0  # one operation of a float64 product
_PAIR = 16.0  # one pair of positions under one tap
_DEFERRED = 2e7  # 0.2 ms: the calls that a deferred gradient takes more, whatever the batch


def weigh(gradient: LayerGradient) -> dict[Route, Cost]:
    """The routes' costs, from the shapes alone."""
    batch_size, numel = gradient.shape[0], gradient.shape[1:].numel()
    (anchors, movings), (m, n) = gradient.positions, gradient.channels
    direct = 2.0 * anchors * numel
    size, held = gradient.dtype.itemsize, sum(gradient.held_storages.values())
    summed = direct + _WEIGHTED * anchors * m
    costs = {
        Route.KEEP: Cost(batch_size * (direct + _KEPT * numel), batch_size * numel * size),
        Route.RECOMPUTE: Cost(_DEFERRED + batch_size * (direct + summed), held),
    }
    if gradient.can_ghost:
        pairs = _DOUBLE * 2.0 * (anchors**2 * m + movings**2 * n)
        ghost = pairs + _PAIR * anchors**2 * gradient.taps
        costs[Route.GHOST] = Cost(_DEFERRED + batch_size * (ghost + summed), held)
        if ghost_bytes((m, n), (anchors, movings)) > 2 * batch_size * numel * size + (4 << 20):
            del costs[Route.GHOST]
    return costs


def fastest(costs: dict[Route, Cost]) -> Route:
    """The route of least work."""
    return min(costs, key=lambda route: costs[route].work)


def leanest(costs: dict[Route, Cost]) -> Route:
    """The route that holds least, of these the fastest."""
    return min(costs, key=lambda route: (costs[route].bytes, costs[route].work))


@dataclass(frozen=True)
class Timeline:
    """The memory of one step, without what the layers' routes hold, in bytes.

    Attributes:
      batch_size: B of that step.
      peaks: highest before the first layer of the backward pass, between each two, after the last.
      end: when the backward pass has ended, with the clipped sums of all parameters.
      ordinary: highest that the ordinary step would have had.
    """

    batch_size: int
    peaks: Sequence[int]
    end: int
    ordinary: int


def _predicted(layers: Sequence[Layer], routes: Sequence[Route], timeline: Timeline) -> list[int]:
    """The peaks of the timeline, and that of the clipped sums, under some routes."""
    found = [timeline.peaks[0]]
    held: set[int] = set()
    total = most = 0
    for layer, route, peak in zip(layers, routes, timeline.peaks[1:], strict=True):
        if route is Route.KEEP:
            total += layer.costs[route].bytes if layer.costs else layer.bytes
        else:
            total += sum(size for key, size in layer.held.items() if key not in held)
            held.update(layer.held)
            most = max(most, sum(layer.held.values()))  # a weighted copy for the sum
        found.append(peak + total)
    return [*found, timeline.end + total + most]


def choose_routes(
    layers: Sequence[Layer], timeline: Timeline, budget: int
) -> tuple[list[Route], int]:
    """Routes of little work whose predicted peak stays within the budget.

    From the fastest of all, routes change one by one: the one that saves most bytes at the peak for
    each operation that it adds. Where no single change helps, it starts from the routes that hold
    least, and from keeping all, and goes back to faster ones where they fit.

    Returns:
      One route a layer, and the predicted peak. It exceeds the budget where nothing was found.
    """
    routes = _lowered([_of(layer, fastest) for layer in layers], layers, timeline, budget)
    peak = max(_predicted(layers, routes, timeline))
    if peak <= budget:
        return routes, peak
    found = [(peak, math.inf, routes)]
    for start in ([_of(layer, leanest) for layer in layers], [Route.KEEP] * len(layers)):
        changed = _raised(start, layers, timeline, budget)
        work = sum(x.costs[r].work for x, r in zip(layers, changed, strict=True) if x.costs)
        peak = max(_predicted(layers, changed, timeline))
        found.append((peak, work, changed))
    fitting = [entry for entry in found if entry[0] <= budget]
    peak, _, routes = min(fitting or found, key=lambda e: (e[1], e[0]) if fitting else e[:2])
    return routes, peak


def _of(layer: Layer, rule: Callable[[dict[Route, Cost]], Route]) -> Route:
    return rule(layer.costs) if layer.costs else Route.KEEP


def _changes(
    layers: Sequence[Layer], routes: Sequence[Route]
) -> Iterator[tuple[float, int, Route, list[Route]]]:
    """All ways to change one route: the work that it adds, the layer, its route, all routes."""
    for index, layer in enumerate(layers):
        for route in layer.costs:
            if route is not routes[index]:
                added = layer.costs[route].work - layer.costs[routes[index]].work
                yield added, index, route, [*routes[:index], route, *routes[index + 1 :]]


def _lowered(
    routes: list[Route], layers: Sequence[Layer], timeline: Timeline, budget: int
) -> list[Route]:
    """Change routes while that lowers the peaks and they do not fit."""
    while True:
        peaks = _predicted(layers, routes, timeline)
        worst = max(range(len(peaks)), key=peaks.__getitem__)
        if peaks[worst] <= budget:
            return routes
        ranked = sorted(peaks, reverse=True)
        best: tuple[float, list[Route]] | None = None
        for added, _, _, changed in _changes(layers, routes):
            after = _predicted(layers, changed, timeline)
            # Compared from the highest down: each change makes progress, so that this ends.
            if after[worst] < peaks[worst] and sorted(after, reverse=True) < ranked:
                value = (peaks[worst] - after[worst]) / max(added, 1.0)
                if best is None or value > best[0]:
                    best = value, changed
        if best is None:
            return routes
        routes = best[1]


def _raised(
    routes: list[Route], layers: Sequence[Layer], timeline: Timeline, budget: int
) -> list[Route]:
    """Change routes to faster ones, those that save most first, while they fit."""
    while True:
        for added, _, _, changed in sorted(_changes(layers, routes), key=lambda change: change[:2]):
            if added < 0.0 and max(_predicted(layers, changed, timeline)) <= budget:
                routes = changed
                break
        else:
            return routes


@dataclass(frozen=True)
class Plan:
    """What one step did with each weight.

    Attributes:
      layers: in the order of the backward pass.
      batch_size: B.
      budget: bytes that the step was allowed, None without a memory budget.
      ordinary: peak of the ordinary step in bytes, where a memory budget had it measured.
      predicted: peak of the step under these routes, likewise.
    """

    layers: tuple[Layer, ...]
    batch_size: int
    budget: int | None = None
    ordinary: int | None = None
    predicted: int | None = None

    def __str__(self) -> str:
        rows = [("layer", "route", "time", "memory")]
        for layer in self.layers:
            time = "-" if layer.seconds is None else f"{1e3 * layer.seconds:.2f} ms"
            rows.append((layer.name, layer.route.value, time, _mebibytes(layer.bytes)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {route:<{widths[1]}}  {time:>{widths[2]}}  {size:>{widths[3]}}"
            for name, route, time, size in rows
        ]
        lines.append(f"B = {self.batch_size}" + "".join(self._totals()))
        return "\n".join(lines)

    def _totals(self) -> Iterable[str]:
        for name in ("budget", "ordinary", "predicted"):
            value: int | None = getattr(self, name)
            if value is not None:
                yield f", {name} {_mebibytes(value)}"

    def report(self) -> None:
        """Print a table of layer, route, time and bytes.

        The time is the host's for the layer's norms and its gradient or clipped sum, in this step;
        "-" on a device that the host does not wait for. The memory is what stayed until the sums.
        """
        print(self)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
