"""Interleaved timing: contenders take turns, so that a drifting machine hits all of them alike."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dpfast import _native

__all__ = [
    "Clock",
    "Contender",
    "Ratio",
    "Summary",
    "Times",
    "capture",
    "clock_for",
    "keep_freed_memory",
    "largest_cache_bytes",
    "measure",
    "ratio",
    "summarise",
]

_BLOCK_SECONDS = 5e-3  # a block of repeats lasts at least this long, far above a clock's resolution
_MAX_REPEATS = 1000
_MIN_ROUNDS = 5
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def largest_cache_bytes() -> int:
    """Size of the processor's last-level cache, 0 where the system does not tell."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for this process; False where there is no glibc.

    With its defaults a result of some megabytes now and then lies in new pages. Touching these for
    the first time takes several times as long as the fastest contenders, and falls on whoever comes
    at the wrong time, unless it writes into given memory.
    """
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
      name: key of the results.
      call: the timed call.
      reset: run before every call and not timed, for a call that consumes its input.
    """

    name: str
    call: Callable[[], object]
    reset: Callable[[], object] | None = None


class Clock(Protocol):
    """How one device measures time."""

    def evict(self) -> None:
        """Empty the caches of what the contender before has left there."""

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Duration of `repeats` calls."""

    def settle(self) -> None:
        """Wait until what came before no longer disturbs."""


class _HostClock:
    # OpenMP's threads spin for some milliseconds after a parallel region and would take the cores
    # from the next contender's own threads.
    settle_seconds = 0.01

    def __init__(self) -> None:
        self._other = torch.zeros(2 * largest_cache_bytes() // 4)

    def evict(self) -> None:
        _native.read_all(self._other)

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def settle(self) -> None:
        time.sleep(self.settle_seconds)


class _CudaClock:
    def __init__(self) -> None:
        self._other = torch.zeros(2**26, device="cuda")  # 256 MiB: above any L2

    def evict(self) -> None:
        self._other.zero_()

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize()


def clock_for(device: torch.device) -> Clock:
    """CUDA events on CUDA, the monotonic clock elsewhere."""
    return _CudaClock() if device.type == "cuda" else _HostClock()


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of `call` as a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # first calls set up state that must not be part of the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def _time_block(contender: Contender, clock: Clock, repeats: int) -> float:
    """Seconds per call over one block of repeats."""
    clock.settle()
    if contender.reset is not None:
        total = 0.0
        for _ in range(repeats):
            contender.reset()
            total += clock.seconds(contender.call, 1)
        return total / repeats
    if repeats > 1:
        # Short calls are timed as in a loop of their own, not with the caches that the contender
        # before them left behind.
        contender.call()
    else:
        # A long call's data do not fit in a cache; where the contender before stopped reading
        # must not matter.
        clock.evict()
    return clock.seconds(contender.call, repeats) / repeats


@dataclass(frozen=True)
class Times:
    """What `measure` found, one list per contender; entry r of every list is from the same round.

    Attributes:
      seconds: per call.
      yardstick: seconds that the yardstick took around the contender's turn, the mean of before and
        after; empty lists where there was no yardstick.
    """

    seconds: dict[str, list[float]]
    yardstick: dict[str, list[float]]


def measure(
    contenders: Sequence[Contender],
    clock: Clock,
    *,
    rounds: int,
    budget_seconds: float,
    yardstick: Contender | None = None,
) -> Times:
    """Time every contender in every round.

    Args:
      contenders: timed in turn; each round starts with another one.
      clock: the device's clock.
      rounds: at most so many rounds.
      budget_seconds: fewer rounds, but at least 5 (or `rounds`), where they would take longer.
      yardstick: timed before and after every turn. A virtual machine's memory bandwidth changes
        within seconds, by half of it, as its cores are moved about.
    """
    repeats = {}
    round_seconds = 0.0
    for contender in [*contenders, *([yardstick] if yardstick else [])]:
        _time_block(contender, clock, 1)
        once = _time_block(contender, clock, 1)
        count = min(_MAX_REPEATS, max(1, math.ceil(_BLOCK_SECONDS / max(once, 1e-9))))
        repeats[contender.name] = count
        turns = len(contenders) if contender is yardstick else 1
        round_seconds += turns * once * count
    affordable = int(budget_seconds / max(round_seconds, 1e-9))
    rounds = min(rounds, max(_MIN_ROUNDS, affordable))
    names = [contender.name for contender in contenders]
    times = Times({name: [] for name in names}, {name: [] for name in names})

    def turn(contender: Contender) -> float:
        return _time_block(contender, clock, repeats[contender.name])

    before = turn(yardstick) if yardstick else 0.0
    for number in range(rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            times.seconds[contender.name].append(turn(contender))
            if yardstick:
                after = turn(yardstick)
                times.yardstick[contender.name].append((before + after) / 2)
                before = after
    return times


@dataclass(frozen=True)
class Summary:
    """Seconds per call over all rounds; spread is the interquartile range over the median."""

    median: float
    min: float
    max: float
    spread: float
    rounds: int


def summarise(times: Sequence[float]) -> Summary:
    """Median, range and spread of one contender."""
    median = statistics.median(times)
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    else:
        low = high = median
    return Summary(median, min(times), max(times), (high - low) / median, len(times))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times: the median over the rounds, which is quoted, and that of medians."""

    median_of_rounds: float
    of_medians: float


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratio of two lists of equal rounds."""
    return Ratio(
        statistics.median(n / d for n, d in zip(numerator, denominator, strict=True)),
        statistics.median(numerator) / statistics.median(denominator),
    )
