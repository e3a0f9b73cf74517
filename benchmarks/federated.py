"""What a federation in one process costs beyond its sites' training: time, and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks._federated_cases import Case, cases, memory_cases
from benchmarks._memory import run_worker

__all__ = ["OP", "Settings", "run"]

OP = "federated"
_ROUNDS = 5  # each is a whole run


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: a small row, to try it out.
      rounds: at most so many runs of a row.
    """

    quick: bool = False
    rounds: int = _ROUNDS


def run(
    device: torch.device, settings: Settings, on_row: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure.

    Args:
      device: the CPU; what is measured happens there wherever sites train.
      settings: how much.
      on_row: called before each row with its description, its number from 0 and the number of rows.

    Returns:
      What is saved, without the description of the machine.
    """
    from benchmarks import _federated_run

    chosen, held = cases(quick=settings.quick), memory_cases(quick=settings.quick)
    total = len(chosen) + len(held)
    rows, memory = [], []
    for number, case in enumerate(chosen):
        on_row(case.label, number, total)
        _federated_run.run(case, rounds=1)
        repeats = 1 if settings.quick else min(settings.rounds, _ROUNDS)
        found = [_federated_run.run(case) for _ in range(repeats)]
        shares = sorted(each.outside / each.training for each in found)
        rows.append(
            {
                "case": asdict(case),
                "seconds": [{**asdict(each), "outside": each.outside} for each in found],
                "outside_over_training": statistics.median(shares),
                "spread": shares[-1] - shares[0],
                "site_over_steps": statistics.median(
                    (each.training - each.steps) / each.steps for each in found
                ),
            }
        )
    for number, case in enumerate(held, start=len(chosen)):
        on_row(f"memory, {case.label}", number, total)
        peak = run_worker("benchmarks._federated_worker", {"case": asdict(case)})
        memory.append(
            {
                "case": asdict(case),
                "bytes": peak.bytes,
                "base_bytes": peak.base_bytes,
                "model": _model_bytes(case),
            }
        )
    return {"op": OP, "quick": settings.quick, "rows": rows, "memory": memory}


def _model_bytes(case: Case) -> int:
    """What the network's float32 weights take."""
    from dpfast.segmentation.models import build_model
    from dpfast.segmentation.phantoms import phantom_task

    strides = [2] * (len(case.channels) - 1)
    model = build_model("unet", phantom_task(2), {"channels": case.channels, "strides": strides})
    return sum(each.numel() * each.element_size() for each in model.state_dict().values())
