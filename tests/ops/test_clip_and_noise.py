"""clip_and_noise against its float64 twin, noise included: rules, norms, dtypes, groups."""

import itertools

import pytest
import torch

from dpfast import NoiseSource, clip_and_noise, reference
from tests import tolerances
from tests.helpers import (
    DTYPES,
    RULES,
    allowed_error,
    check_against_twin,
    check_close,
    make_grads,
)

NOISES = (("gaussian", 0.7), ("laplace", 0.3), ("none", 0.0))
GROUPED = {"equal": "equal", "proportional": "proportional", "explicit": [0.5, 2.0, 1.0, 3.0, 0.1]}
BOUNDS = [0.4, 0.01, 0.9, 2.0, 0.7]


def _bound(rule):
    return 1.0 if rule == "normalized" else 0.8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mechanism", "multiplier"), NOISES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_clip_and_noise_equals_twin_with_one_bound(
    rule, dtype, mechanism, multiplier, norm, device
):
    grads = make_grads(7, dtype=dtype, device=device)
    check_against_twin(
        grads,
        max_grad_norm=_bound(rule),
        noise_multiplier=multiplier,
        mechanism=mechanism,
        norm=norm,
        clipping=rule,
    )


@pytest.mark.parametrize("rule", ["automatic", "normalized", "psac"])
@pytest.mark.parametrize("stability", [1e-6, 0.5, 30.0])
def test_clip_and_noise_equals_twin_with_stability_constant(rule, stability, device):
    check_against_twin(
        make_grads(7, device=device),
        max_grad_norm=_bound(rule),
        noise_multiplier=0.5,
        clipping=rule,
        stability_constant=stability,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_and_noise_equals_twin_with_custom_weights(dtype, device):
    weights = torch.tensor([0.0, 0.3, -2.0, 1e30, -1e30, float("nan"), float("inf"), 1e-30])
    check_against_twin(
        make_grads(8, dtype=torch.float64, device=device),
        max_grad_norm=0.5,
        noise_multiplier=0.2,
        clipping=weights.to(dtype).to(device),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", GROUPED)
@pytest.mark.parametrize(("mechanism", "multiplier"), NOISES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_clip_and_noise_equals_twin_with_one_bound_per_tensor(
    rule, weights, mechanism, multiplier, norm, device
):
    bounds = [1.0] * len(BOUNDS) if rule == "normalized" else BOUNDS
    check_against_twin(
        make_grads(6, device=device),
        max_grad_norm=bounds,
        noise_multiplier=multiplier,
        mechanism=mechanism,
        norm=norm,
        clipping=rule,
        group_noise_weights=GROUPED[weights],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["equal", "proportional"])
def test_clip_and_noise_equals_twin_with_bounds_in_a_tensor(dtype, weights, device):
    grads = make_grads(6, device=device)
    check_against_twin(
        grads,
        max_grad_norm=torch.tensor(BOUNDS, dtype=dtype, device=device),
        noise_multiplier=0.4,
        group_noise_weights=weights,
    )
    check_against_twin(
        grads,
        max_grad_norm=torch.tensor(0.3, dtype=dtype, device=device),
        noise_multiplier=0.4,
    )


def test_clip_and_noise_equals_twin_with_custom_weights_per_group(device):
    check_against_twin(
        make_grads(4, device=device),
        max_grad_norm=BOUNDS,
        noise_multiplier=0.2,
        clipping=torch.tensor([0.1, 5.0, -3.0, 1.0], device=device),
    )


@pytest.mark.parametrize("percentile", [0.0, 12.5, 50, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("rule", ["flat", "automatic", "auto_v", "psac"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_clip_and_noise_equals_twin_with_percentile(percentile, rule, norm, device):
    grads = make_grads(9, device=device)
    grads[0][4] = float("inf")  # the percentile is that of the finite norms
    _, stats = check_against_twin(
        grads,
        max_grad_norm=None,
        percentile=percentile,
        noise_multiplier=0.3,
        clipping=rule,
        norm=norm,
    )
    assert not stats.guarantee.holds
    finite = stats.sensitive_norms[stats.sensitive_norms.isfinite()].cpu()
    torch.testing.assert_close(
        stats.max_grad_norm.cpu(),
        torch.quantile(finite, percentile / 100.0),
        rtol=tolerances.NORM_RELATIVE,
        atol=0.0,
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_clip_and_noise_percentile_of_few_norms_is_theirs(rows, device):
    check_against_twin(
        make_grads(rows, device=device), max_grad_norm=None, percentile=70, noise_multiplier=0.3
    )


def test_clip_and_noise_percentile_without_finite_norms_gives_nan(device):
    grads = [torch.full((3, 5), float("nan"), device=device)]
    out, stats = clip_and_noise(
        grads, max_grad_norm=None, percentile=50, noise_multiplier=1.0, return_stats=True
    )
    assert out[0].isnan().all()
    assert stats.max_grad_norm.isnan()
    assert not stats.guarantee.holds


IDS = torch.tensor([7, -3, 2**62, 7, 7, -(2**63), 2**62, 0, -3, 7])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rule", ["flat", "automatic", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clip_and_noise_equals_twin_with_privacy_units(reduction, rule, dtype, device):
    _, stats = check_against_twin(
        make_grads(10, dtype=dtype, device=device),
        max_grad_norm=0.8,
        noise_multiplier=0.5,
        clipping=rule,
        privacy_unit_ids=IDS.to(device),
        unit_reduction=reduction,
    )
    assert stats.sensitive_norms.shape == (10,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clip_and_noise_equals_twin_with_privacy_units_in_groups(reduction, device):
    check_against_twin(
        make_grads(10, device=device),
        max_grad_norm=BOUNDS,
        noise_multiplier=0.5,
        privacy_unit_ids=IDS.to(device),
        unit_reduction=reduction,
        norm="l1",
    )


def test_clip_and_noise_equals_twin_with_privacy_units_and_percentile(device):
    check_against_twin(
        make_grads(10, device=device),
        max_grad_norm=None,
        percentile=40,
        noise_multiplier=0.5,
        privacy_unit_ids=IDS.to(device),
    )


def test_clip_and_noise_equals_twin_with_custom_weights_of_units(device):
    check_against_twin(
        make_grads(10, device=device),
        max_grad_norm=0.8,
        noise_multiplier=0.5,
        clipping=torch.tensor([0.1, 5.0, -3.0, 1.0, 0.7], device=device),
        privacy_unit_ids=IDS.to(device),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_units", [False, True])
def test_clip_and_noise_equals_twin_with_given_norms(dtype, grouped, with_units, device):
    grads = make_grads(10, device=device)
    settings = {
        "max_grad_norm": BOUNDS if grouped else 0.8,
        "noise_multiplier": 0.5,
        "privacy_unit_ids": IDS.to(device) if with_units else None,
    }
    norms = reference.clip_and_noise(grads, **{**settings, "noise_multiplier": 0.0}).norms
    norms = norms.to(dtype).to(device)
    check_against_twin(grads, norms=norms if grouped else norms[0], **settings)


@pytest.mark.parametrize("size", [1, 32, 0.125, 1e-3])
def test_clip_and_noise_equals_twin_with_expected_batch_size(size, device):
    check_against_twin(
        make_grads(5, device=device),
        max_grad_norm=0.8,
        noise_multiplier=0.5,
        expected_batch_size=size,
    )


def test_clip_and_noise_equals_twin_with_mixed_dtypes(device):
    grads = [
        grad
        for index, dtype in enumerate(DTYPES)
        for grad in make_grads(5, [(300,)], dtype=dtype, seed=index, device=device)
    ]
    check_against_twin(grads, max_grad_norm=0.8, noise_multiplier=0.5)
    check_against_twin(grads, max_grad_norm=[0.1, 0.2, 0.3, 0.4], noise_multiplier=0.5)


def test_clip_and_noise_adds_to_out_with_accumulate(device):
    grads = make_grads(5, device=device)
    start = make_grads(1, seed=5, device=device)
    start = [s[0].contiguous() for s in start]
    out = [s.clone() for s in start]
    source = NoiseSource(4)
    result = clip_and_noise(
        grads, max_grad_norm=0.5, noise_multiplier=0.6, out=out, accumulate=True, noise=source
    )
    assert all(r is o for r, o in zip(result, out, strict=True))
    noise = [
        reference.standard_noise(reference.seed_key(4), 0, k, "gaussian", s.numel())
        for k, s in enumerate(start)
    ]
    expected = reference.clip_and_noise(
        grads, max_grad_norm=0.5, noise_multiplier=0.6, start=start, noise=noise
    )
    check_close(out, expected.out, allowed_error(grads, expected, noise, {"start": start}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("last", ["full", "empty"])
def test_clip_and_noise_accumulated_over_physical_batches_equals_one_batch(dtype, last, device):
    grads = make_grads(12, dtype=dtype, device=device)
    cuts = [0, 5, 6, 12] if last == "full" else [0, 5, 12, 12]
    out = [torch.zeros(g.shape[1:], dtype=dtype, device=device) for g in grads]
    for begin, end in itertools.pairwise(cuts[:-1]):
        part = [g[begin:end] for g in grads]
        clip_and_noise(
            part,
            max_grad_norm=0.5,
            noise_multiplier=0.0,
            mechanism="none",
            out=out,
            accumulate=True,
        )
    settings = {"max_grad_norm": 0.5, "noise_multiplier": 0.7, "expected_batch_size": 10.0}
    clip_and_noise(
        [g[cuts[-2] :] for g in grads], out=out, accumulate=True, noise=NoiseSource(8), **settings
    )
    whole = clip_and_noise(grads, noise=NoiseSource(8), **settings)
    # Each of the three calls rounds a sum of at most 12 * 0.5 once, then divides by 10.
    rounding = 4 * tolerances.OUTPUT_ROUNDING[dtype] * (12 * 0.5 + 0.7 * 0.5 * 10) / 10.0
    for a, b in zip(out, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=rounding)


def test_clip_and_noise_second_call_takes_next_step(device):
    grads = make_grads(0, [(700,)], device=device)
    source = NoiseSource(21)
    for step in range(3):
        out = clip_and_noise(grads, max_grad_norm=1.0, noise_multiplier=1.0, noise=source)
        exact = reference.standard_noise(reference.seed_key(21), step, 0, "gaussian", 700)
        error = tolerances.NOISE_SINGLE * exact.abs().clamp(min=1.0) * 1.01
        assert ((out[0].cpu().double() - exact).abs() <= error).all()
    assert source.step == 3
