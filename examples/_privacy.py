"""The accounting of Poisson-sampled Gaussian steps, by dp-accounting's PLD accountant."""

from dataclasses import dataclass
from importlib.metadata import version

import dp_accounting
from dp_accounting.pld import PLDAccountant

ACCOUNTANT = f"PLD, dp-accounting {version('dp-accounting')}"
ADJACENCY = "add or remove one"


@dataclass(frozen=True)
class PrivacyGoal:
    """The (epsilon, delta) that the whole private run may spend."""

    target_epsilon: float
    target_delta: float


def calibrate_noise(goal: PrivacyGoal, sample_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier that keeps `steps` steps within the goal."""
    multiplier: float = dp_accounting.calibrate_dp_mechanism(
        _accountant,
        lambda noise_multiplier: _steps_event(noise_multiplier, sample_rate, steps),
        goal.target_epsilon,
        goal.target_delta,
    )
    return multiplier


def epsilon_spent(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return the epsilon of `steps` steps at the given delta, one record added or removed."""
    accountant = _accountant()
    accountant.compose(_steps_event(noise_multiplier, sample_rate, steps))
    epsilon: float = accountant.get_epsilon(delta)
    return epsilon


def _accountant() -> PLDAccountant:
    return PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)


def _steps_event(
    noise_multiplier: float, sample_rate: float, steps: int
) -> dp_accounting.SelfComposedDpEvent:
    step = dp_accounting.PoissonSampledDpEvent(
        sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(step, steps)
