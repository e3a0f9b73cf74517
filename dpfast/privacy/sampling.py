"""Who takes part in a step: random draws of privacy units from a cryptographic source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpfast.ops import NoiseSource
from dpfast.privacy.units import PrivacyUnits

__all__ = ["Sampled", "SamplingPlan", "UnitSampler"]

_WORD = 2.0**64


@dataclass(frozen=True)
class SamplingPlan:
    """How units are drawn; all of it is public.

    Attributes:
      units: of the data set.
      scheme: "poisson": each unit takes part in each step with chance `sample_rate`;
        "shuffled_unamplified": each unit takes part in one step of every epoch, drawn at random.
      sample_rate: chance of a unit to take part in a step.
      steps_per_epoch: steps from one start of the loader to its end.
      max_batch_size: of the units drawn, this many at most stay, chosen at random.
      max_samples_per_unit: of a unit's entries, this many at most take part, chosen at random.
    """

    units: PrivacyUnits
    scheme: str
    sample_rate: float
    steps_per_epoch: int
    max_batch_size: int | None = None
    max_samples_per_unit: int | None = None

    @property
    def expected_batch_size(self) -> float:
        """Mean number of units in a step before truncation."""
        return self.sample_rate * self.units.num_units


@dataclass(frozen=True)
class Sampled:
    """One unit that takes part, and which of its entries."""

    unit: int
    entries: NDArray[np.int64]


class UnitSampler:
    """Draws the units of one step after the other.

    Args:
      plan: how.
      source: of the randomness. Whoever could predict it would know who took part.
    """

    def __init__(self, plan: SamplingPlan, source: NoiseSource) -> None:
        self._plan = plan
        self._source = source
        self._step_of: NDArray[np.int64] | None = None

    def begin_epoch(self) -> None:
        """Draw what is drawn once an epoch: the step of each unit, where it has one."""
        if self._plan.scheme == "poisson":
            return
        steps = np.uint64(self._plan.steps_per_epoch)
        # The upper half of a word times the number of steps: the step is in the upper half.
        high = self._words(self._plan.units.num_units) >> np.uint64(32)
        self._step_of = (high * steps >> np.uint64(32)).astype(np.int64)

    def draw(self, step: int) -> list[Sampled]:
        """The units of a step, and which of their entries.

        Args:
          step: number of the step in its epoch.
        """
        units = self._draw_units(step)
        cap = self._plan.max_batch_size
        if cap is not None and len(units) > cap:
            units = np.sort(self._choose(units, cap))
        return [Sampled(int(unit), self._entries(int(unit))) for unit in units]

    def _draw_units(self, step: int) -> NDArray[np.int64]:
        if self._step_of is not None:
            return np.flatnonzero(self._step_of == step)
        words = self._words(self._plan.units.num_units)
        if self._plan.sample_rate >= 1.0:
            return np.arange(len(words))
        # Exact to 2^-64: a power of two scales a float without rounding.
        return np.flatnonzero(words < np.uint64(int(self._plan.sample_rate * _WORD)))

    def _entries(self, unit: int) -> NDArray[np.int64]:
        entries = self._plan.units.entries(unit)
        cap = self._plan.max_samples_per_unit
        return entries if cap is None or len(entries) <= cap else self._choose(entries, cap)

    def _choose(self, values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """A uniformly random subset."""
        chosen: NDArray[np.int64] = values[np.argsort(self._words(len(values)))[:count]]
        return chosen

    def _words(self, count: int) -> NDArray[np.uint64]:
        return self._source.random_words(count).numpy().view(np.uint64)
