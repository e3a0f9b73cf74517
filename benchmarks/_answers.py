"""Answers are checked before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks._workload import Case, Workload

__all__ = ["WrongAnswerError", "check_moments", "check_noise", "check_sum", "tolerance_of"]

# Largest |got - expected| of a noiseless result, relative to the same sum over absolute values.
# dpfast sums in float64, rounds once to float32 (2^-24) and leaves a margin of 2^-28 in the
# weights; 2^-22 doubles their sum with room to spare. The peers take norms and sums in the
# gradients' own type. In float32 2^-13 (1.2e-4) covers their rounding and the 1e-6 that Opacus adds
# to norms >= 0.25. In bfloat16 norm, weight and result are rounded to 2^-9 each, and each is used
# at most twice.
_BASE_TOLERANCES = {
    ("dpfast", "float32"): 2**-22,
    ("dpfast", "bfloat16"): 2**-22,
    ("pytorch", "float32"): 2**-13,
    ("pytorch", "bfloat16"): 2**-6,
    ("opacus", "float32"): 2**-13,
    ("opacus", "bfloat16"): 2**-6,
}
# PyTorch's norms on the CPU add P float32 terms one after the other in some eight lanes: in the
# worst case that loses P * 2^-27, seen is below an eighth of it.
_PEER_TOLERANCE_PER_PARAM = 2**-30
_SIGMAS = 5.0  # a sound generator fails such a check once in 1.7 million
_KURTOSIS = {"gaussian": 3.0, "laplace": 6.0}


def tolerance_of(contender: str, case: Case) -> float:
    """Largest error of a contender's noiseless result, relative to the sum over absolute values."""
    base = _BASE_TOLERANCES[contender, case.dtype]
    return base if contender == "dpfast" else base + _PEER_TOLERANCE_PER_PARAM * case.num_params


class WrongAnswerError(AssertionError):
    """A contender computes something else: its time would mean nothing."""


def check_sum(work: Workload, contender: str, got: Sequence[torch.Tensor]) -> float:
    """Compare a noiseless result with float64.

    Args:
      work: holds the expected answer.
      contender: whose tolerance applies.
      got: one tensor per gradient tensor.

    Returns:
      The largest error, relative to the sum over absolute values.

    Raises:
      WrongAnswerError: the error is above the tolerance, or not a number.
    """
    tolerance = tolerance_of(contender, work.case)
    errors = [
        ((result.double() - expected).abs() / scale.clamp(min=1e-300)).max()
        for result, expected, scale in zip(got, work.expected, work.scale, strict=True)
    ]
    error = float(torch.stack(errors).max())  # unlike Python's max, it keeps a NaN
    if not error <= tolerance:
        raise WrongAnswerError(
            f"{contender}: relative error must be <= {tolerance:.1e}, got {error:.1e}, "
            f"for {work.case}"
        )
    return error


def check_noise(
    case: Case, noise: Sequence[torch.Tensor], *, scale: float, contender: str = "dpfast"
) -> float:
    """Check mean and standard deviation of the noise in a result.

    Args:
      case: tells the distribution.
      noise: noisy minus noiseless result.
      scale: expected standard deviation of Gaussian noise, or b of Laplace noise.
      contender: for the message.

    Returns:
      The standard deviation over the expected one.

    Raises:
      WrongAnswerError: one of the two lies more than 5 standard errors away.
    """
    return check_moments(
        noise,
        std=scale * (math.sqrt(2) if case.mechanism == "laplace" else 1.0),
        kurtosis=_KURTOSIS[case.mechanism],
        contender=contender,
        where=str(case),
    )


def check_moments(
    noise: Sequence[torch.Tensor], *, std: float, kurtosis: float, contender: str, where: str
) -> float:
    """Check that noise has mean zero and the standard deviation `std`.

    Args:
      noise: noisy minus noiseless result.
      std: expected standard deviation.
      kurtosis: of the distribution, for the standard error.
      contender: for the message.
      where: the row, for the message.

    Returns:
      The standard deviation over the expected one.

    Raises:
      WrongAnswerError: one of the two lies more than 5 standard errors away.
    """
    count = sum(part.numel() for part in noise)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in noise) / count
    square = sum(float(part.double().square().sum()) for part in noise) / count
    ratio = math.sqrt(square) / std
    ratio_error = math.sqrt((kurtosis - 1) / (4 * count))
    mean_error = std / math.sqrt(count)
    if not (abs(ratio - 1) <= _SIGMAS * ratio_error and abs(mean) <= _SIGMAS * mean_error):
        raise WrongAnswerError(
            f"{contender}: noise must have mean 0 and standard deviation {std:.4g}, got "
            f"{mean:.2e} and {ratio:.6f} of it over {count} elements, for {where}"
        )
    return ratio
