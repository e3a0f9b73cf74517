"""What a private step must compute, from one sample at a time, and the comparison with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import dpfast
from benchmarks._answers import WrongAnswerError, check_moments
from benchmarks._step_task import Privacy, Step, StepType, Task, predict

__all__ = [
    "EXACT",
    "NOISE_MULTIPLIER",
    "ROUNDED",
    "STRATEGIES",
    "Answer",
    "Tolerance",
    "check_gradients",
    "check_loss",
    "check_step",
    "check_sum",
    "default_strategy",
    "reference",
]

NOISE_MULTIPLIER = 1.0  # of what is timed


@dataclass(frozen=True)
class Tolerance:
    """Largest errors.

    Attributes:
      all: norm of the error of all gradients together, over the norm of the truth.
      each: the same for every tensor, which must not hide behind larger ones.
    """

    all: float
    each: float


# In float64 what a contender computes shows without rounding; Opacus adds 1e-6 to norms >= 0.1.
EXACT = Tolerance(1e-5, 1e-5)
# In float32 an activation within rounding of a kink (ReLU, PReLU, max pooling) falls to its other
# side now and then, in ordinary autograd too, and changes the gradients of the layers before it:
# seen were up to 8e-4 of all and 5e-3 of one tensor, with every contender.
ROUNDED = Tolerance(5e-3, 5e-2)
# Two strategies of dpfast on one batch have one forward pass.
STRATEGIES = Tolerance(1e-4, 1e-2)

# A bias before an instance norm has a true gradient of zero and float32 rounding in its place; a
# tensor's norm counts as at least this part of the norm of all.
_SMALLEST_NORM = 1e-3
_LOSS_TOLERANCE = 1e-5
_NAMED = 2  # parameters in a message


@dataclass(frozen=True)
class Answer:
    """The noiseless mean of the clipped gradients.

    Attributes:
      max_grad_norm: the median of the samples' norms, so that the clipping shows.
      gradients: by the parameters' names.
    """

    max_grad_norm: float
    gradients: dict[str, torch.Tensor]


def reference(task: Task) -> Answer:
    """Ordinary autograd on one sample after the other, clipped and averaged."""
    model = task.model()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for b in range(len(task.batch)):
        one = task.batch.rows(b, b + 1)
        task.loss(predict(model, one.images), one.masks).backward()
        for name, param in params.items():
            assert param.grad is not None, name
            found[name].append(param.grad)
            param.grad = None
    grads = {name: torch.stack(rows) for name, rows in found.items()}
    return _clipped(grads)


def default_strategy(task: Task) -> Answer:
    """The same by dpfast without a budget, where one sample at a time would take too long."""
    model = task.model()
    loss = dpfast.per_sample_loss(task.loss)
    with dpfast.per_sample_gradients(model) as grads:
        loss(predict(model, task.batch.images), task.batch.masks).sum().backward()
    return _clipped({name: grad.detach() for name, grad in grads.items()})


def _clipped(grads: Mapping[str, torch.Tensor]) -> Answer:
    # In float64: float32 norms add a large layer's elements in a few lanes, see _answers.
    parts = [
        torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)
        for grad in grads.values()
    ]
    norms = torch.stack(parts).norm(dim=0)
    bound = float(norms.quantile(0.5))
    weights = (bound / norms).clamp(max=1.0) / len(norms)
    return Answer(
        bound,
        {name: torch.tensordot(weights.to(g.dtype), g, dims=1) for name, g in grads.items()},
    )


def check_loss(task: Task) -> float:
    """The relative difference of the batch's loss and the mean of the per-sample losses.

    Raises:
      WrongAnswerError: private and ordinary steps would not have the same loss.
    """
    with torch.no_grad():
        predictions = predict(task.model(), task.batch.images)
        together = float(task.loss(predictions, task.batch.masks))
        apart = dpfast.per_sample_loss(task.loss)(predictions, task.batch.masks)
    difference = abs(float(apart.mean()) / together - 1)
    if not difference <= _LOSS_TOLERANCE:
        raise WrongAnswerError(
            f"{task.case.network}: the mean of the per-sample losses must be the batch's loss, "
            f"they differ by {difference:.1e}"
        )
    return difference


def check_gradients(
    name: str,
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: Tolerance,
    where: str,
) -> float:
    """Compare noiseless gradients with the truth.

    Args:
      name: of the contender, for the message.
      got: by the parameters' names.
      expected: the same.
      tolerance: of the comparison.
      where: the row, for the message.

    Returns:
      The norm of the error over the norm of the truth, all tensors together.

    Raises:
      WrongAnswerError: a parameter is missing, or an error is above its tolerance or no number.
    """
    if got.keys() != expected.keys():
        differing = sorted(got.keys() ^ expected.keys())
        raise WrongAnswerError(
            f"{name}: there must be gradients of the {len(expected)} trained parameters, got "
            f"{len(got)}, differing are {', '.join(differing[:_NAMED])}"
            f"{' and others' if len(differing) > _NAMED else ''}, for {where}"
        )
    errors, norms = [], []
    for key, true in expected.items():
        errors.append((got[key].double() - true.double()).norm())
        norms.append(true.double().norm())
    total = torch.stack(norms).norm()
    error = float(torch.stack(errors).norm() / total)
    apart = torch.stack(errors) / torch.stack(norms).clamp(min=_SMALLEST_NORM * float(total))
    if not (error <= tolerance.all and float(apart.max()) <= tolerance.each):
        worst = list(expected)[int(apart.argmax())]
        raise WrongAnswerError(
            f"{name}: relative error must be <= {tolerance.all:.0e} and <= {tolerance.each:.0e} "
            f"in each tensor, got {error:.1e} and {float(apart.max()):.1e} in {worst}, for {where}"
        )
    return error


def check_sum(
    name: str, build: StepType, task: Task, answer: Answer, tolerance: Tolerance
) -> tuple[dict[str, torch.Tensor], float]:
    """Check what a contender's noiseless step applies.

    Args:
      name: for the message.
      build: makes the step.
      task: network, batch and loss.
      answer: what the step must apply.
      tolerance: of the comparison.

    Returns:
      The gradients of the first step and the largest relative error.

    Raises:
      WrongAnswerError: they are wrong.
    """
    step = build(task, Privacy(answer.max_grad_norm, 0.0))
    found, errors = [], []
    for _ in range(2):  # the second step may follow a plan that the first has made
        step.run(task.batch)
        found.append(step.gradients())
        errors.append(
            check_gradients(name, found[-1], answer.gradients, tolerance, task.case.label)
        )
    return found[0], max(errors)


def check_step(
    name: str, build: StepType, task: Task, answer: Answer, tolerance: Tolerance
) -> tuple[Step, dict[str, float]]:
    """Check a contender's noiseless step and its noise; arguments as those of `check_sum`.

    Returns:
      The step with noise, ready to be timed; its error and the noise's scale, for the record.

    Raises:
      WrongAnswerError: one of the two is wrong.
    """
    plain, error = check_sum(name, build, task, answer, tolerance)
    step = build(task, Privacy(answer.max_grad_norm, NOISE_MULTIPLIER))
    step.run(task.batch)
    noise = [noisy - plain[key] for key, noisy in step.gradients().items()]
    ratio = check_moments(
        noise,
        std=NOISE_MULTIPLIER * answer.max_grad_norm / len(task.batch),
        kurtosis=3.0,
        contender=name,
        where=task.case.label,
    )
    return step, {
        "relative_error": error,
        "tolerance": tolerance.all,
        "noise_std_over_expected": ratio,
    }
