"""A private training run on paper: its settings, and what they mean for noise and accounting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dp_accounting
from dp_accounting import DpEvent

from dpfast import _validate
from dpfast.privacy.accounting import SAMPLINGS, TrainingStep
from dpfast.privacy.thresholds import (
    HistogramStatistic,
    QuantileStatistic,
    left_for_gradient,
)
from dpfast.privacy.units import PRIVACY_UNITS

__all__ = ["LEAST_NOISE", "PlannedRun", "check_count"]

_NAME = "budget"
# Below this there is no guarantee to speak of, and a privacy loss distribution fills the memory.
LEAST_NOISE = 0.1
_SENSITIVITIES = {
    "count_noise": QuantileStatistic.sensitivity,
    "histogram_noise": HistogramStatistic.sensitivity,
}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A private training run as one plans it; what is None may be left open, see `budget.solve`.

    Attributes:
      noise_multiplier: scale of all that a step releases over its sensitivity, >= 0.1.
      steps, epochs: private steps, or passes over the data set: one of the two.
      expected_batch_size, sample_rate: mean number of units in a step (a DataLoader's batch_size),
        or a unit's chance to take part in it: one of the two.
      num_units: size of the data set, public. Only with sample_rate may it be None.
      privacy_unit: what num_units counts, and one neighbouring data set adds or removes.
      mechanism, norm, sampling, max_batch_size: as in `TrainingStep`; norm None: "l1" for Laplace.
      count_noise: standard deviation of the noise on a private quantile's count, which is released
        beside each gradient; None without one.
      histogram_noise: the same on each bin of a noisy histogram of norms.
      release_noise: noise multipliers of Gaussian releases about the same units beside training.
      max_grad_norm: the bound on a unit's gradient, or several for group-wise clipping.
      group_noise_weights: how several bounds share the noise, as in `clip_and_noise`.
      dimension: number of trained parameters, for Laplace noise after an L2 clip.

    Raises:
      TypeError, ValueError: a bad value, or two that exclude one another.
    """

    noise_multiplier: float | None = None
    steps: int | None = None
    epochs: int | None = None
    expected_batch_size: int | None = None
    sample_rate: float | None = None
    num_units: int | None = None
    privacy_unit: str = "sample"
    mechanism: str = "gaussian"
    norm: str | None = None
    sampling: str = "poisson"
    max_batch_size: int | None = None
    count_noise: float | None = None
    histogram_noise: float | None = None
    release_noise: Sequence[float] = ()
    max_grad_norm: Sequence[float] = ()
    group_noise_weights: str | Sequence[float] = "equal"
    dimension: int | None = None

    def __post_init__(self) -> None:
        _validate.choice(_NAME, "privacy_unit", self.privacy_unit, PRIVACY_UNITS)
        _validate.choice(_NAME, "mechanism", self.mechanism, ("gaussian", "laplace"))
        _validate.choice(_NAME, "norm", self.resolved_norm, ("l1", "l2"))
        _validate.choice(_NAME, "sampling", self.sampling, SAMPLINGS)
        for noise in self.release_noise:
            _validate.number(_NAME, "release_noise", noise, minimum=LEAST_NOISE, maximum=1e6)
        if self.noise_multiplier is not None:
            noise = self.noise_multiplier
            _validate.number(_NAME, "noise_multiplier", noise, minimum=LEAST_NOISE, maximum=1e6)
        self._check_counts()
        self._check_truncation()
        self._check_threshold()
        self._check_bounds()
        if self.dimension is not None and not self._laplace_after_l2:
            raise ValueError(
                f"{_NAME}: dimension must be left out but for Laplace noise after an L2 clip, got "
                f"{self.dimension}: epsilon does not depend on it"
            )

    @property
    def resolved_norm(self) -> str:
        """The norm in which a unit is clipped."""
        if self.norm is not None:
            return self.norm
        return "l1" if self.mechanism == "laplace" else "l2"

    @property
    def steps_per_epoch(self) -> int:
        """As of a loader made by `PrivacyEngine`."""
        if self.expected_batch_size is not None and self.num_units is not None:
            return -(-self.num_units // self.expected_batch_size)
        return math.ceil(1.0 / _given(self.sample_rate))

    @property
    def rate(self) -> float:
        """A unit's chance to take part in a step."""
        if self.sampling != "poisson":
            return 1.0 / self.steps_per_epoch
        if self.expected_batch_size is not None and self.num_units is not None:
            return self.expected_batch_size / self.num_units
        return _given(self.sample_rate)

    @property
    def mean_batch_size(self) -> float | None:
        """Mean number of units in a step before truncation; None where num_units is."""
        return None if self.num_units is None else self.rate * self.num_units

    @property
    def num_steps(self) -> int:
        """Private steps in all."""
        if self.steps is not None:
            return self.steps
        return int(_given(self.epochs)) * self.steps_per_epoch

    def open_settings(self) -> list[str]:
        """Which of noise, duration and batch size are not given."""
        values = {
            "noise_multiplier": (self.noise_multiplier,),
            "steps": (self.steps, self.epochs),
            "expected_batch_size": (self.expected_batch_size, self.sample_rate),
        }
        return [name for name, found in values.items() if all(value is None for value in found)]

    def releases(self) -> list[tuple[DpEvent, int]]:
        """What is released beside training."""
        return [(dp_accounting.GaussianDpEvent(noise), 1) for noise in self.release_noise]

    def spends(self, steps: int) -> int:
        """How often `event` counts for so many steps."""
        return steps if self.sampling == "poisson" else math.ceil(steps / self.steps_per_epoch)

    def event(self, noise_multiplier: float | None = None) -> DpEvent:
        """The event of a step; of an epoch without Poisson sampling."""
        noise = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        return TrainingStep(
            noise_multiplier=_given(noise),
            sample_rate=self.rate,
            num_units=self.num_units or 0,  # of no account but for max_batch_size, which needs it
            mechanism=self.mechanism,
            norm=self.resolved_norm,
            sampling=self.sampling,
            max_batch_size=self.max_batch_size,
        ).event()

    @property
    def gradient_noise_multiplier(self) -> float:
        """That of the gradient alone: larger where a threshold's statistic has a share.

        References:
          Andrew et al. 2019, arXiv:1905.03871, Theorem 1; DP_SPEC section 2.
        """
        noise, statistic = _given(self.noise_multiplier), self._statistic()
        if statistic is None:
            return noise
        name, given = statistic
        return left_for_gradient(noise, given / _SENSITIVITIES[name])

    def noise_scales(self) -> list[float]:
        """Scale of the noise on the sum of gradients, per bound: std, or b for Laplace noise.

        References:
          He et al. 2022, arXiv:2212.01539; DP_SPEC section 1.
        """
        weights = self._noise_weights()
        terms = [bound / w for bound, w in zip(self.max_grad_norm, weights, strict=True)]
        total = self.gradient_noise_multiplier * self._length(terms)
        return [total * weight for weight in weights]

    def sensitivity(self) -> float:
        """By how much one unit moves the whole sum, in the norm that the mechanism needs."""
        return self._length(self.max_grad_norm)

    def pure_epsilon_of_a_step(self) -> float | None:
        """Epsilon at delta 0 of one Laplace release for a unit in it; None where unknown."""
        if self.mechanism != "laplace" or (self._laplace_after_l2 and self.dimension is None):
            return None
        return math.sqrt(self.dimension or 1) / _given(self.noise_multiplier)

    @property
    def _laplace_after_l2(self) -> bool:
        return self.mechanism == "laplace" and self.resolved_norm == "l2"

    def _length(self, values: Sequence[float]) -> float:
        if self.mechanism == "laplace" and self.resolved_norm == "l1":
            return math.fsum(values)
        return math.hypot(*values)

    def _noise_weights(self) -> list[float]:
        if isinstance(self.group_noise_weights, str):
            proportional = self.group_noise_weights == "proportional"
            return [bound if proportional else 1.0 for bound in self.max_grad_norm]
        return list(self.group_noise_weights)

    def _statistic(self) -> tuple[str, float] | None:
        """What an adaptive threshold releases, and its noise."""
        given = [(name, getattr(self, name)) for name in _SENSITIVITIES]
        found = [(name, noise) for name, noise in given if noise is not None]
        if len(found) > 1:
            raise ValueError(f"{_NAME}: count_noise and histogram_noise must not both be given")
        return found[0] if found else None

    def _check_counts(self) -> None:
        for name in (
            "steps", "epochs", "expected_batch_size", "num_units", "max_batch_size", "dimension"
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        for one, other in (("steps", "epochs"), ("expected_batch_size", "sample_rate")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{_NAME}: {one} and {other} must not both be given")
        if self.sample_rate is not None:
            _validate.number(
                _NAME, "sample_rate", self.sample_rate, minimum=0.0, maximum=1.0, exclusive=True
            )
        elif self.num_units is None:
            raise ValueError(f"{_NAME}: num_units must be given without sample_rate, got None")
        if self.epochs is not None and "expected_batch_size" not in self.open_settings():
            check_count("steps", self.num_steps)
        if (self.expected_batch_size or 0) > (self.num_units or math.inf):
            raise ValueError(
                f"{_NAME}: expected_batch_size must be <= {self.num_units}, the number of units, "
                f"got {self.expected_batch_size}"
            )

    def _check_truncation(self) -> None:
        if self.max_batch_size is None:
            return
        if self.num_units is None:
            raise ValueError(f"{_NAME}: num_units must be given with max_batch_size, got None")
        pure = self.mechanism == "laplace" and not self._laplace_after_l2
        if self.sampling != "poisson" or pure:
            raise ValueError(
                f"{_NAME}: max_batch_size must be left out without Poisson sampling, or with "
                f"Laplace noise after an L1 clip, got {self.max_batch_size}: no bound is known"
            )

    def _check_threshold(self) -> None:
        statistic = self._statistic()
        if statistic is None:
            return
        name, given = statistic
        _validate.number(_NAME, name, given, minimum=0.0, maximum=1e12, exclusive=True)
        if self.mechanism != "gaussian":
            raise ValueError(
                f"{_NAME}: {name} must be left out with mechanism {self.mechanism!r}: its noise is "
                "Gaussian, and no bound is known for both in one sampled batch"
            )
        if len(self.max_grad_norm) > 1:
            raise ValueError(
                f"{_NAME}: {name} must be left out with several bounds in max_grad_norm, got "
                f"{len(self.max_grad_norm)}: an adaptive threshold is one bound"
            )
        least = (self.noise_multiplier or 0.0) * _SENSITIVITIES[name]
        if given <= least:
            raise ValueError(
                f"{_NAME}: {name} must be > {least:g} with noise_multiplier "
                f"{self.noise_multiplier:g}, got {given:g}: nothing would be left for the gradient"
            )

    def _check_bounds(self) -> None:
        low, high = _validate.MIN_BOUND, _validate.MAX_BOUND
        for bound in self.max_grad_norm:
            _validate.number(_NAME, "max_grad_norm", bound, minimum=low, maximum=high)
        weights, count = self.group_noise_weights, len(self.max_grad_norm)
        if weights == "equal":
            return
        if count < 2:
            raise ValueError(
                f"{_NAME}: group_noise_weights must be left out without several bounds in "
                f"max_grad_norm, got {count}"
            )
        if isinstance(weights, str):
            _validate.choice(_NAME, "group_noise_weights", weights, ("equal", "proportional"))
            return
        for weight in weights:
            _validate.number(_NAME, "group_noise_weights", weight, minimum=low, maximum=high)
        if len(weights) != count:
            raise ValueError(
                f"{_NAME}: group_noise_weights must hold one number for each of the {count} bounds "
                f"in max_grad_norm, got {len(weights)}"
            )


def _given(value: float | None) -> float:
    if value is None:
        raise ValueError(f"{_NAME}: a setting that is left open has no value; call solve first")
    return value


def check_count(name: str, value: Any) -> None:
    """An int from 1 to 2^53, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_NAME}: {name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= 2**53:
        raise ValueError(f"{_NAME}: {name} must be >= 1 and <= 2^53, got {value}")
