"""What a private run costs, and the setting that a target epsilon leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dp_accounting import DpEvent

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.privacy import accounting
from dpfast.privacy._planned_run import LEAST_NOISE, PlannedRun, check_count
from dpfast.privacy.ledger import PrivacyLedger

__all__ = ["Budget", "PlannedRun", "choose_delta", "known_units", "solve"]

_NAME = "budget"
_LARGEST_EPSILON = 100.0  # beyond it a guarantee says nothing
_MOST_STEPS = 2**24
_OPEN = {
    "noise_multiplier": "noise_multiplier",
    "steps": "steps (or epochs)",
    "expected_batch_size": "expected_batch_size (or sample_rate)",
}


@dataclass(frozen=True)
class Budget:
    """A run with nothing left open, and what it costs.

    Attributes:
      run: the run.
      solved_for: "epsilon", or the setting that was found.
      target_epsilon: what it was found for; None with "epsilon".
      delta, delta_rule: delta, and where it comes from.
      accountant: "pld" or "rdp".
      ledger: what was released before; its cost is part of every epsilon here.
    """

    run: PlannedRun
    solved_for: str
    target_epsilon: float | None
    delta: float
    delta_rule: str
    accountant: str
    ledger: PrivacyLedger | None = None

    def epsilon_after(self, steps: int) -> float:
        """Epsilon of the ledger, the other releases and so many steps together."""
        before = _before(self.run, self.ledger)
        training = (self.run.event(), self.run.spends(steps))
        return accounting.epsilon([*before, training], self.delta, accountant=self.accountant)

    def curve(self) -> list[tuple[int, float]]:
        """Steps and epsilon after each quarter of the run."""
        counts = dict.fromkeys(-(-self.run.num_steps * part // 4) for part in range(1, 5))
        return [(steps, self.epsilon_after(steps)) for steps in counts]

    def report(self) -> dict[str, Any]:
        """What is guaranteed for whom, and under which settings; JSON-able (infinity is None)."""
        run, curve = self.run, self.curve()
        epsilon = curve[-1][1]
        result: dict[str, Any] = {
            "epsilon": _finite(epsilon),
            "delta": self.delta,
            "delta_rule": self.delta_rule,
            "target_epsilon": self.target_epsilon,
            "solved_for": self.solved_for,
            "guarantee": "none" if math.isinf(epsilon) else "(epsilon, delta)",
            "accountant": accounting.accountant_name(self.accountant),
            "privacy_unit": run.privacy_unit,
            "adjacency": accounting.ADJACENCY,
            "num_units": run.num_units,
            "sampling": run.sampling,
            "sample_rate": run.rate,
            "expected_batch_size": run.mean_batch_size,
            "max_batch_size": run.max_batch_size,
            "steps": run.num_steps,
            "steps_per_epoch": run.steps_per_epoch,
            "spends": run.spends(run.num_steps),
            "mechanism": run.mechanism,
            "norm": run.resolved_norm,
            "noise_multiplier": run.noise_multiplier,
            "threshold": self._threshold(),
            "noise": self._noise(),
            "pure_epsilon_of_a_step": run.pure_epsilon_of_a_step(),
            "release_noise": list(run.release_noise),
            "curve": [{"steps": steps, "epsilon": _finite(value)} for steps, value in curve],
            "arithmetic": "floating point; the guarantee is one of real arithmetic",
        }
        if self.ledger is not None:
            result["ledger"] = self.ledger.report(self.delta, accountant=self.accountant)
        return result

    def _threshold(self) -> dict[str, float] | None:
        run = self.run
        given = {"count_noise": run.count_noise, "histogram_noise": run.histogram_noise}
        found = {name: noise for name, noise in given.items() if noise is not None}
        if not found or run.noise_multiplier is None:
            return None
        gradient = run.gradient_noise_multiplier
        # Inverse squares of multipliers add up: this is the part of z^-2 that is the gradient's.
        share = (run.noise_multiplier / gradient) ** 2
        return {**found, "gradient_noise_multiplier": gradient, "gradient_share": share}

    def _noise(self) -> dict[str, Any] | None:
        run = self.run
        if not run.max_grad_norm:
            return None
        scales, size = run.noise_scales(), run.mean_batch_size
        return {
            "max_grad_norm": list(run.max_grad_norm),
            "sensitivity": run.sensitivity(),
            "scale_on_sum": scales,
            "scale_on_mean": None if size is None else [scale / size for scale in scales],
        }


def solve(
    run: PlannedRun,
    *,
    target_epsilon: float | None = None,
    delta: float | None = None,
    accountant: str = "pld",
    ledger: PrivacyLedger | None = None,
) -> Budget:
    """Epsilon of a run, or the one setting that it leaves open.

    Args:
      run: the run.
      target_epsilon: what the run, its other releases and the ledger may cost together, <= 100.
        One of the run's noise, duration and batch size must then be open, and none without.
      delta: in (0, 1) and below one over the number of units. None: 1 / (10 num_units).
      accountant: "pld" or "rdp".
      ledger: what was released about the same data set before; its unit must be the run's.

    Returns:
      The budget. A noise multiplier in it is the least one, rounded up to four decimals, or 0.1;
      with one step or one unit per batch more (one epoch, where that is what counts) the run would
      exceed the target.

    Raises:
      TypeError, ValueError: a bad argument, or no setting meets the target. PrivacyError: the
        ledger has another unit, or no guarantee that a target could be set for.
    """
    _validate.choice(_NAME, "accountant", accountant, accounting.ACCOUNTANTS)
    names = [_OPEN[name] for name in run.open_settings()]
    if target_epsilon is None and names:
        raise ValueError(
            f"{_NAME}: {', '.join(names)} must be given; or give target_epsilon and leave one open"
        )
    delta, rule = choose_delta(delta, run.num_units, ledger)
    if ledger is not None and ledger.privacy_unit not in (None, run.privacy_unit):
        raise PrivacyError(
            f"{_NAME}: privacy_unit must be {ledger.privacy_unit!r} like the ledger's, got "
            f"{run.privacy_unit!r}: epsilons of different units do not add up"
        )
    if target_epsilon is None:
        return Budget(run, "epsilon", None, delta, rule, accountant, ledger)
    if len(names) != 1:
        raise ValueError(
            f"{_NAME}: with target_epsilon exactly one of {', '.join(_OPEN.values())} must be left "
            f"open, got {len(names)} open"
        )
    target = _validate.number(
        _NAME,
        "target_epsilon",
        target_epsilon,
        minimum=0.0,
        maximum=_LARGEST_EPSILON,
        exclusive=True,
    )
    _refuse_void(ledger)
    search = _Search(_before(run, ledger), target, delta, accountant)
    solved_for = run.open_settings()[0]
    found = search.solve(run, solved_for)
    return Budget(found, solved_for, target, delta, rule, accountant, ledger)


def choose_delta(
    delta: float | None, num_units: int | None, ledger: PrivacyLedger | None
) -> tuple[float, str]:
    """A delta below one over the number of units, and where it comes from.

    Args:
      delta: as asked for; None: a tenth of one over the number of units.
      num_units: as given; with a ledger that names another number, the larger one counts.
      ledger: of which the number may be known.

    Raises:
      TypeError, ValueError: not such a delta, or neither delta nor the number of units is known.
    """
    check_count("num_units", num_units)
    known = [count for count in (num_units, known_units(ledger)) if count is not None]
    units = max(known, default=None)
    if delta is None:
        if units is None:
            raise ValueError(f"{_NAME}: delta must be given where the number of units is unknown")
        return 1.0 / (10 * units), f"1 / (10 x {units} units), as none was given"
    delta = accounting.check_delta(_NAME, "delta", delta)
    if units is None:
        return delta, "as given; it must be below one over the number of units, which is unknown"
    if delta >= 1.0 / units:
        raise ValueError(
            f"{_NAME}: delta must be < 1 / {units}, one over the number of units, got {delta:g}"
        )
    return delta, "as given"


def known_units(ledger: PrivacyLedger | None) -> int | None:
    """The number of units that a ledger's entries name; the largest of several."""
    mechanisms = () if ledger is None else ledger.mechanisms
    found = [each.description.get("num_units") for each in mechanisms]
    return max((count for count in found if isinstance(count, int)), default=None)


@dataclass(frozen=True)
class _Search:
    """Looks for a run that costs no more than the target, what was spent before included."""

    before: Sequence[tuple[DpEvent, int]]
    target: float
    delta: float
    accountant: str

    def solve(self, run: PlannedRun, solved_for: str) -> PlannedRun:
        cost = accounting.epsilon(self.before, self.delta, accountant=self.accountant)
        if cost >= self.target:
            raise ValueError(
                f"{_NAME}: target_epsilon must exceed {cost:.4g}, the cost of what is released "
                f"beside the run, got {self.target:g}"
            )
        if solved_for == "noise_multiplier":
            return self._noise(run)
        return self._steps(run) if solved_for == "steps" else self._batch_size(run)

    def _noise(self, run: PlannedRun) -> PlannedRun:
        spends = run.spends(run.num_steps)
        found = accounting.calibrate(
            lambda noise: [*self.before, (run.event(noise), spends)],
            self.target,
            self.delta,
            accountant=self.accountant,
        )
        return replace(run, noise_multiplier=max(math.ceil(found * 1e4) / 1e4, LEAST_NOISE))

    def _steps(self, run: PlannedRun) -> PlannedRun:
        event, poisson = run.event(), run.sampling == "poisson"
        found = accounting.max_count(
            lambda count: [*self.before, (event, count)],
            self.target,
            self.delta,
            accountant=self.accountant,
            limit=_MOST_STEPS,
        )
        if not 1 <= found < _MOST_STEPS:
            rule = "at least 1" if found == 0 else f"fewer than {_MOST_STEPS}"
            what = "step" if poisson else "epoch"
            raise ValueError(
                f"{_NAME}: target_epsilon must allow {rule} {what}, got {self.target:g}"
            )
        return replace(run, steps=found) if poisson else replace(run, epochs=found)

    def _batch_size(self, run: PlannedRun) -> PlannedRun:
        if run.sampling != "poisson":
            raise ValueError(
                f"{_NAME}: expected_batch_size must be given with sampling {run.sampling!r}: "
                "epsilon does not depend on it"
            )

        def events(size: int) -> list[tuple[DpEvent, int]]:
            sized = replace(run, expected_batch_size=size)
            return [*self.before, (sized.event(), sized.num_steps)]

        found = accounting.max_count(
            events,
            self.target,
            self.delta,
            accountant=self.accountant,
            limit=run.num_units or 0,
        )
        if found == 0:
            raise ValueError(
                f"{_NAME}: target_epsilon must allow an expected_batch_size of 1, got "
                f"{self.target:g}"
            )
        return replace(run, expected_batch_size=found)


def _before(run: PlannedRun, ledger: PrivacyLedger | None) -> list[tuple[DpEvent, int]]:
    """What counts beside the training."""
    return [*([] if ledger is None else ledger.spent()), *run.releases()]


def _refuse_void(ledger: PrivacyLedger | None) -> None:
    reasons = [] if ledger is None else ledger.reasons()
    if reasons:
        raise PrivacyError(
            f"{_NAME}: target_epsilon must be left out, the ledger has no guarantee: "
            f"{'; '.join(reasons)}"
        )


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
