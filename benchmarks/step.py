"""The benchmark of a whole private training step against an ordinary one.

Every row times, in turn and on the same random batch, a step of each contender, and measures each
one's peak memory above what it held before; both are quoted as ratios over the ordinary step's.
Before that every private contender's noiseless gradient is compared with ordinary autograd on one
sample after the other, in float64 on few samples and in float32 on the batch that is timed, and its
noise is looked at. A peer that raises or is wrong is reported with what it
said; for dpfast it is an error, but for a memory budget that it refuses.

The rows on the largest batch have 8 times the batch. Their reference is dpfast's default strategy.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks._memory import Memory, MemoryRunError, in_fresh_process, peak
from benchmarks._networks import BATCH_FACTOR, NETWORKS, QUICK_NETWORKS, network_of
from benchmarks._record import failure
from benchmarks._step_answers import (
    EXACT,
    NOISE_MULTIPLIER,
    ROUNDED,
    STRATEGIES,
    check_loss,
    check_step,
    check_sum,
    default_strategy,
    reference,
)
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY, STEPS
from benchmarks._step_task import Case, Privacy, Step, Task
from benchmarks._timing import Contender, clock_for, measure, ratio, summarise

__all__ = ["OP", "Settings", "batch_cases", "cases", "run", "run_batch_case", "run_case"]

OP = "step"

_OURS = (ORDINARY, DPFAST, BUDGET)  # whose mistakes are errors
_MEMORY_BUDGET = 1.10
_BATCH_MEMORY_BUDGET = 1.15
_BATCH_ROUNDS = 3
_MEMORY_PROCESSES = 2
_EXACT_SAMPLES = 2  # enough for one norm on either side of the bound; float64 is slow


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: tiny networks, for trying out the harness; the figures mean nothing.
      rounds: at most so many rounds a row.
      budget_seconds: time for the rounds of one row of a network with targets, the others get a
        third; at least five rounds are taken.
    """

    quick: bool = False
    rounds: int = 25
    budget_seconds: float = 20.0


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows for a kind of device."""
    found = []
    for network in QUICK_NETWORKS if quick else NETWORKS:
        sizes = network.cpu if device_type == "cpu" else network.cuda
        if sizes is not None:
            found.append(Case(network.name, *sizes, memory_budget=_MEMORY_BUDGET))
    return found


def batch_cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows on the largest batch: the networks with targets, on the CPU."""
    if device_type != "cpu":
        return []
    networks = QUICK_NETWORKS[:1] if quick else [n for n in NETWORKS if n.has_target]
    return [
        Case(n.name, BATCH_FACTOR * n.cpu[0], n.cpu[1], memory_budget=_BATCH_MEMORY_BUDGET)
        for n in networks
    ]


def _is_refusal(name: str, error: Exception) -> bool:
    """Whether nothing fits in the memory budget."""
    return name == BUDGET and isinstance(error, ValueError)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions on CUDA in full float32: TF32's rounding is not what a check looks for."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _checked(task: Task) -> tuple[dict[str, Step], dict[str, Any], dict[str, str]]:
    """The steps whose answers are right, the checks, and how the other peers failed."""
    few = replace(task.case, batch_size=min(_EXACT_SAMPLES, task.case.batch_size))
    exact = Task(few, task.device, torch.float64)
    exact_answer, answer = reference(exact), reference(task)
    steps: dict[str, Step] = {}
    checks: dict[str, Any] = {"loss": {"relative_difference": check_loss(task)}}
    failures: dict[str, str] = {}
    for name, build in STEPS.items():
        if name == ORDINARY:
            steps[name] = build(task, Privacy(answer.max_grad_norm, NOISE_MULTIPLIER))
            continue
        try:
            _, error = check_sum(name, build, exact, exact_answer, EXACT)
            steps[name], checks[name] = check_step(name, build, task, answer, ROUNDED)
            checks[name]["relative_error_in_float64"] = error
        except Exception as error:  # whatever a peer raises is what is to be told
            if name in _OURS and not _is_refusal(name, error):
                raise
            failures[name] = failure(error)
    return steps, checks, failures


def _memory_on_cpu(case: Case, names: Sequence[str]) -> dict[str, Memory | MemoryRunError]:
    def one(name: str) -> Memory | MemoryRunError:
        try:
            return in_fresh_process(case, name)
        except MemoryRunError as error:
            if name in (ORDINARY, DPFAST):
                raise
            return error

    with ThreadPoolExecutor(_MEMORY_PROCESSES) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _memory_on_cuda(task: Task, names: Sequence[str]) -> dict[str, Memory | MemoryRunError]:
    found: dict[str, Memory | MemoryRunError] = {}
    for name in names:
        try:
            found[name] = peak(STEPS[name](task, Privacy()))
        except Exception as error:  # whatever a peer raises is what is to be told
            if name in (ORDINARY, DPFAST):
                raise
            found[name] = MemoryRunError(failure(error))
    return found


def _add_memory(row: dict[str, Any], found: dict[str, Memory | MemoryRunError]) -> None:
    """Save memory and its ratio over the ordinary step's."""
    ordinary = found[ORDINARY]
    assert isinstance(ordinary, Memory)
    row["memory"], row["memory_over_ordinary"], row["memory_not_measured"] = {}, {}, {}
    for name, memory in found.items():
        if isinstance(memory, MemoryRunError):
            row["memory_not_measured"][name] = str(memory)
            continue
        row["memory"][name] = asdict(memory)
        row["memory_over_ordinary"][name] = memory.bytes / ordinary.bytes


def run_case(case: Case, device: torch.device, settings: Settings) -> dict[str, Any]:
    """Measure one row.

    Returns:
      The row as it is saved.

    Raises:
      WrongAnswerError: dpfast does not compute what it should.
    """
    has_target = network_of(case.network).has_target
    task = Task(case, device)
    with _without_tf32():
        steps, checks, failures = _checked(task)
    row: dict[str, Any] = {"case": asdict(case), "parameters": task.num_params, "checks": checks}
    times = measure(
        [Contender(name, partial(step.run, task.batch)) for name, step in steps.items()],
        clock_for(device),
        rounds=settings.rounds,
        budget_seconds=settings.budget_seconds / (1 if has_target else 3),
    ).seconds
    row["seconds"] = {name: asdict(summarise(values)) for name, values in times.items()}
    row["time_over_ordinary"] = {
        name: asdict(ratio(values, times[ORDINARY])) for name, values in times.items()
    }
    row["not_measured"] = failures
    # The peers' memory on networks without targets would take as long as all the rest.
    names = [name for name in steps if has_target or name in _OURS]
    del steps
    if device.type == "cuda":
        gc.collect()
        found = _memory_on_cuda(task, names)
    else:
        found = _memory_on_cpu(case, names)
    _add_memory(row, found)
    return row


def run_batch_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Measure a row on the largest batch.

    Returns:
      The row as it is saved; its seconds are medians of few steps.

    Raises:
      WrongAnswerError: the strategies of dpfast do not agree.
    """
    task = Task(case, device)
    row: dict[str, Any] = {"case": asdict(case), "parameters": task.num_params, "checks": {}}
    steps = {ORDINARY: STEPS[ORDINARY](task, Privacy())}
    refused = {}
    if BUDGET in STEPS:
        answer = default_strategy(task)
        try:
            steps[BUDGET], row["checks"][BUDGET] = check_step(
                BUDGET, STEPS[BUDGET], task, answer, STRATEGIES
            )
        except ValueError as error:  # nothing fits in the memory budget
            refused[BUDGET] = failure(error)
        del answer
    row["not_measured"] = refused
    times = _few_rounds(task, steps)
    row["seconds"] = {name: asdict(summarise(values)) for name, values in times.items()}
    names = list(steps)
    del task, steps
    gc.collect()
    _add_memory(row, _memory_on_cpu(case, names))
    return row


def _few_rounds(task: Task, steps: dict[str, Step]) -> dict[str, list[float]]:
    """Three rounds: a step of a large batch is too long for more, or for warming up twice."""
    clock = clock_for(task.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    steps[ORDINARY].run(task.batch)  # the others have run in the checks
    for _ in range(_BATCH_ROUNDS):
        for name, step in steps.items():
            clock.settle()
            clock.evict()
            times[name].append(clock.seconds(partial(step.run, task.batch), 1))
    return times


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
    larger = batch_cases(device.type, quick=settings.quick)
    total = len(chosen) + len(larger)
    rows, batches = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the peers are theirs
        for number, case in enumerate(chosen):
            on_row(case.label, number, total)
            rows.append(run_case(case, device, settings))
            gc.collect()  # hooks hold their modules in reference cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for number, case in enumerate(larger, start=len(chosen)):
            on_row(case.label, number, total)
            batches.append(run_batch_case(case, device))
            gc.collect()
    return {
        "op": OP,
        "quick": settings.quick,
        "noise_multiplier": NOISE_MULTIPLIER,
        "rows": rows,
        "batches": batches,
    }
