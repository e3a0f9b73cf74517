"""From what was released to epsilon: events for dp-accounting, which does the arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import dp_accounting
from dp_accounting import DpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant

from dpfast import _validate

__all__ = [
    "ACCOUNTANTS",
    "ADJACENCY",
    "SAMPLINGS",
    "TrainingStep",
    "accountant_name",
    "calibrate",
    "check_delta",
    "check_supported",
    "epsilon",
    "event_from_json",
    "event_to_json",
    "library_version",
    "max_count",
]

ACCOUNTANTS = ("pld", "rdp")
ADJACENCY = "add_or_remove_one"
SAMPLINGS = ("poisson", "shuffled_unamplified")
_RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
# Laplace noise of scale b after an L2 clip to C is sqrt(pi/2) C/b-GDP in any dimension, as
# Gaussian noise of this multiple of b is (DP_SPEC section 3).
_LAPLACE_AS_GAUSSIAN = math.sqrt(2.0 / math.pi)
_MOST_NOISE = 2.0**20  # a noise multiplier that leaves nothing to learn
# What a ledger may hold, by the name that it is stored under.
_EVENTS: dict[str, type[DpEvent]] = {
    event.__name__: event
    for event in (
        dp_accounting.ComposedDpEvent,
        dp_accounting.GaussianDpEvent,
        dp_accounting.LaplaceDpEvent,
        MixtureOfGaussiansDpEvent,
        dp_accounting.NonPrivateDpEvent,
        dp_accounting.NoOpDpEvent,
        dp_accounting.PoissonSampledDpEvent,
        dp_accounting.SelfComposedDpEvent,
        dp_accounting.TruncatedSubsampledGaussianDpEvent,
        dp_accounting.ZCDpEvent,
    )
}


@dataclass(frozen=True)
class TrainingStep:
    """One private step as an accountant sees it; the unit is whatever `num_units` counts.

    Attributes:
      noise_multiplier: scale of all that the step releases over its sensitivity: std for Gaussian
        noise, b for Laplace noise. A threshold's count or histogram is part of it.
      sample_rate: chance of a unit to take part, 0 < q <= 1.
      num_units: size of the data set, public.
      mechanism: "gaussian" or "laplace".
      norm: "l2" or "l1", in which a unit is clipped.
      sampling: "poisson", or "shuffled_unamplified": a unit takes part once an epoch, and the
        event is that of an epoch, not of a step.
      max_batch_size: units beyond this many are dropped at random (truncated Poisson sampling).
    """

    noise_multiplier: float
    sample_rate: float
    num_units: int
    mechanism: str = "gaussian"
    norm: str = "l2"
    sampling: str = "poisson"
    max_batch_size: int | None = None

    def event(self) -> DpEvent:
        """The event of one step; of one epoch where every unit takes part once in each.

        Raises:
          ValueError: a truncated batch with Laplace noise after an L1 clip, or without Poisson
            sampling: dp-accounting knows no bound.
        """
        if self.noise_multiplier == 0.0:
            return dp_accounting.NonPrivateDpEvent()
        noise = self._noise()
        if self.max_batch_size is not None:
            if self.sampling != "poisson" or not isinstance(noise, dp_accounting.GaussianDpEvent):
                raise ValueError(
                    "PrivacyEngine: max_batch_size must be None without Poisson sampling or with "
                    f"Laplace noise after an L1 clip, got {self.max_batch_size}"
                )
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.num_units,
                sampling_probability=self.sample_rate,
                truncated_batch_size=self.max_batch_size,
                noise_multiplier=noise.noise_multiplier,
            )
        if self.sampling == "poisson":
            return dp_accounting.PoissonSampledDpEvent(self.sample_rate, noise)
        return noise

    def _noise(self) -> DpEvent:
        if self.mechanism == "gaussian":
            # An L1 clip to C bounds the L2 norm by C as well.
            return dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.norm == "l1":
            return dp_accounting.LaplaceDpEvent(self.noise_multiplier)
        return dp_accounting.GaussianDpEvent(_LAPLACE_AS_GAUSSIAN * self.noise_multiplier)


def accountant_name(accountant: str) -> str:
    """The accountant with its library's version, for reports and ledgers."""
    return f"{accountant.upper()}, {library_version()}"


def library_version() -> str:
    """dp-accounting and its version."""
    return f"dp-accounting {version('dp-accounting')}"


def check_delta(function: str, name: str, value: Any) -> float:
    """A delta in (0, 1)."""
    delta = _validate.number(function, name, value, minimum=0.0, maximum=1.0, exclusive=True)
    if delta == 1.0:
        raise ValueError(f"{function}: {name} must be < 1, got 1.0")
    return delta


def epsilon(
    events: Iterable[tuple[DpEvent, int]], delta: float, *, accountant: str = "pld"
) -> float:
    """The epsilon of events and how often each was released, adding or removing one unit.

    Args:
      events: pairs of an event and its count; they may follow one another adaptively.
      delta: in (0, 1).
      accountant: "pld", tight up to its discretisation and never below the truth; or "rdp".

    Returns:
      epsilon >= 0; infinite where an event carries no guarantee, 0 where nothing was released.

    Raises:
      ValueError: a bad delta, an unknown accountant, or an event that it cannot account.
    """
    delta = check_delta("epsilon", "delta", delta)
    _validate.choice("epsilon", "accountant", accountant, ACCOUNTANTS)
    counts: dict[str, int] = {}
    for event, count in events:
        if count < 0:
            raise ValueError(f"epsilon: a count must be >= 0, got {count}")
        if count:
            key = json.dumps(event_to_json(event))
            counts[key] = counts.get(key, 0) + count
    return _epsilon(tuple(counts.items()), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[tuple[str, int], ...], delta: float, accountant: str) -> float:
    """The same by the events' JSON, which is hashable where an event's list is not."""
    if not events:
        return 0.0
    engine = _new(accountant)
    for text, count in events:
        event = event_from_json(json.loads(text))
        check_supported(event, accountant)
        engine.compose(event, count)
    return float(engine.get_epsilon(delta))


def _new(accountant: str) -> Any:
    if accountant == "pld":
        return _QuickPLDAccountant(neighboring_relation=_RELATION)
    return RdpAccountant(neighboring_relation=_RELATION)


class _QuickPLDAccountant(PLDAccountant):  # type: ignore[misc]
    """The same bits, but one step's distribution is made once for all counts of it.

    Making it is most of the work, and a run asks for epsilon after 100 steps, 200, ...
    """

    _pld: Any

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        if (
            not do_compose
            or not isinstance(event, dp_accounting.PoissonSampledDpEvent)
            or not isinstance(event.event, dp_accounting.GaussianDpEvent)
            or event.sampling_probability == 0.0
            or event.event.noise_multiplier == 0.0
        ):
            return super()._maybe_compose(event, count, do_compose)
        step = _sampled_gaussian(
            event.event.noise_multiplier,
            event.sampling_probability,
            self._value_discretization_interval,
        )
        self._pld = self._pld.compose(step.self_compose(count))
        return None


@lru_cache(maxsize=32)
def _sampled_gaussian(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=_RELATION,
    )


def check_supported(event: DpEvent, accountant: str) -> None:
    """Refuse an event that the accountant has no bound for."""
    if not _new(accountant).supports(event):
        raise ValueError(f"epsilon: accountant {accountant!r} has no bound for {event}")


def calibrate(
    make_events: Callable[[float], Iterable[tuple[DpEvent, int]]],
    target_epsilon: float,
    target_delta: float,
    *,
    accountant: str = "pld",
) -> float:
    """The smallest noise multiplier (to 1e-6) whose events stay within (epsilon, delta).

    Args:
      make_events: from a noise multiplier to events and counts, what was spent before included.
      target_epsilon: > 0.
      target_delta: in (0, 1).
      accountant: as in `epsilon`.

    Raises:
      ValueError: a bad argument, or no noise is enough: what was spent before exceeds the target.
    """
    target = _validate.number(
        "calibrate", "target_epsilon", target_epsilon, minimum=0.0, maximum=1e6, exclusive=True
    )

    def spent(multiplier: float) -> float:
        return epsilon(make_events(multiplier), target_delta, accountant=accountant)

    # The bracket is found from above: a privacy loss distribution grows without end as the noise
    # goes to 0, and the answer is rarely below 0.3.
    if spent(_MOST_NOISE) > target:
        raise ValueError(
            f"calibrate: target_epsilon must exceed what was spent before, got {target:g}"
        )
    high = 1.0
    while spent(high) > target:
        high *= 2.0
    low = high / 2.0
    while low > 2.0**-6 and spent(low) <= target:
        high, low = low, low / 2.0
    if spent(low) <= target:
        return low
    result: float = dp_accounting.calibrate_dp_mechanism(
        lambda: _new(accountant),
        lambda multiplier: dp_accounting.ComposedDpEvent(
            [dp_accounting.SelfComposedDpEvent(*pair) for pair in make_events(multiplier)]
        ),
        target,
        target_delta,
        bracket_interval=dp_accounting.ExplicitBracketInterval(low, high),
    )
    return result


def max_count(
    make_events: Callable[[int], Iterable[tuple[DpEvent, int]]],
    target_epsilon: float,
    target_delta: float,
    *,
    accountant: str = "pld",
    limit: int = 2**24,
) -> int:
    """The largest count whose events stay within (epsilon, delta), at most `limit`."""

    def fits(count: int) -> bool:
        return epsilon(make_events(count), target_delta, accountant=accountant) <= target_epsilon

    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """An event as JSON: its class' name and its fields."""
    name = type(event).__name__
    if name not in _EVENTS:
        raise ValueError(f"PrivacyLedger: an event must be one of {', '.join(_EVENTS)}, got {name}")
    fields = getattr(event, "__attrs_attrs__", ())
    return {"type": name, **{f.name: _value_to_json(getattr(event, f.name)) for f in fields}}


def _value_to_json(value: Any) -> Any:
    if isinstance(value, DpEvent):
        return event_to_json(value)
    if isinstance(value, (list, tuple)):
        return [_value_to_json(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def event_from_json(value: Mapping[str, Any]) -> DpEvent:
    """The event that `event_to_json` wrote.

    Raises:
      ValueError: not such a mapping.
    """
    try:
        fields = {k: _value_from_json(v) for k, v in value.items() if k != "type"}
        return _EVENTS[value["type"]](**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("PrivacyLedger: a damaged event") from error


def _value_from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return event_from_json(value)
    if isinstance(value, list):
        return [_value_from_json(each) for each in value]
    return value
