"""Clipping thresholds: given, or following a percentile of the units' norms privately."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpfast import _validate

__all__ = [
    "NoisyHistogram",
    "PercentilePaper",
    "PrivateQuantile",
    "Statistic",
    "Threshold",
    "left_for_gradient",
    "make_statistic",
]

_NAME = "PrivacyEngine"
# Where nothing else is said, a threshold's statistic takes so little of the budget that the
# gradient's noise grows by 1 / sqrt(1 - 1/16) - 1 = 3.3 %.
_SMALL_SHARE = 4.0


@dataclass(frozen=True)
class PrivateQuantile:
    """A threshold that follows a percentile of the norms by noisy counts (Andrew et al. 2019).

    Each step releases sum(b_i - 1/2) + N(0, s^2) beside the gradient, where b_i = 1 if unit i's
    norm is at most C, and then sets C to C exp(-learning_rate (b - target)), b being 1/2 plus the
    noisy sum over the expected batch size. The gradient's noise is raised to
    (z^-2 - (2 s)^-2)^(-1/2), so that both together are the one mechanism of noise multiplier z that
    the accountant is told.

    Args:
      target_percentile: of the norms of the units that take part, 0 < p < 100.
      learning_rate: > 0.
      count_noise: s, standard deviation of the noise on the count; more than z / 2. None: a
        twentieth of the expected batch size as in the paper, or 2 z where that is more: the
        gradient's noise then grows by 3.3 % at most.
      lower: the least threshold, public. None: a thousandth of the first.
      upper: the greatest, public. None: a thousand times the first.

    References:
      arXiv:1905.03871, Algorithm 1 and Theorem 1; DP_SPEC section 2 (a).
    """

    target_percentile: float = 50.0
    learning_rate: float = 0.2
    count_noise: float | None = None
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class NoisyHistogram:
    """A threshold at a percentile of a noisy histogram of the steps before.

    Each step releases how many norms fell into each of `num_bins` bins, equally wide in the
    logarithm from `lower` to `upper`, with Gaussian noise; a running mean of these gives the
    percentile. A unit is in one bin, so that the sensitivity is 1 and the gradient's noise is
    raised to (z^-2 - s^-2)^(-1/2).

    Args:
      target_percentile: 0 < p < 100.
      num_bins: >= 2.
      bin_noise: s, standard deviation of the noise on each bin; more than z. None: a twentieth of
        the expected batch size, or 4 z where that is more.
      memory: weight of the past in the running mean, 0 <= m < 1.
      lower: norms below it count as it, public. None: a thousandth of the first threshold.
      upper: norms above it count as it, public. None: a thousand times the first threshold.

    References:
      DP_SPEC section 2 (c).
    """

    target_percentile: float = 50.0
    num_bins: int = 40
    bin_noise: float | None = None
    memory: float = 0.9
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class PercentilePaper:
    """The threshold is the raw percentile of each batch's norms, as the ADP-FL paper has it.

    There is no guarantee: the percentile is taken from private data without noise, and the scale
    of the noise publishes it. Epsilon is infinite; a conditional one, as if the thresholds had
    been public, is reported beside it. The whole batch must be processed at once.

    Args:
      percentile: 0 to 100.

    References:
      arXiv:2604.06518; DP_SPEC section 2, paper mode.
    """

    percentile: float = 50.0


Threshold = PrivateQuantile | NoisyHistogram | PercentilePaper


class Statistic(ABC):
    """What an adaptive threshold releases beside each gradient, and the threshold itself.

    Args:
      settings: of the threshold.
      initial: the first threshold.
      noise_multiplier: z of gradient and statistic together.
      expected_batch_size: in units, over all processes.

    Attributes:
      bound: the present threshold, float64, shape (), on the device of what was counted last.
      size: number of values that are released.
      sensitivity: L2 distance by which one unit moves them.
      noise: standard deviation of their noise.
    """

    size: int
    sensitivity: float
    noise: float

    def __init__(
        self,
        settings: PrivateQuantile | NoisyHistogram,
        initial: float,
        noise_multiplier: float,
        expected_batch_size: float,
    ) -> None:
        percentile = _check_percentile(settings.target_percentile)
        self.target = percentile / 100.0
        self.lower, self.upper = _check_limits(settings, initial)
        self.expected_batch_size = expected_batch_size
        self.bound = torch.tensor(initial, dtype=torch.float64)
        self._settings = settings
        given = self._given_noise(settings)
        least = noise_multiplier * self.sensitivity
        if given is None:
            self.noise = max(expected_batch_size / 20.0, _SMALL_SHARE * least)
        else:
            self.noise = _validate.number(
                _NAME, self.noise_name, given, minimum=0.0, maximum=1e12, exclusive=True
            )
        if self.noise <= least:
            raise ValueError(
                f"{_NAME}: {self.noise_name} must be > {least:g} with noise_multiplier "
                f"{noise_multiplier:g}, got {self.noise:g}: nothing would be left for the gradient"
            )
        self.gradient_noise_multiplier = left_for_gradient(
            noise_multiplier, self.noise / self.sensitivity
        )

    noise_name: str

    @abstractmethod
    def _given_noise(self, settings: Any) -> float | None:
        """The noise that the user asks for."""

    @abstractmethod
    def count(self, norms: torch.Tensor) -> torch.Tensor:
        """The statistic before noise, float64 (size,), of units' norms (units,).

        A norm that is not finite counts as above every threshold.
        """

    @abstractmethod
    def update(self, noisy: torch.Tensor) -> None:
        """Set the next threshold from what was released."""

    def description(self) -> dict[str, Any]:
        """The settings as they are used, with what the gradient's noise became."""
        return {
            "type": type(self._settings).__name__,
            **asdict(self._settings),
            self.noise_name: self.noise,
            "lower": self.lower,
            "upper": self.upper,
            "gradient_noise_multiplier": self.gradient_noise_multiplier,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"bound": float(self.bound)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.bound = torch.tensor(state["bound"], dtype=torch.float64)


class QuantileStatistic(Statistic):
    """See PrivateQuantile."""

    size, sensitivity, noise_name = 1, 0.5, "count_noise"

    def __init__(self, settings: PrivateQuantile, *more: Any) -> None:
        super().__init__(settings, *more)
        self._rate = _validate.number(
            _NAME,
            "learning_rate",
            settings.learning_rate,
            minimum=0.0,
            maximum=10.0,
            exclusive=True,
        )

    def _given_noise(self, settings: Any) -> float | None:
        given: float | None = settings.count_noise
        return given

    def count(self, norms: torch.Tensor) -> torch.Tensor:
        """See Statistic."""
        self.bound = self.bound.to(norms.device)
        return ((norms <= self.bound).double() - 0.5).sum().reshape(1)

    def update(self, noisy: torch.Tensor) -> None:
        """See Statistic."""
        below = 0.5 + noisy[0] / self.expected_batch_size
        step = torch.exp(-self._rate * (below - self.target))
        self.bound = (self.bound.to(noisy.device) * step).clamp(self.lower, self.upper)


class HistogramStatistic(Statistic):
    """See NoisyHistogram."""

    sensitivity, noise_name = 1.0, "bin_noise"

    def __init__(self, settings: NoisyHistogram, *more: Any) -> None:
        bins = settings.num_bins
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise TypeError(f"{_NAME}: num_bins must be an int, got {type(bins).__name__}")
        if not 2 <= bins <= 10_000:
            raise ValueError(f"{_NAME}: num_bins must be in [2, 10000], got {bins}")
        self.size = bins
        super().__init__(settings, *more)
        self._memory = _validate.number(
            _NAME, "memory", settings.memory, minimum=0.0, maximum=1.0 - 1e-6
        )
        ends = math.log(self.lower), math.log(self.upper)
        self._edges = torch.linspace(ends[0], ends[1], bins + 1, dtype=torch.float64).exp()
        self._running = torch.zeros(bins, dtype=torch.float64)

    def _given_noise(self, settings: Any) -> float | None:
        given: float | None = settings.bin_noise
        return given

    def count(self, norms: torch.Tensor) -> torch.Tensor:
        """See Statistic."""
        self._move(norms.device)
        # NaN is sorted behind every number.
        bins = torch.bucketize(norms.double(), self._edges[1:-1])
        found = torch.zeros(self.size, dtype=torch.float64, device=norms.device)
        return found.index_add_(0, bins, torch.ones_like(norms, dtype=torch.float64))

    def update(self, noisy: torch.Tensor) -> None:
        """See Statistic."""
        self._move(noisy.device)
        self._running = self._memory * self._running + (1.0 - self._memory) * noisy
        # Made monotone as a whole: bins cut off at 0 one by one would keep their positive noise.
        below = self._running.cumsum(0).cummax(0).values
        wanted = self.target * below[-1]
        index = torch.searchsorted(below, wanted).clamp(max=self.size - 1)
        # Within the bin, in the logarithm.
        start = torch.where(index > 0, below[index - 1], 0.0)
        inside = (wanted - start) / (below[index] - start)
        edges = self._edges.log()
        found = (edges[index] + inside.clamp(0.0, 1.0) * (edges[index + 1] - edges[index])).exp()
        known = (below[-1] > 0.0) & found.isfinite()
        self.bound = torch.where(known, found, self.bound.to(noisy.device))

    def _move(self, device: torch.device) -> None:
        self.bound = self.bound.to(device)
        self._edges, self._running = self._edges.to(device), self._running.to(device)

    def state_dict(self) -> dict[str, Any]:
        """See Statistic."""
        return {**super().state_dict(), "running": self._running.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Statistic."""
        super().load_state_dict(state)
        self._running = torch.tensor(state["running"], dtype=torch.float64)


def make_statistic(
    settings: Any, initial: Any, noise_multiplier: float, expected_batch_size: float
) -> Statistic | None:
    """The statistic that the settings ask for, or None where nothing is released beside gradients.

    Raises:
      TypeError, ValueError: bad settings, or noise that leaves nothing for the gradient.
    """
    if settings is None:
        return None
    if isinstance(settings, PercentilePaper):
        _validate.number(_NAME, "percentile", settings.percentile, minimum=0.0, maximum=100.0)
        return None
    kinds: dict[type, type[Statistic]] = {
        PrivateQuantile: QuantileStatistic,
        NoisyHistogram: HistogramStatistic,
    }
    if type(settings) not in kinds:
        raise TypeError(
            f"{_NAME}: threshold must be None, PrivateQuantile, NoisyHistogram or PercentilePaper, "
            f"got {type(settings).__name__}"
        )
    first = _validate.number(
        _NAME, "max_grad_norm", initial, minimum=_validate.MIN_BOUND, maximum=_validate.MAX_BOUND
    )
    return kinds[type(settings)](settings, first, noise_multiplier, expected_batch_size)


def left_for_gradient(noise_multiplier: float, statistic_multiplier: float) -> float:
    """The gradient's multiplier, so that both together are one mechanism of `noise_multiplier`."""
    share = (noise_multiplier / statistic_multiplier) ** 2
    return noise_multiplier / math.sqrt(1.0 - share)


def _check_percentile(value: Any) -> float:
    percentile = _validate.number(
        _NAME, "target_percentile", value, minimum=0.0, maximum=100.0, exclusive=True
    )
    if percentile == 100.0:
        raise ValueError(f"{_NAME}: target_percentile must be < 100, got 100.0")
    return percentile


def _check_limits(settings: Any, initial: float) -> tuple[float, float]:
    lower = initial / 1000.0 if settings.lower is None else settings.lower
    upper = initial * 1000.0 if settings.upper is None else settings.upper
    limits = [
        _validate.number(
            _NAME, name, value, minimum=_validate.MIN_BOUND, maximum=_validate.MAX_BOUND
        )
        for name, value in (("lower", lower), ("upper", upper))
    ]
    if not limits[0] <= initial <= limits[1] or limits[0] == limits[1]:
        raise ValueError(
            f"{_NAME}: max_grad_norm must lie between lower and upper, got {initial:g} and "
            f"[{limits[0]:g}, {limits[1]:g}]"
        )
    return limits[0], limits[1]
