"""The benchmark of a private training step's peak memory, and of the largest batch.

Every row has each contender's peak above what it held before its step, and its ratio over the
ordinary step's, on the batch that `step` times. Answers are checked as there.

The rows on the largest batch have 8 times the batch. Their reference is dpfast's default strategy.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import step
from benchmarks._memory import Memory, MemoryRunError, in_fresh_process, peak
from benchmarks._networks import BATCH_FACTOR, NETWORKS, QUICK_NETWORKS, network_of
from benchmarks._record import failure
from benchmarks._step_answers import STRATEGIES, check_step, default_strategy
from benchmarks._step_checks import OURS, checked, is_refusal
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY, STEPS
from benchmarks._step_task import Case, Privacy, Step, Task
from benchmarks._timing import clock_for, summarise

__all__ = ["OP", "Settings", "batch_cases", "cases", "run", "run_batch_case", "run_case"]

OP = "memory"

_BATCH_MEMORY_BUDGET = 1.15
_BATCH_ROUNDS = 3
_PROCESSES = 2


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: tiny networks, for trying out the harness; the figures mean nothing.
      rounds: of the times on the largest batch, three at most.
    """

    quick: bool = False
    rounds: int = _BATCH_ROUNDS


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows on the batch that `step` times."""
    return step.cases(device_type, quick=quick)


def batch_cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows on the largest batch: the networks with targets, on the CPU."""
    if device_type != "cpu":
        return []
    networks = QUICK_NETWORKS[:1] if quick else [n for n in NETWORKS if n.has_target]
    return [
        Case(n.name, BATCH_FACTOR * n.cpu[0], n.cpu[1], memory_budget=_BATCH_MEMORY_BUDGET)
        for n in networks
    ]


def _on_cpu(case: Case, names: Sequence[str]) -> dict[str, Memory | MemoryRunError]:
    def one(name: str) -> Memory | MemoryRunError:
        try:
            return in_fresh_process(case, name)
        except MemoryRunError as error:
            if name in (ORDINARY, DPFAST):
                raise
            return error

    with ThreadPoolExecutor(_PROCESSES) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _on_cuda(task: Task, names: Sequence[str]) -> dict[str, Memory | MemoryRunError]:
    found: dict[str, Memory | MemoryRunError] = {}
    for name in names:
        try:
            found[name] = peak(STEPS[name](task, Privacy()))
        except Exception as error:  # whatever a peer raises is what is to be told
            if name in (ORDINARY, DPFAST):
                raise
            found[name] = MemoryRunError(failure(error))
    return found


def _saved(found: dict[str, Memory | MemoryRunError], failures: dict[str, str]) -> dict[str, Any]:
    """The peaks, their ratios over the ordinary step's, and who has none."""
    ordinary = found[ORDINARY]
    assert isinstance(ordinary, Memory)
    peaks = {name: each for name, each in found.items() if isinstance(each, Memory)}
    errors = {name: str(each) for name, each in found.items() if isinstance(each, MemoryRunError)}
    return {
        "memory": {name: asdict(each) for name, each in peaks.items()},
        "memory_over_ordinary": {name: each.bytes / ordinary.bytes for name, each in peaks.items()},
        "not_measured": {**failures, **errors},
    }


def run_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Measure one row.

    Returns:
      The row as it is saved.

    Raises:
      WrongAnswerError: dpfast does not compute what it should.
    """
    # The peers' memory on networks without targets would take as long as all the rest.
    has_target = network_of(case.network).has_target
    chosen = {name: build for name, build in STEPS.items() if has_target or name in OURS}
    task = Task(case, device)
    steps, checks, failures = checked(task, chosen)
    names, parameters = list(steps), task.num_params
    del steps
    gc.collect()
    found = _on_cuda(task, names) if device.type == "cuda" else _on_cpu(case, names)
    row = {"case": asdict(case), "parameters": parameters, "checks": checks}
    return {**row, **_saved(found, failures)}


def run_batch_case(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
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
    answer = default_strategy(task)
    try:
        steps[BUDGET], row["checks"][BUDGET] = check_step(
            BUDGET, STEPS[BUDGET], task, answer, STRATEGIES
        )
    except ValueError as error:
        if not is_refusal(BUDGET, error):
            raise
        refused[BUDGET] = failure(error)
    del answer
    times = _few_rounds(task, steps, rounds)
    row["seconds"] = {name: asdict(summarise(values)) for name, values in times.items()}
    names = list(steps)
    del task, steps
    gc.collect()
    return {**row, **_saved(_on_cpu(case, names), refused)}


def _few_rounds(task: Task, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """A step of a large batch is too long for many rounds, or for warming up twice."""
    clock = clock_for(task.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    steps[ORDINARY].run(task.batch)  # the others have run in the checks
    for _ in range(min(rounds, _BATCH_ROUNDS)):
        for name, each in steps.items():
            clock.settle()
            clock.evict()
            times[name].append(clock.seconds(partial(each.run, task.batch), 1))
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
            rows.append(run_case(case, device))
            gc.collect()  # hooks hold their modules in reference cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for number, case in enumerate(larger, start=len(chosen)):
            on_row(case.label, number, total)
            batches.append(run_batch_case(case, device, settings.rounds))
            gc.collect()
    return {"op": OP, "quick": settings.quick, "rows": rows, "batches": batches}
