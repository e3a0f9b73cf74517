"""Adaptive thresholds: where they go, what they cost, what they release."""

import math

import pytest
import torch

import dpfast
from dpfast import NoiseSource, NoisyHistogram, PercentilePaper, PrivateQuantile
from dpfast.privacy.accounting import TrainingStep, epsilon
from dpfast.privacy.thresholds import make_statistic
from tests.privacy.helpers import loader_of, make, train, vectors

DELTA = 1e-5


def lognormal(count, seed=0):
    """Norms whose percentile p is exp(0.5 * normal quantile of p)."""
    return (0.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()).exp()


@pytest.mark.parametrize(
    ("settings", "z", "batch", "noise", "gradient"),
    [
        # z_delta = (z^-2 - (2 s)^-2)^(-1/2)
        (PrivateQuantile(count_noise=1.0), 1.0, 64, 1.0, (1 - 1 / 4) ** -0.5),
        (PrivateQuantile(count_noise=5.0), 1.0, 64, 5.0, (1 - 1 / 100) ** -0.5),
        (PrivateQuantile(), 1.0, 1000, 50.0, (1 - 1e-4) ** -0.5),  # m / 20
        (PrivateQuantile(), 1.0, 10, 2.0, (1 - 1 / 16) ** -0.5),  # 2 z
        # z_t = (z^-2 - s^-2)^(-1/2)
        (NoisyHistogram(bin_noise=2.0), 1.0, 64, 2.0, (1 - 1 / 4) ** -0.5),
        (NoisyHistogram(), 0.5, 10, 2.0, 0.5 * (1 - 1 / 16) ** -0.5),
    ],
)
def test_budget_is_split_as_the_papers_say(settings, z, batch, noise, gradient):
    statistic = make_statistic(settings, 1.0, z, batch)
    assert statistic.noise == pytest.approx(noise)
    assert statistic.gradient_noise_multiplier == pytest.approx(gradient)
    # Together they are one Gaussian mechanism of multiplier z.
    other = statistic.noise / statistic.sensitivity
    together = (statistic.gradient_noise_multiplier**-2 + other**-2) ** -0.5
    assert together == pytest.approx(z)
    description = statistic.description()
    assert description["gradient_noise_multiplier"] == statistic.gradient_noise_multiplier
    assert description[statistic.noise_name] == statistic.noise


@pytest.mark.parametrize(
    "settings", [PrivateQuantile(count_noise=1.0), NoisyHistogram(bin_noise=1.0, num_bins=8)]
)
@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.3, 1.0, 5.0, 1e30, math.inf, math.nan])
def test_one_unit_moves_the_statistic_by_its_sensitivity_at_most(settings, norm):
    statistic = make_statistic(settings, 1.0, 0.5, 10)
    rest = lognormal(7)
    with_it = statistic.count(torch.cat([rest, torch.tensor([norm]).double()]))
    moved = with_it - statistic.count(rest)
    assert with_it.shape == (statistic.size,)
    assert float(moved.norm()) == statistic.sensitivity


@pytest.mark.parametrize("settings", [PrivateQuantile, NoisyHistogram])
@pytest.mark.parametrize("percentile", [20.0, 50.0, 90.0])
@pytest.mark.parametrize("initial", [0.05, 20.0])
def test_threshold_converges_to_the_percentile_of_a_known_distribution(
    settings, percentile, initial
):
    batch = 200
    statistic = make_statistic(settings(target_percentile=percentile), initial, 1.0, batch)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(200):
        norms = lognormal(batch, seed=step)
        noise = statistic.noise * torch.randn(statistic.size, generator=generator).double()
        statistic.update(statistic.count(norms) + noise)
        found.append(float(statistic.bound))
    target = math.exp(0.5 * float(torch.special.ndtri(torch.tensor(percentile / 100))))
    late = torch.tensor(found[-50:]).log().mean().exp()
    assert float(late) == pytest.approx(target, rel=0.1)
    assert abs(found[0] - target) > 0.3 * target  # it started elsewhere


def test_threshold_stays_within_its_public_limits():
    statistic = make_statistic(PrivateQuantile(lower=0.5, upper=2.0), 1.0, 1.0, 10)
    for _ in range(50):
        statistic.update(torch.tensor([-1e6]).double())
    assert float(statistic.bound) == 2.0
    for _ in range(50):
        statistic.update(torch.tensor([1e6]).double())
    assert float(statistic.bound) == 0.5


def test_histogram_without_any_mass_keeps_the_threshold():
    statistic = make_statistic(NoisyHistogram(), 1.0, 1.0, 10)
    statistic.update(-torch.ones(40).double())
    assert float(statistic.bound) == 1.0


def test_counts_are_noised_at_the_stated_scale():
    """Empty batches: the threshold's logarithm moves by noise alone."""
    settings = PrivateQuantile(target_percentile=50.0, learning_rate=0.2, count_noise=3.0)
    engine, model, optimizer, loader = make(
        loader_of(vectors(8), batch_size=4), threshold=settings, sample_rate=1e-3
    )
    # The expected batch of 0.008 units makes every step a large one: undo it.
    steps, logs = 0, []
    bound = engine._steps.statistic.bound
    engine._steps.statistic.lower, engine._steps.statistic.upper = 1e-300, 1e300
    while steps < 400:
        for (x,) in loader:
            if len(x):
                model(x)[:, 0].sum().backward()
            engine._steps.statistic.bound = bound
            optimizer.step()
            steps += 1
            logs.append(math.log(float(engine._steps.statistic.bound)))
            if steps == 400:
                break
    noise = torch.tensor(logs).double() / -0.2 * 0.008
    # Five standard errors of a standard deviation from 400 draws: 18 %.
    assert float(noise.std()) == pytest.approx(3.0, rel=0.18)
    assert abs(float(noise.mean())) < 5 * 3.0 / 20


@pytest.mark.parametrize("settings", [PrivateQuantile(), NoisyHistogram()])
def test_accountant_is_told_the_whole_multiplier_and_the_gradient_gets_its_share(settings):
    z, width = 0.8, 20_000
    engine, model, optimizer, loader = make(
        loader_of(vectors(8, width), batch_size=4), threshold=settings, noise_multiplier=z,
        sample_rate=1e-9, max_grad_norm=2.0, loss_reduction="sum",
        model=torch.nn.Linear(width, 1, bias=False),
    )  # fmt: skip
    statistic = engine._steps.statistic
    iterator = iter(loader)
    next(iterator)
    optimizer.step()
    found = float(model.weight.grad.std())
    assert found == pytest.approx(2.0 * statistic.gradient_noise_multiplier, rel=0.03)
    event = TrainingStep(z, 1e-9, 8).event()
    assert engine.get_epsilon(DELTA) == epsilon([(event, 1)], DELTA)


@pytest.mark.parametrize("settings", [PrivateQuantile(), NoisyHistogram()])
@pytest.mark.parametrize("physical_batch_size", [None, 7])
def test_threshold_follows_the_norms_of_a_run(settings, physical_batch_size):
    x = vectors(400, seed=1) * torch.linspace(1, 3, 400)[:, None]
    engine, model, optimizer, loader = make(
        loader_of(x, batch_size=100), threshold=settings, max_grad_norm=0.02,
        physical_batch_size=physical_batch_size,
    )  # fmt: skip
    train(model, optimizer, loader, epochs=25)
    target = float(x.norm(dim=1).median())
    assert engine.max_grad_norm == pytest.approx(target, rel=0.3)
    assert engine.steps == 100


def test_percentile_paper_has_no_guarantee_and_a_conditional_epsilon():
    engine, model, optimizer, loader = make(
        loader_of(vectors(20), batch_size=10), threshold=PercentilePaper(60.0)
    )
    train(model, optimizer, loader)
    event = TrainingStep(1.0, 0.5, 20).event()
    report = engine.report(DELTA)
    assert engine.get_epsilon(DELTA) == math.inf
    assert report["guarantee"] == "none"
    assert report["reasons"] == [
        "percentile_paper: the threshold is taken from private data without noise"
    ]
    assert report["conditional_epsilon"] == epsilon([(event, 2)], DELTA)


def test_percentile_paper_is_the_percentile_of_the_batch():
    x = vectors(11) * torch.arange(1.0, 12.0)[:, None]
    _, model, optimizer, loader = make(
        loader_of(x, batch_size=11), threshold=PercentilePaper(30.0), noise_multiplier=0.0,
        loss_reduction="sum",
    )  # fmt: skip
    (grad,) = train(model, optimizer, loader)
    want = dpfast.clip_and_noise(
        x[:, None], max_grad_norm=None, percentile=30.0, noise_multiplier=0.0, return_stats=True,
        noise=NoiseSource(0),
    )[0]  # fmt: skip
    torch.testing.assert_close(grad, want)


def test_percentile_paper_outlives_empty_batches():
    engine, model, optimizer, loader = make(
        loader_of(vectors(20), batch_size=2), threshold=PercentilePaper(), sample_rate=0.05
    )
    grads = train(model, optimizer, loader, epochs=3)
    assert engine.steps == 60
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"threshold": "quantile"}, TypeError, "threshold must be None, PrivateQuantile"),
        ({"threshold": PrivateQuantile(0.0)}, ValueError, "target_percentile must be"),
        ({"threshold": PrivateQuantile(100.0)}, ValueError, "target_percentile must be < 100"),
        ({"threshold": PrivateQuantile(count_noise=0.5)}, ValueError, "count_noise must be > 0.5"),
        ({"threshold": PrivateQuantile(learning_rate=0)}, ValueError, "learning_rate must be"),
        ({"threshold": PrivateQuantile(lower=2.0)}, ValueError, "between lower and upper"),
        ({"threshold": NoisyHistogram(bin_noise=1.0)}, ValueError, "bin_noise must be > 1"),
        ({"threshold": NoisyHistogram(num_bins=1)}, ValueError, "num_bins must be in"),
        ({"threshold": NoisyHistogram(num_bins=2.5)}, TypeError, "num_bins must be an int"),
        ({"threshold": NoisyHistogram(memory=1.0)}, ValueError, "memory must be"),
        ({"threshold": PercentilePaper(101.0)}, ValueError, "percentile must be"),
        (
            {"threshold": PercentilePaper(), "physical_batch_size": 2},
            ValueError,
            "whole batch at once",
        ),
        (
            {"threshold": PrivateQuantile(), "mechanism": "laplace"},
            ValueError,
            "must be None or PercentilePaper with mechanism 'laplace'",
        ),
        (
            {"threshold": PrivateQuantile(), "clipping": "normalized"},
            ValueError,
            "threshold must be None with clipping 'normalized'",
        ),
        (
            {"threshold": PrivateQuantile(), "max_grad_norm": [1.0]},
            TypeError,
            "max_grad_norm must be a number",
        ),
    ],
)
def test_thresholds_that_cannot_be_private_are_refused(settings, error, message):
    engine = dpfast.PrivacyEngine()
    with pytest.raises(error, match=message):
        make(loader_of(vectors(8)), engine=engine, **settings)
    assert engine.ledger.mechanisms == ()
