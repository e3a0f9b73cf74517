"""Which contenders of the step compute what they should, before anything of theirs is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks._record import failure
from benchmarks._step_answers import (
    EXACT,
    NOISE_MULTIPLIER,
    ROUNDED,
    check_loss,
    check_step,
    check_sum,
    reference,
)
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY
from benchmarks._step_task import Privacy, Step, StepType, Task

__all__ = ["OURS", "checked", "is_refusal"]

OURS = (ORDINARY, DPFAST, BUDGET)  # whose mistakes are errors
_EXACT_SAMPLES = 2  # enough for one norm on either side of the bound; float64 is slow


def is_refusal(name: str, error: Exception) -> bool:
    """Whether nothing fits in the memory budget."""
    return name == BUDGET and isinstance(error, ValueError)


def checked(
    task: Task, steps: Mapping[str, StepType]
) -> tuple[dict[str, Step], dict[str, Any], dict[str, str]]:
    """Check every contender's loss, sum and noise.

    Args:
      task: network, batch and loss.
      steps: what makes each contender's step; the ordinary one among them.

    Returns:
      The steps whose answers are right, ready to be measured; the checks, for the record; how
      peers failed.

    Raises:
      WrongAnswerError: dpfast does not compute what it should.
    """
    with _without_tf32():
        return _checked(task, steps)


def _checked(
    task: Task, steps: Mapping[str, StepType]
) -> tuple[dict[str, Step], dict[str, Any], dict[str, str]]:
    few = replace(task.case, batch_size=min(_EXACT_SAMPLES, task.case.batch_size))
    exact = Task(few, task.device, torch.float64)
    exact_answer, answer = reference(exact), reference(task)
    right: dict[str, Step] = {}
    checks: dict[str, Any] = {"loss": {"relative_difference": check_loss(task)}}
    failures: dict[str, str] = {}
    for name, build in steps.items():
        if name == ORDINARY:
            right[name] = build(task, Privacy(answer.max_grad_norm, NOISE_MULTIPLIER))
            continue
        try:
            _, error = check_sum(name, build, exact, exact_answer, EXACT)
            right[name], checks[name] = check_step(name, build, task, answer, ROUNDED)
            checks[name]["relative_error_in_float64"] = error
        except Exception as error:  # whatever a peer raises is what is to be told
            if name in OURS and not is_refusal(name, error):
                raise
            failures[name] = failure(error)
    return right, checks, failures


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions on CUDA in full float32: TF32's rounding is not what a check looks for."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
