"""The benchmark of a whole private training step's time against an ordinary one's.

Every row times, in turn and on the same random batch, a step of each contender; times are quoted
as ratios over the ordinary step's. Before that every private contender's noiseless gradient is
compared with ordinary autograd on one sample after the other, in float64 on few samples and in
float32 on the batch that is timed, and its noise is looked at. A peer that raises or is wrong is
reported with what it said; for dpfast it is an error, but for a memory budget that it refuses.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks._networks import NETWORKS, QUICK_NETWORKS, network_of
from benchmarks._step_answers import NOISE_MULTIPLIER
from benchmarks._step_checks import checked
from benchmarks._step_contenders import ORDINARY, STEPS
from benchmarks._step_task import Case, Task
from benchmarks._timing import Contender, clock_for, measure, ratio, summarise

__all__ = ["OP", "Settings", "cases", "run", "run_case"]

OP = "step"

_MEMORY_BUDGET = 1.10


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


def run_case(case: Case, device: torch.device, settings: Settings) -> dict[str, Any]:
    """Measure one row.

    Returns:
      The row as it is saved.

    Raises:
      WrongAnswerError: dpfast does not compute what it should.
    """
    task = Task(case, device)
    steps, checks, failures = checked(task, STEPS)
    times = measure(
        [Contender(name, partial(step.run, task.batch)) for name, step in steps.items()],
        clock_for(device),
        rounds=settings.rounds,
        budget_seconds=settings.budget_seconds / (1 if network_of(case.network).has_target else 3),
    ).seconds
    return {
        "case": asdict(case),
        "parameters": task.num_params,
        "checks": checks,
        "seconds": {name: asdict(summarise(values)) for name, values in times.items()},
        "time_over_ordinary": {
            name: asdict(ratio(values, times[ORDINARY])) for name, values in times.items()
        },
        "not_measured": failures,
    }


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
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the peers are theirs
        for number, case in enumerate(chosen):
            on_row(case.label, number, len(chosen))
            rows.append(run_case(case, device, settings))
            gc.collect()  # hooks hold their modules in reference cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {
        "op": OP,
        "quick": settings.quick,
        "noise_multiplier": NOISE_MULTIPLIER,
        "rows": rows,
    }
