"""docs/what_epsilon_means.md: every decimal number on the page is computed here again."""

import math
import re
from pathlib import Path

import dp_accounting as dp
import pytest
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant

from dpfast.privacy.accounting import TrainingStep, epsilon
from dpfast.privacy.budget import PlannedRun

PAGE = Path(__file__).parents[2] / "docs" / "what_epsilon_means.md"
TEXT = " ".join(PAGE.read_text().split())
STEPS, RATE, NOISE, DELTA = 1000, 0.01, 1.0, 1e-5
STEP = TrainingStep(NOISE, RATE, 10_000).event()
SLICES = (1, 2, 4, 8)
COARSE = 0.01  # a hundred times the accountant's own interval, and an upper bound all the same


def spent(*more, step=STEP, steps=STEPS, delta=DELTA):
    return epsilon([(step, steps), *more], delta)


def released(noise):
    return spent((dp.GaussianDpEvent(noise), 1))


def laplace(norm):
    return spent(step=TrainingStep(NOISE, RATE, 10_000, "laplace", norm).event())


def pure(**more):
    run = PlannedRun(mechanism="laplace", sample_rate=RATE, noise_multiplier=NOISE, **more)
    return run.pure_epsilon_of_a_step()


def guessed_right(value):
    """Percent: the best test's success against a coin under (epsilon, delta)."""
    return 100.0 * (math.exp(value) + DELTA) / (1.0 + math.exp(value))


def replaced():
    engine = PLDAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    return engine.compose(STEP, STEPS).get_epsilon(DELTA)


def of_patient(slices, interval):
    """Each slice drawn and clipped by itself: the sum moves by as many as take part."""
    counts = range(slices + 1)
    chances = [
        math.comb(slices, count) * RATE**count * (1 - RATE) ** (slices - count) for count in counts
    ]
    engine = PLDAccountant(value_discretization_interval=interval)
    event = MixtureOfGaussiansDpEvent(NOISE, [float(count) for count in counts], chances)
    return engine.compose(event, STEPS).get_epsilon(DELTA)


# What the page says, with {} for a number, and how it is computed.
STATED = [
    ("Its epsilon is {}:", spent),
    ("| 1 | {} % |", lambda: guessed_right(1.0)),
    ("| 1.83 | {} % |", lambda: guessed_right(spent())),
    ("| 8 | {} % |", lambda: guessed_right(8.0)),
    ("has {} at delta 0.001", lambda: spent(delta=1e-3)),
    ("and {} at delta 1e-7", lambda: spent(delta=1e-7)),
    ("is then {} for any number of slices", spent),
    ("same training: {} in the example", replaced),
    ("on the same patients have {} together", lambda: spent(steps=2 * STEPS)),
    ("bring the example from {} to", spent),
    ("to {} (10: to", lambda: released(5.0)),
    ("(10: to {})", lambda: released(10.0)),
    ("release for each: {} for the ten epochs",
     lambda: spent(step=TrainingStep(NOISE, RATE, 10_000, sampling="shuffled_unamplified").event(),
                   steps=10)),
    ("then has a pure epsilon of {},", pure),
    ("the whole training {} at delta 1e-5", lambda: laplace("l1")),
    ("the number of parameters: {} for a million", lambda: pure(norm="l2", dimension=10**6)),
    ("does not depend on it, {} for the example", lambda: laplace("l2")),
]  # fmt: skip
SETTINGS = [
    "a sample rate of {} (each patient", "--sample-rate {} --steps", "at delta {} and", "| {} | 86",
]  # fmt: skip
ROWS = [f"| {slices} | {{}} | {{}} |" for slices in SLICES]


def find(snippet):
    pattern = re.escape(snippet).replace(re.escape("{}"), r"(\d+(?:\.\d+)?)")
    [found] = re.finditer(pattern, TEXT)
    return found


def rounded_up(value, text):
    decimals = len(text.partition(".")[2])
    # The margin is that of binary fractions such as 0.01, not of the accounting.
    return math.ceil(value * 10**decimals - 1e-9) / 10**decimals


@pytest.mark.parametrize(("snippet", "compute"), STATED, ids=[s for s, _ in STATED])
def test_page_states_what_is_computed(snippet, compute):
    text = find(snippet)[1]
    assert float(text) == rounded_up(compute(), text)


def test_page_states_its_settings():
    assert [float(find(snippet)[1]) for snippet in SETTINGS] == [RATE, RATE, 1e-3, 1.83]
    command = find("--num-units {} --sample-rate 0.01 --steps {} \\ --noise-multiplier {} --delta")
    assert [float(number) for number in command.groups()] == [10_000, STEPS, NOISE]


def test_slices_of_a_patient_cost_what_the_page_says_about():
    for slices, row in zip(SLICES, ROWS, strict=True):
        of_slice, stated = (float(text) for text in find(row).groups())
        assert of_slice == rounded_up(spent(), "1.83")
        bound = of_patient(slices, COARSE)
        assert stated - 0.01 <= bound <= stated + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("slices", SLICES)
def test_slices_of_a_patient_cost_what_the_page_says(slices):
    text = find(ROWS[SLICES.index(slices)])[2]
    assert float(text) == rounded_up(of_patient(slices, 1e-4), text)


def test_no_number_of_the_page_is_left_out():
    known = [find(snippet).span(group)
             for snippet in [*(s for s, _ in STATED), *SETTINGS, *ROWS]
             for group in range(1, snippet.count("{}") + 1)]  # fmt: skip
    numbers = [found.span() for found in re.finditer(r"(?<![\w.-])\d+\.\d+", TEXT)]
    assert len(numbers) > 20
    assert [TEXT[slice(*span)] for span in numbers if span not in known] == []
