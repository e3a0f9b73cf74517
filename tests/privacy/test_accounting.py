"""Events and epsilon: equal to dp-accounting called by hand."""

import json
import math

import dp_accounting as dp
import pytest
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from dpfast.privacy.accounting import (
    TrainingStep,
    calibrate,
    epsilon,
    event_from_json,
    event_to_json,
    max_count,
)

DELTA = 1e-5
GAUSSIAN, LAPLACE = dp.GaussianDpEvent, dp.LaplaceDpEvent


def by_hand(event, count=1, delta=DELTA, accountant=PLDAccountant):
    engine = accountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return engine.compose(dp.SelfComposedDpEvent(event, count)).get_epsilon(delta)


@pytest.mark.parametrize(
    ("step", "event"),
    [
        (TrainingStep(1.0, 0.01, 1000), dp.PoissonSampledDpEvent(0.01, GAUSSIAN(1.0))),
        (TrainingStep(1.5, 1.0, 10), dp.PoissonSampledDpEvent(1.0, GAUSSIAN(1.5))),
        (
            TrainingStep(1.0, 0.01, 1000, mechanism="laplace", norm="l1"),
            dp.PoissonSampledDpEvent(0.01, LAPLACE(1.0)),
        ),
        (
            TrainingStep(1.0, 0.01, 1000, mechanism="laplace", norm="l2"),
            dp.PoissonSampledDpEvent(0.01, GAUSSIAN(math.sqrt(2 / math.pi))),
        ),
        (TrainingStep(1.0, 0.01, 1000, norm="l1"), dp.PoissonSampledDpEvent(0.01, GAUSSIAN(1.0))),
        (
            TrainingStep(1.0, 0.032, 1000, max_batch_size=64),
            dp.TruncatedSubsampledGaussianDpEvent(1000, 0.032, 64, 1.0),
        ),
        (TrainingStep(2.0, 0.1, 100, sampling="shuffled_unamplified"), GAUSSIAN(2.0)),
        (
            TrainingStep(2.0, 0.1, 9, "laplace", "l1", "shuffled_unamplified"),
            LAPLACE(2.0),
        ),
        (TrainingStep(0.0, 0.1, 100), dp.NonPrivateDpEvent()),
    ],
)
def test_step_is_the_event_of_its_mechanism(step, event):
    assert step.event() == event
    if event != dp.NonPrivateDpEvent():
        assert epsilon([(step.event(), 20)], DELTA) == by_hand(event, 20)


def test_epsilon_of_the_specification():
    assert epsilon([(TrainingStep(1.0, 0.01, 1000).event(), 1000)], DELTA) == pytest.approx(
        1.828, abs=5e-4
    )
    laplace = TrainingStep(1.0, 0.01, 1000, "laplace", "l1").event()
    assert epsilon([(laplace, 1000)], DELTA) == pytest.approx(1.12, abs=5e-3)
    clipped = TrainingStep(1.0, 0.01, 1000, "laplace", "l2").event()
    assert epsilon([(clipped, 1000)], DELTA) == pytest.approx(3.16, abs=5e-3)
    truncated = TrainingStep(1.0, 0.032, 1000, max_batch_size=64).event()
    assert epsilon([(truncated, 500)], DELTA) == pytest.approx(4.6058, abs=5e-5)


def test_rdp_is_dp_accountings_and_refuses_what_it_cannot_bound():
    step = TrainingStep(1.0, 0.01, 1000).event()
    found = epsilon([(step, 1000)], DELTA, accountant="rdp")
    assert found == by_hand(step, 1000, accountant=RdpAccountant) == pytest.approx(2.101, abs=5e-4)
    with pytest.raises(ValueError, match="accountant 'rdp' has no bound"):
        epsilon([(TrainingStep(1.0, 0.1, 9, "laplace", "l1").event(), 1)], DELTA, accountant="rdp")


def test_heterogeneous_releases_compose():
    training = dp.PoissonSampledDpEvent(0.01, GAUSSIAN(0.8))
    statistics = GAUSSIAN(5.0)
    found = epsilon([(statistics, 1), (training, 300), (training, 200)], DELTA)
    whole = dp.ComposedDpEvent([statistics, dp.SelfComposedDpEvent(training, 500)])
    assert found == by_hand(whole)
    assert found > epsilon([(training, 500)], DELTA)


def test_nothing_costs_nothing_and_no_guarantee_costs_everything():
    assert epsilon([], DELTA) == 0.0
    assert epsilon([(GAUSSIAN(1.0), 0)], DELTA) == 0.0
    assert epsilon([(GAUSSIAN(9.0), 1), (dp.NonPrivateDpEvent(), 1)], DELTA) == math.inf


@pytest.mark.parametrize(
    "step",
    [
        TrainingStep(1.0, 0.1, 100, "laplace", "l1", max_batch_size=20),
        TrainingStep(1.0, 0.1, 100, sampling="shuffled_unamplified", max_batch_size=20),
    ],
)
def test_truncation_without_a_known_bound_is_refused(step):
    with pytest.raises(ValueError, match="max_batch_size must be None"):
        step.event()


@pytest.mark.slow
def test_calibrated_noise_is_that_of_the_specification():
    found = calibrate(lambda z: [(TrainingStep(z, 0.01, 1000).event(), 1000)], 2.0, DELTA)
    assert found == pytest.approx(0.9591, abs=5e-5)
    step = TrainingStep(found, 0.01, 1000).event()
    assert 2.0 * 0.999 < epsilon([(step, 1000)], DELTA) <= 2.0


@pytest.mark.slow
def test_calibration_counts_what_was_spent_before():
    spent = (GAUSSIAN(4.0), 1)

    def events(z, before=(spent,)):
        return [*before, (TrainingStep(z, 0.1, 50).event(), 20)]

    alone = calibrate(lambda z: events(z, ()), 3.0, DELTA)
    beside = calibrate(events, 3.0, DELTA)
    assert beside > alone * 1.01
    assert 2.99 < epsilon(events(beside), DELTA) <= 3.0
    with pytest.raises(ValueError, match="target_epsilon must exceed what was spent before"):
        calibrate(lambda z: events(z, ((GAUSSIAN(0.5), 1),)), 3.0, DELTA)


def test_most_steps_within_a_budget():
    step = TrainingStep(2.0, 0.2, 50).event()
    count = max_count(lambda n: [(step, n)], 1.5, DELTA)
    assert epsilon([(step, count)], DELTA) <= 1.5 < epsilon([(step, count + 1)], DELTA)
    assert max_count(lambda n: [(step, n)], 1e-4, DELTA) == 0
    assert max_count(lambda n: [(step, n)], 50.0, DELTA, limit=5) == 5


@pytest.mark.parametrize(
    "event",
    [
        dp.PoissonSampledDpEvent(0.1, LAPLACE(1.0)),
        dp.TruncatedSubsampledGaussianDpEvent(1000, 0.032, 64, 1.0),
        dp.ComposedDpEvent([GAUSSIAN(5.0), dp.SelfComposedDpEvent(dp.NoOpDpEvent(), 3)]),
        MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0, 2.0], [0.81, 0.18, 0.01]),
        dp.NonPrivateDpEvent(),
    ],
)
def test_events_go_to_json_and_back(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_events_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="an event must be one of"):
        event_to_json(dp.UnsupportedDpEvent())
    for damaged in ({}, {"type": "UnsupportedDpEvent"}, {"type": "GaussianDpEvent"}, []):
        with pytest.raises(ValueError, match="a damaged event"):
            event_from_json(damaged)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_must_be_a_probability(delta):
    with pytest.raises(ValueError, match="epsilon: delta must be"):
        epsilon([(GAUSSIAN(1.0), 1)], delta)


def test_epsilon_has_the_library_s_own_bits_whatever_was_asked_before():
    def sampled(noise, rate):
        return dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    release = dp.GaussianDpEvent(10.0)
    for events in (
        [(sampled(1.1, 0.02), 100)],
        [(sampled(1.1, 0.02), 300)],
        [(release, 1), (sampled(1.1, 0.02), 200)],
        [(sampled(1.1, 0.02), 50), (sampled(2.0, 0.1), 7), (release, 2)],
        [(sampled(1.1, 0.0), 50), (sampled(2.0, 0.1), 3)],
        [(sampled(2.0, 1.0), 3)],
    ):
        stock = PLDAccountant(neighboring_relation=relation)
        for event, count in events:
            stock.compose(event, count)
        assert epsilon(events, 1e-5) == stock.get_epsilon(1e-5)
    free = [(sampled(0.0, 0.02), 1)]
    assert epsilon(free, 1e-5) == math.inf
