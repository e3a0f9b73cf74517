"""Budgets: epsilon of a planned run, and the setting that a target leaves open."""

import json
import math
from dataclasses import replace

import dp_accounting as dp
import pytest
import torch

from dpfast import NoisyHistogram, PrivacyError, PrivacyLedger, PrivateQuantile, reference
from dpfast.privacy.accounting import epsilon, event_to_json
from dpfast.privacy.budget import PlannedRun, choose_delta, known_units, solve
from tests.privacy.helpers import loader_of, make, vectors

DELTA = 1e-4
GAUSSIAN, POISSON = dp.GaussianDpEvent, dp.PoissonSampledDpEvent
# RDP is cheap; which accountant it is makes no difference to what is tested.
RDP = {"accountant": "rdp", "delta": DELTA}


def run(**settings):
    return PlannedRun(num_units=1000, **settings)


WHOLE = run(noise_multiplier=1.5, expected_batch_size=50, epochs=5)


def ledger(unit="sample", num_units=None, **more):
    made, description = PrivacyLedger(), {"num_units": num_units}
    made.record(made.register(GAUSSIAN(4.0), privacy_unit=unit, description=description, **more))
    return made


def rdp(events):
    return epsilon(events, DELTA, accountant="rdp")


def test_epsilon_of_the_specification():
    found = solve(PlannedRun(noise_multiplier=1.0, sample_rate=0.01, steps=1000), delta=1e-5)
    assert found.epsilon_after(1000) == pytest.approx(1.828, abs=5e-4)
    assert found.solved_for == "epsilon"


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "rate", "steps"),
    [
        ({"expected_batch_size": 64, "epochs": 30}, 79, 64 / 5000, 2370),
        ({"expected_batch_size": 50, "steps": 7}, 100, 0.01, 7),
        ({"sample_rate": 0.3, "epochs": 2}, 4, 0.3, 8),
        ({"sample_rate": 0.3, "epochs": 2, "sampling": "shuffled_unamplified"}, 4, 0.25, 8),
    ],
)
def test_run_has_the_steps_of_the_loader(settings, steps_per_epoch, rate, steps):
    planned = PlannedRun(num_units=5000, **settings)
    assert planned.steps_per_epoch == steps_per_epoch
    assert planned.rate == rate
    assert planned.num_steps == steps
    assert planned.open_settings() == ["noise_multiplier"]


@pytest.mark.parametrize(
    ("settings", "events"),
    [
        ({}, [(POISSON(0.05, GAUSSIAN(1.5)), 100)]),
        ({"sampling": "shuffled_unamplified"}, [(GAUSSIAN(1.5), 5)]),
        ({"mechanism": "laplace"}, [(POISSON(0.05, dp.LaplaceDpEvent(1.5)), 100)]),
        (
            {"mechanism": "laplace", "norm": "l2"},
            [(POISSON(0.05, GAUSSIAN(1.5 * math.sqrt(2 / math.pi))), 100)],
        ),
        (
            {"max_batch_size": 90},
            [(dp.TruncatedSubsampledGaussianDpEvent(1000, 0.05, 90, 1.5), 100)],
        ),
        # An adaptive threshold is part of the step that the accountant is told of.
        ({"count_noise": 2.0}, [(POISSON(0.05, GAUSSIAN(1.5)), 100)]),
        (
            {"release_noise": (5.0, 8.0)},
            [(GAUSSIAN(5.0), 1), (GAUSSIAN(8.0), 1), (POISSON(0.05, GAUSSIAN(1.5)), 100)],
        ),
    ],
)
def test_run_is_the_events_of_its_settings(settings, events):
    planned = replace(WHOLE, **settings)
    training = (planned.event(), planned.spends(planned.num_steps))
    assert [*planned.releases(), training] == events


@pytest.mark.parametrize(
    ("planned", "done"),
    [
        ({}, {}),
        ({"sampling": "shuffled_unamplified"}, {"sampling": "shuffled_unamplified"}),
        ({"max_batch_size": 12}, {"max_batch_size": 12}),
        ({"mechanism": "laplace"}, {"mechanism": "laplace"}),
        ({"mechanism": "laplace", "norm": "l2"}, {"mechanism": "laplace", "norm": "l2"}),
        ({"count_noise": 2.0}, {"threshold": PrivateQuantile(count_noise=2.0)}),
        ({"histogram_noise": 4.0}, {"threshold": NoisyHistogram(bin_noise=4.0)}),
    ],
)
def test_run_is_what_the_engine_does(planned, done):
    run = PlannedRun(num_units=45, expected_batch_size=7, epochs=2, noise_multiplier=1.5, **planned)
    loader = loader_of(vectors(45), batch_size=7)
    engine, _, _, private = make(loader, noise_multiplier=1.5, **done)
    [mechanism] = engine.ledger.mechanisms
    assert event_to_json(run.event()) == mechanism.event
    assert run.steps_per_epoch == len(private)
    assert run.rate == mechanism.description["sample_rate"]
    assert run.mean_batch_size == mechanism.description["expected_batch_size"]
    if threshold := mechanism.description["threshold"]:
        assert run.gradient_noise_multiplier == pytest.approx(
            threshold["gradient_noise_multiplier"]
        )
    if run.mechanism == "laplace":
        sized = replace(run, dimension=6) if run.norm == "l2" else run
        stated = mechanism.description["pure_epsilon_of_a_step"]
        assert sized.pure_epsilon_of_a_step() == pytest.approx(stated)
    assert known_units(engine.ledger) == 45


def test_shuffled_steps_count_by_the_epoch_begun():
    shuffled = replace(WHOLE, sampling="shuffled_unamplified")
    assert [shuffled.spends(steps) for steps in (0, 1, 20, 21)] == [0, 1, 1, 2]


# --- what is left open ---


@pytest.mark.parametrize("settings", [{}, {"release_noise": (6.0,)}, {"count_noise": 3.0}])
def test_noise_is_the_least_that_keeps_within_the_target(settings):
    found = solve(replace(WHOLE, noise_multiplier=None, **settings), target_epsilon=2.0, **RDP)
    assert found.solved_for == "noise_multiplier"
    less = replace(found.run, noise_multiplier=found.run.noise_multiplier - 2e-4)
    assert found.epsilon_after(100) <= 2.0 < rdp([*less.releases(), (less.event(), 100)])
    assert round(found.run.noise_multiplier, 4) == found.run.noise_multiplier


def test_steps_are_the_most_that_keep_within_the_target():
    found = solve(replace(WHOLE, epochs=None), target_epsilon=2.0, **RDP)
    steps = found.run.num_steps
    assert found.solved_for == "steps"
    assert found.epsilon_after(steps) <= 2.0 < found.epsilon_after(steps + 1)


def test_epochs_are_the_most_that_keep_within_the_target():
    shuffled = replace(WHOLE, epochs=None, noise_multiplier=4.0, sampling="shuffled_unamplified")
    found = solve(shuffled, target_epsilon=5.0, **RDP)
    steps = found.run.num_steps
    assert found.run.epochs >= 1
    assert steps == 20 * found.run.epochs
    assert found.epsilon_after(steps) <= 5.0 < found.epsilon_after(steps + 1)


@pytest.mark.parametrize("duration", [{"epochs": 5}, {"steps": 100}])
def test_batch_size_is_the_largest_that_keeps_within_the_target(duration):
    found = solve(run(noise_multiplier=1.5, **duration), target_epsilon=2.0, **RDP)
    assert found.solved_for == "expected_batch_size"
    size = found.run.expected_batch_size
    larger = replace(found.run, expected_batch_size=size + 1)
    assert found.epsilon_after(found.run.num_steps) <= 2.0
    assert rdp([(larger.event(), larger.num_steps)]) > 2.0


def test_batch_is_the_whole_data_set_where_that_keeps_within_the_target():
    found = solve(run(noise_multiplier=20.0, steps=3), target_epsilon=5.0, **RDP)
    assert found.run.expected_batch_size == 1000


def test_least_noise_is_used_where_less_would_do():
    tiny = PlannedRun(num_units=10**6, expected_batch_size=1, steps=1)
    found = solve(tiny, target_epsilon=90.0, accountant="rdp")
    assert found.run.noise_multiplier == 0.1
    assert found.epsilon_after(1) <= 90.0


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"noise_multiplier": None}, None, "noise_multiplier must be given; or give target"),
        ({"noise_multiplier": None, "epochs": None}, None, r"noise_multiplier, steps \(or epochs"),
        ({}, 3.0, "exactly one of .* must be left open, got 0 open"),
        ({"noise_multiplier": None, "epochs": None}, 3.0, "must be left open, got 2 open"),
        ({"noise_multiplier": None}, 101.0, "target_epsilon must be finite, > 0 and <= 100"),
        ({"noise_multiplier": None}, 0.0, "target_epsilon must be finite, > 0"),
        ({"noise_multiplier": None, "release_noise": (1.0,)}, 1.0, "target_epsilon must exceed 4"),
        ({"noise_multiplier": 0.3, "epochs": None}, 0.1, "must allow at least 1 step, got 0.1"),
        ({"noise_multiplier": 0.1, "expected_batch_size": None}, 0.1, "an expected_batch_size of"),
        (
            {"expected_batch_size": None, "sampling": "shuffled_unamplified"},
            9.0,
            "expected_batch_size must be given with sampling 'shuffled_unamplified'",
        ),
        ({"noise_multiplier": 1e6, "epochs": None}, 50.0, "must allow fewer than 16777216 step"),
    ],
)
def test_target_that_cannot_be_met_is_refused(settings, target, message):
    with pytest.raises(ValueError, match=f"budget: .*{message}"):
        solve(replace(WHOLE, **settings), target_epsilon=target, **RDP)


# --- delta ---


def test_delta_is_below_one_over_the_number_of_units():
    assert choose_delta(None, 5000, None) == (2e-5, "1 / (10 x 5000 units), as none was given")
    assert choose_delta(1e-4, 5000, None) == (1e-4, "as given")
    delta, rule = choose_delta(0.01, None, None)
    assert delta == 0.01
    assert "unknown" in rule
    assert choose_delta(None, 50, ledger(num_units=200))[0] == 1 / 2000
    for bad in (2e-4, 0.5):
        with pytest.raises(ValueError, match="budget: delta must be < 1 / 5000"):
            choose_delta(bad, 5000, None)
    with pytest.raises(ValueError, match="delta must be < 1 / 200,"):
        choose_delta(0.01, 50, ledger(num_units=200))
    with pytest.raises(ValueError, match="delta must be given where"):
        choose_delta(None, None, None)
    with pytest.raises(ValueError, match="num_units must be >= 1"):
        choose_delta(None, -5, None)


# --- noise ---


@pytest.mark.parametrize(("name", "noise", "factor"), [("count", 2.0, 2), ("histogram", 4.0, 1)])
def test_gradient_and_threshold_share_the_noise_multiplier(name, noise, factor):
    planned = replace(WHOLE, **{f"{name}_noise": noise})
    gradient = planned.gradient_noise_multiplier
    assert gradient**-2 + (factor * noise) ** -2 == pytest.approx(1.5**-2)
    assert gradient > 1.5
    report = solve(planned, **RDP).report()["threshold"]
    assert report[f"{name}_noise"] == noise
    assert report["gradient_share"] == pytest.approx(1 - (1.5 / (factor * noise)) ** 2)


@pytest.mark.parametrize(("name", "least"), [("count_noise", 0.75), ("histogram_noise", 1.5)])
def test_threshold_that_takes_all_is_refused(name, least):
    with pytest.raises(ValueError, match=f"{name} must be > {least} with noise_multiplier 1.5"):
        replace(WHOLE, **{name: least})
    assert replace(WHOLE, **{name: least * 1.01}).gradient_noise_multiplier > 1.5
    with pytest.raises(ValueError, match=f"{name} must be > .* with noise_multiplier"):
        solve(replace(WHOLE, noise_multiplier=None, **{name: 0.01}), target_epsilon=2.0, **RDP)


@pytest.mark.parametrize("weights", ["equal", "proportional", (1.0, 3.0, 0.5)])
@pytest.mark.parametrize("kind", [("gaussian", "l2"), ("gaussian", "l1"), ("laplace", "l1"),
                                  ("laplace", "l2")])  # fmt: skip
def test_group_noise_is_that_of_clip_and_noise(weights, kind):
    bounds, (mechanism, norm) = [0.5, 1.0, 2.0], kind
    planned = replace(
        WHOLE, max_grad_norm=bounds, group_noise_weights=weights, mechanism=mechanism, norm=norm
    )
    truth = reference.clip_and_noise(
        [torch.zeros(0, 1)] * 3,
        max_grad_norm=bounds,
        noise_multiplier=1.5,
        group_noise_weights=weights,
        mechanism=mechanism,
        norm=norm,
        noise=[torch.ones(1)] * 3,
    )
    assert planned.noise_scales() == pytest.approx([float(each) for each in truth.out])


def test_noise_of_one_bound_is_in_the_report():
    report = solve(replace(WHOLE, max_grad_norm=[0.4], count_noise=2.0), **RDP).report()
    gradient = report["threshold"]["gradient_noise_multiplier"]
    assert report["noise"]["scale_on_sum"] == pytest.approx([0.4 * gradient])
    assert report["noise"]["scale_on_mean"] == pytest.approx([0.4 * gradient / 50])
    assert report["noise"]["sensitivity"] == 0.4


def test_pure_epsilon_of_laplace():
    laplace = replace(WHOLE, mechanism="laplace")
    assert laplace.pure_epsilon_of_a_step() == pytest.approx(1 / 1.5)
    assert replace(laplace, norm="l2").pure_epsilon_of_a_step() is None
    clipped = replace(laplace, norm="l2", dimension=10_000)
    assert clipped.pure_epsilon_of_a_step() == pytest.approx(100 / 1.5)
    assert WHOLE.pure_epsilon_of_a_step() is None


# --- with a ledger ---


def test_ledger_counts_toward_the_budget():
    before, event = ledger(num_units=1000), (GAUSSIAN(4.0), 1)
    found = solve(WHOLE, **RDP, ledger=before)
    assert found.epsilon_after(100) == rdp([event, (WHOLE.event(), 100)])
    assert found.epsilon_after(0) == rdp([event])
    assert found.report()["ledger"]["epsilon"] == rdp([event])
    planned = replace(WHOLE, noise_multiplier=None, sampling="shuffled_unamplified")
    alone = solve(planned, target_epsilon=5.0, **RDP)
    beside = solve(planned, target_epsilon=5.0, **RDP, ledger=before)
    assert beside.run.noise_multiplier > alone.run.noise_multiplier
    assert beside.epsilon_after(100) <= 5.0
    assert known_units(before) == 1000


def test_ledger_of_another_unit_is_refused():
    with pytest.raises(PrivacyError, match="privacy_unit must be 'patient' like the ledger's"):
        solve(WHOLE, **RDP, ledger=ledger(unit="patient"))
    patients = replace(WHOLE, privacy_unit="patient")
    assert solve(patients, **RDP, ledger=ledger(unit="patient")).run == patients


def test_ledger_without_guarantee_makes_epsilon_infinite():
    void = ledger(reasons=["seeded noise"])
    report = json.loads(json.dumps(solve(WHOLE, **RDP, ledger=void).report(), allow_nan=False))
    assert report["epsilon"] is None
    assert report["guarantee"] == "none"
    assert [point["epsilon"] for point in report["curve"]] == [None] * 4
    with pytest.raises(PrivacyError, match="the ledger has no guarantee: seeded noise"):
        solve(replace(WHOLE, noise_multiplier=None), target_epsilon=2.0, **RDP, ledger=void)


def test_report_states_unit_adjacency_sampler_accountant_and_delta():
    report = json.loads(json.dumps(solve(WHOLE, accountant="rdp").report(), allow_nan=False))
    stated = {
        "privacy_unit": "sample",
        "adjacency": "add_or_remove_one",
        "sampling": "poisson",
        "sample_rate": 0.05,
        "delta": 1e-4,
        "delta_rule": "1 / (10 x 1000 units), as none was given",
        "guarantee": "(epsilon, delta)",
        "steps": 100,
    }
    assert {name: report[name] for name in stated} == stated
    assert report["accountant"].startswith("RDP, dp-accounting ")
    assert report["epsilon"] == rdp([(WHOLE.event(), 100)])
    assert [point["steps"] for point in report["curve"]] == [25, 50, 75, 100]
    assert report["curve"][0]["epsilon"] == rdp([(WHOLE.event(), 25)])


# --- misuse ---


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"noise_multiplier": 0.09}, ValueError, "noise_multiplier must be finite, >= 0.1"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier must be finite"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier must be a number, got str"),
        ({"steps": 5}, ValueError, "steps and epochs must not both be given"),
        ({"sample_rate": 0.1}, ValueError, "expected_batch_size and sample_rate must not both"),
        ({"expected_batch_size": None, "sample_rate": 1.1}, ValueError, "sample_rate must be fin"),
        ({"epochs": 0}, ValueError, "epochs must be >= 1"),
        ({"epochs": 1.0}, TypeError, "epochs must be an int, got float"),
        ({"expected_batch_size": None, "sample_rate": 1e-300}, ValueError, "steps must be >= 1"),
        ({"num_units": None}, ValueError, "num_units must be given without sample_rate"),
        ({"expected_batch_size": 1001}, ValueError, "expected_batch_size must be <= 1000"),
        ({"privacy_unit": "site"}, ValueError, "privacy_unit must be one of sample, patient"),
        ({"mechanism": "laplacian"}, ValueError, "mechanism must be one of"),
        ({"norm": "l3"}, ValueError, "norm must be one of"),
        ({"sampling": "shuffled"}, ValueError, "sampling must be one of"),
        ({"max_batch_size": 60, "mechanism": "laplace"}, ValueError, "max_batch_size must be left"),
        (
            {"max_batch_size": 60, "sampling": "shuffled_unamplified"},
            ValueError,
            "max_batch_size must be left out",
        ),
        (
            {"max_batch_size": 6, "num_units": None, "expected_batch_size": None,
             "sample_rate": 0.1},
            ValueError,
            "num_units must be given with max_batch_size",
        ),
        ({"count_noise": 3.0, "histogram_noise": 3.0}, ValueError, "count_noise and histogram_n"),
        ({"count_noise": 0.0}, ValueError, "count_noise must be finite, > 0"),
        ({"count_noise": 3.0, "mechanism": "laplace"}, ValueError, "count_noise must be left out"),
        ({"count_noise": 3.0, "max_grad_norm": [1.0, 1.0]}, ValueError, "count_noise must be left"),
        ({"release_noise": [0.0]}, ValueError, "release_noise must be finite, >= 0.1"),
        ({"max_grad_norm": [0.0]}, ValueError, "max_grad_norm must be finite"),
        (
            {"max_grad_norm": [1.0], "group_noise_weights": "proportional"},
            ValueError,
            "group_noise_weights must be left out without several bounds",
        ),
        (
            {"max_grad_norm": [1.0, 2.0], "group_noise_weights": "inverse"},
            ValueError,
            "group_noise_weights must be one of equal, proportional",
        ),
        (
            {"max_grad_norm": [1.0, 2.0], "group_noise_weights": [1.0]},
            ValueError,
            "group_noise_weights must hold one number for each of the 2 bounds",
        ),
        (
            {"max_grad_norm": [1.0, 2.0], "group_noise_weights": [1.0, 0.0]},
            ValueError,
            "group_noise_weights must be finite",
        ),
        ({"dimension": 100}, ValueError, "dimension must be left out"),
        ({"dimension": 100, "mechanism": "laplace"}, ValueError, "dimension must be left out"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=f"budget: {message}"):
        replace(WHOLE, **settings)


def test_accountant_must_be_known():
    with pytest.raises(ValueError, match="budget: accountant must be one of pld, rdp, got 'prv'"):
        solve(WHOLE, accountant="prv")


def test_open_setting_has_no_value():
    for value in (lambda: run().event(1.0), lambda: run(sample_rate=0.1).num_steps):
        with pytest.raises(ValueError, match="left open has no value"):
            value()
