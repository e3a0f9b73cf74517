"""The noise's distribution. Every test must also reject noise scaled by 2/3 and by 3/2.

The seed is fixed, so these tests give the same answer every time; a failure probability is that
of a fresh key, per test case.
"""

import math

import pytest
import torch

from dpfast import NoiseSource, clip_and_noise

stats = pytest.importorskip("scipy.stats", reason="the exact distributions come from SciPy")

pytestmark = pytest.mark.statistical

COUNT = 1 << 21
SIGMAS = 5.0  # two-sided failure probability 5.7e-7
WRONG_SCALES = (2 / 3, 3 / 2)
DTYPES = (torch.float32, torch.float64)
DISTRIBUTIONS = {"gaussian": stats.norm, "laplace": stats.laplace}
# Variance, E|x|, and kurtosis E x^4 / (E x^2)^2.
MOMENTS = {
    "gaussian": (1.0, math.sqrt(2 / math.pi), 3.0),
    "laplace": (2.0, 1.0, 6.0),
}


@pytest.fixture(scope="module")
def samples():
    """Two tensors of noise at each of two steps, per mechanism, dtype and device: drawn once."""
    drawn = {}

    def get(mechanism, dtype, device):
        key = (mechanism, dtype, device)
        if key not in drawn:
            source = NoiseSource(2024)
            empty = [torch.zeros(0, COUNT, dtype=dtype, device=device) for _ in range(2)]
            drawn[key] = [
                out.cpu().double()
                for _ in range(2)
                for out in clip_and_noise(
                    empty,
                    max_grad_norm=1.0,
                    noise_multiplier=1.0,
                    mechanism=mechanism,
                    norm="l2",
                    noise=source,
                )
            ]
        return drawn[key]

    return get


def _accepts_mean(x, expected, std):
    """Whether the mean of x is within SIGMAS standard errors of what it should be."""
    return abs(float(x.mean()) - expected) < SIGMAS * std / math.sqrt(len(x))


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_mean_is_zero(mechanism, dtype, samples, device):
    for x in samples(mechanism, dtype, device):
        assert _accepts_mean(x, 0.0, math.sqrt(MOMENTS[mechanism][0]))
        assert _accepts_mean(x.sign(), 0.0, 1.0)


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_variance_is_right_and_other_scales_are_rejected(mechanism, dtype, samples, device):
    variance, absolute, kurtosis = MOMENTS[mechanism]
    for x in samples(mechanism, dtype, device):
        for scale in (1.0, *WRONG_SCALES):
            y = x * scale
            # Var(x^2) = (kurtosis - 1) variance^2, Var|x| = variance - (E|x|)^2.
            square = _accepts_mean(y.square(), variance, math.sqrt(kurtosis - 1) * variance)
            size = _accepts_mean(y.abs(), absolute, math.sqrt(variance - absolute**2))
            assert square == size == (scale == 1.0)


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_fourth_moment_is_right_and_other_scales_are_rejected(
    mechanism, dtype, samples, device
):
    variance, _, kurtosis = MOMENTS[mechanism]
    eighth = 105.0 if mechanism == "gaussian" else math.factorial(8)
    fourth = kurtosis * variance**2
    for x in samples(mechanism, dtype, device):
        for scale in (1.0, *WRONG_SCALES):
            accepted = _accepts_mean((x * scale) ** 4, fourth, math.sqrt(eighth - fourth**2))
            assert accepted == (scale == 1.0)


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_tails_have_the_right_weight_and_other_scales_are_rejected(
    mechanism, dtype, samples, device
):
    # Beyond 3, 4 and 5 (and 10 for Laplace) scales, each side; p < 1e-7 rejects, 4 tensors.
    distribution = DISTRIBUTIONS[mechanism]
    for limit in (3.0, 4.0, 5.0) if mechanism == "gaussian" else (3.0, 5.0, 10.0):
        chance = float(distribution.sf(limit))
        for scale in (1.0, *WRONG_SCALES):
            above = below = 0
            for x in samples(mechanism, dtype, device):
                above += int((x * scale > limit).sum())
                below += int((x * scale < -limit).sum())
            fair = [
                stats.binomtest(k, 4 * COUNT, p).pvalue > 1e-7
                for k, p in ((above, chance), (below, chance), (above + below, 2 * chance))
            ]
            if scale == 1.0:
                assert all(fair)
            elif 4 * COUNT * chance > 30:  # beyond 5 sigma 2 in 8 million are expected each side
                assert not any(fair)
            elif scale > 1.0:
                assert not fair[2]


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_distribution_passes_kolmogorov_smirnov_and_other_scales_fail(
    mechanism, dtype, samples, device
):
    distribution = DISTRIBUTIONS[mechanism]
    x = samples(mechanism, dtype, device)[0].numpy()
    # p < 1e-6 rejects.
    assert stats.kstest(x, distribution.cdf, method="asymp").pvalue > 1e-6
    for scale in WRONG_SCALES:
        assert stats.kstest(x * scale, distribution.cdf, method="asymp").pvalue < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_distribution_passes_kolmogorov_smirnov_in_the_tail(dtype, samples, device):
    # Given |x| > 2 the distribution is the truncated one: at least 380,000 of all four tensors.
    for mechanism, distribution in DISTRIBUTIONS.items():
        x = torch.cat(samples(mechanism, dtype, device)).abs().numpy()
        tail = x[x > 2.0]
        weight = distribution.sf(2.0)

        def cdf(v, weight=weight, distribution=distribution):
            return 1.0 - distribution.sf(v) / weight

        assert stats.kstest(tail, cdf, method="asymp").pvalue > 1e-6
        for scale in WRONG_SCALES:
            wrong = x * scale
            wrong = wrong[wrong > 2.0]
            assert stats.kstest(wrong, cdf, method="asymp").pvalue < 1e-6


# 16 separates the cosine and the sine of one pair, 32 neighbouring pairs of a block, 256 the
# groups of blocks, 4096 the chunks.
@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lag", [1, 2, 8, 16, 32, 256, 4096])
def test_noise_elements_are_uncorrelated_in_value_and_size(mechanism, dtype, lag, samples, device):
    for x in samples(mechanism, dtype, device)[:2]:
        for f in (lambda v: v, torch.abs, torch.square):
            y = f(x)
            y = (y - y.mean()) / y.std()
            # The product of two independent unit variates has variance 1.
            assert _accepts_mean(y[lag:] * y[:-lag], 0.0, 1.0)


@pytest.mark.parametrize("mechanism", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_tensors_and_steps_is_uncorrelated(mechanism, dtype, samples, device):
    streams = samples(mechanism, dtype, device)
    for i, a in enumerate(streams):
        for b in streams[:i]:
            for f in (lambda v: v, torch.abs):
                x, y = f(a), f(b)
                product = (x - x.mean()) * (y - y.mean()) / (x.std() * y.std())
                assert _accepts_mean(product, 0.0, 1.0)


def test_noise_pair_angle_is_uniform_and_independent_of_the_radius(samples, device):
    x = samples("gaussian", torch.float32, device)[0].reshape(-1, 8, 2, 16)
    cosine, sine = x[:, :, 0].flatten(), x[:, :, 1].flatten()
    angle = torch.atan2(sine, cosine)
    square = cosine.square() + sine.square()
    uniform = stats.kstest(angle.numpy() / (2 * math.pi) + 0.5, "uniform", method="asymp")
    assert uniform.pvalue > 1e-6
    assert stats.kstest(square.numpy() / 2, "expon", method="asymp").pvalue > 1e-6
    for harmonic in (1, 2, 4):
        assert _accepts_mean((square / 2 - 1) * torch.cos(harmonic * angle), 0.0, math.sqrt(0.5))
