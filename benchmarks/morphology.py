"""The benchmark of `dpfast.morphology`.

Every row times, in turn and on the same input: dpfast's result alone, and result and gradient; the
same by max-pool, over the whole element and by one axis after the other; OpenCV, plane by plane;
and the machine's memory. Contenders that take seconds (max-pool on large elements, kornia, SciPy)
are timed afterwards in few rounds, in turn with dpfast once more. The floor of a row is the time to
move its input and its output at the bandwidth that memory gave right before and after.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks._answers import WrongAnswerError
from benchmarks._bandwidth import Bandwidth
from benchmarks._morphology_cases import Case, Work, cases, memory_cases, reference
from benchmarks._morphology_contenders import (
    DPFAST,
    PEERS,
    LeftOutError,
    Peer,
    dpfast_function,
    dpfast_peer,
    threads,
)
from benchmarks._morphology_memory import run_memory_case
from benchmarks._record import failure
from benchmarks._timing import (
    Contender,
    Ratio,
    Times,
    clock_for,
    keep_freed_memory,
    measure,
    ratio,
    summarise,
)

__all__ = ["OP", "Settings", "run", "run_case"]

OP = "morphology"

_FEW_ROUNDS = 3
_BACKWARD = "_backward"
_NEAREST = "dpfast_nearest"


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: two small rows, for trying out the harness; their figures mean nothing.
      rounds: at most so many rounds a row.
      budget_seconds: time for the rounds of one row's fast contenders; at least five are taken.
    """

    quick: bool = False
    rounds: int = 25
    budget_seconds: float = 20.0


def _must_equal(case: Case, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongAnswerError(
            f"{what} must be {expected.dtype} of shape {tuple(expected.shape)}, got {got.dtype} of "
            f"{tuple(got.shape)}, for {case}"
        )
    wrong = int((got != expected).sum())  # a NaN differs from everything
    if wrong:
        raise WrongAnswerError(
            f"{what} must be exact, got {wrong} of {got.numel()} elements wrong, for {case}"
        )


def _expected_gradient(work: Work, result: torch.Tensor) -> torch.Tensor:
    if work.case.dtype == "float32":
        return work.gradient(result)
    # Equal values do not tell where a result comes from; dpfast breaks ties alike in float32.
    x = work.x.float().requires_grad_()
    (found,) = torch.autograd.grad(dpfast_function(work)(x), x, work.grad.float())
    return found.to(work.dtype)


def _check(work: Work, peer: Peer, expected: torch.Tensor, gradient: torch.Tensor) -> list[str]:
    """Check one contender; returns what was compared."""
    with torch.no_grad():
        if peer.border != "geodesic":
            expected = dpfast_function(work, peer.border)(work.x)
        _must_equal(work.case, f"{peer.name}: result", peer.forward(), expected)
    if peer.backward is None:
        return ["result"]
    _must_equal(work.case, f"{peer.name}: gradient", peer.backward(), gradient)
    return ["result", "gradient"]


@dataclass(frozen=True)
class _Field:
    """Who takes part in a row with right answers, and who does not and why."""

    peers: list[Peer]
    checks: dict[str, list[str]]
    left_out: dict[str, str]
    failed: dict[str, str]


def _field(work: Work) -> _Field:
    """Check all contenders; raises WrongAnswerError."""
    found = _Field([], {}, {}, {})
    expected = reference(work)
    gradient = _expected_gradient(work, expected)
    ours = dpfast_peer(work)
    found.checks[DPFAST] = _check(work, ours, expected, gradient)
    found.peers.append(ours)
    for name, build in PEERS.items():
        try:
            peer = build(work)
            found.checks[name] = _check(work, peer, expected, gradient)
            found.peers.append(peer)
        except LeftOutError as reason:
            found.left_out[name] = str(reason)
        except WrongAnswerError:
            raise
        except Exception as error:  # whatever a peer raises is what is to be told
            found.failed[name] = failure(error)
    return found


def _contenders(peers: Sequence[Peer]) -> Iterator[Contender]:
    for peer in peers:
        yield Contender(peer.name, peer.forward)
        if peer.backward is not None:
            yield Contender(peer.name + _BACKWARD, peer.backward)


def _over_dpfast(peers: Sequence[Peer], seconds: dict[str, list[float]]) -> dict[str, Ratio]:
    """Each peer's time over dpfast's of the same rounds, under equal conditions."""
    found = {}
    for peer in peers:
        ours = DPFAST if peer.border == "geodesic" else _NEAREST
        found[f"{peer.name}_over_dpfast"] = ratio(seconds[peer.name], seconds[ours])
        if peer.backward is not None:
            found[f"{peer.name}_backward_over_dpfast"] = ratio(
                seconds[peer.name + _BACKWARD], seconds[DPFAST + _BACKWARD]
            )
    return found


def _own_ratios(case: Case, times: Times, bandwidth: Bandwidth) -> dict[str, Ratio]:
    floor = [2 * case.bytes / bandwidth.bytes * t for t in times.yardstick[DPFAST]]
    own = times.seconds[DPFAST]
    return {
        "share_of_bandwidth": ratio(floor, own),
        "backward_over_forward": ratio(times.seconds[DPFAST + _BACKWARD], own),
    }


def _summaries(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {name: asdict(summarise(values)) for name, values in seconds.items()}


def _measure_row(
    row: dict[str, Any],
    work: Work,
    peers: Sequence[Peer],
    bandwidth: Bandwidth,
    settings: Settings,
) -> None:
    """Add times and ratios to a row."""
    clock = clock_for(work.device)
    ours, fast = peers[0], [peer for peer in peers if not peer.slow]
    times = measure(
        list(_contenders(fast)),
        clock,
        rounds=settings.rounds,
        budget_seconds=settings.budget_seconds,
        yardstick=bandwidth.contender,
    )
    row["seconds"] = _summaries(times.seconds)
    rates = [bandwidth.bytes / t for values in times.yardstick.values() for t in values]
    row["bandwidth_bytes_per_second"] = asdict(summarise(rates))
    ratios = _own_ratios(work.case, times, bandwidth) | _over_dpfast(fast[1:], times.seconds)
    slow = [peer for peer in peers if peer.slow]
    row["few_rounds_seconds"] = {}
    if slow:
        contenders = list(_contenders([ours, *slow]))
        if any(peer.border == "nearest" for peer in slow):
            nearest = partial(dpfast_function(work, "nearest"), work.x)
            contenders.append(Contender(_NEAREST, nearest))
        rounds = min(settings.rounds, _FEW_ROUNDS)
        few = measure(contenders, clock, rounds=rounds, budget_seconds=0.0).seconds
        row["few_rounds_seconds"] = _summaries(few)
        ratios |= _over_dpfast(slow, few)
    row["ratios"] = {name: asdict(value) for name, value in ratios.items()}


def run_case(
    case: Case, device: torch.device, bandwidth: Bandwidth, settings: Settings
) -> dict[str, Any]:
    """Measure one row.

    Returns:
      The row as it is saved.

    Raises:
      WrongAnswerError: a contender does not compute what it should.
    """
    with threads(1 if case.one_thread else torch.get_num_threads()):
        work = Work(case, device)
        field = _field(work)
        row: dict[str, Any] = {
            "case": asdict(case),
            "threads": torch.get_num_threads(),
            "bytes_of_input": case.bytes,
            "checks": field.checks,
            "not_measured": field.left_out,
            "failed": field.failed,
        }
        _measure_row(row, work, field.peers, bandwidth, settings)
    return row


def run(
    device: torch.device, settings: Settings, on_row: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure all rows.

    Args:
      device: CPU or CUDA.
      settings: how much to measure.
      on_row: called before each row with its description, its number from 0 and the number of rows.

    Returns:
      What is saved, without the description of the machine.
    """
    chosen = cases(device.type, quick=settings.quick)
    held = memory_cases(quick=settings.quick)
    total = len(chosen) + len(held)
    rows, memory = [], []
    keeps = device.type == "cpu" and keep_freed_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the peers are theirs
        bandwidth = Bandwidth(device, quick=settings.quick)
        for number, case in enumerate(chosen):
            on_row(case.label, number, total)
            rows.append(run_case(case, device, bandwidth, settings))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for number, each in enumerate(held, start=len(chosen)):
            on_row(f"memory, {each.contender}, {each.case.label}", number, total)
            memory.append(run_memory_case(each, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {
        "op": OP,
        "quick": settings.quick,
        "keeps_freed_memory": keeps,
        "bandwidth_by": bandwidth.contender.name,
        "rows": rows,
        "memory": memory,
    }
