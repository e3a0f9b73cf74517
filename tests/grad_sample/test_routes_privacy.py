"""What every route promises: norms, sensitivity, no part for records that are not finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dpfast
from dpfast.grad_sample._deferred import _rounded_down
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    assert_close,
    by_route,
    clipped_sum,
    energy,
    forced,
    mixed_batch,
    mixed_net,
    norms_of,
    one_at_a_time,
    random,
    randomise,
    scaled_energy,
    sizes_of,
)

BOUNDED = ("flat", "automatic", "auto_v", "normalized", "psac", "own weights", "groups", "units")
ROUNDING = 1e-5


def weighted_grads(route, model, x, start):
    """With the gradient of the losses that backward starts from."""
    with forced(route), dpfast.per_sample_gradients(model) as grads:
        energy(model, x).backward(start)
    return grads


# --- norms ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("route", Route)
def test_norms_are_the_true_ones(route, dtype):
    model, x = mixed_net(), mixed_batch()
    truth = norms_of(one_at_a_time(model, lambda m, x, s: energy(m, x) * s, x, sizes_of(len(x))))
    grads = by_route(route, model.to(dtype), scaled_energy, x.to(dtype))
    norms = clipped_sum(grads, return_stats=True)[1].sensitive_norms
    assert norms.dtype == torch.float64
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert torch.allclose(norms, truth, rtol=tolerance, atol=0.0)


# --- sensitivity ---


def rule_settings(rule, grads, bound, batch_size):
    """What a rule needs, and the bound on what one unit adds."""
    if rule == "normalized":
        return {"clipping": rule}, 1.0
    if rule == "own weights":
        weights = torch.logspace(-3, 12, batch_size, dtype=torch.float64)
        return {"clipping": weights, "max_grad_norm": bound}, bound
    if rule == "groups":
        bounds = {name: bound * 2.0**-k for k, name in enumerate(grads)}
        return {"max_grad_norm": bounds}, math.hypot(*bounds.values())
    if rule == "units":
        ids = torch.arange(batch_size)
        return {"privacy_unit_ids": ids, "max_grad_norm": bound}, bound
    return {"clipping": rule, "max_grad_norm": bound}, bound


def flat(sums):
    return torch.cat([value.double().flatten() for value in sums.values()])


def without(settings, row):
    """The settings of a call that lacks one row."""
    return {
        name: torch.cat([value[:row], value[row + 1 :]]) if torch.is_tensor(value) else value
        for name, value in settings.items()
    }


@pytest.mark.parametrize("rule", BOUNDED)
@pytest.mark.parametrize("route", Route)
def test_removing_a_record_moves_the_sum_by_no_more_than_the_bound(route, rule):
    model = mixed_net(torch.float32)
    x = mixed_batch(5, dtype=torch.float32)
    # One record of a huge gradient, one of a tiny one.
    start = torch.tensor([1.0, 1e12, 0.1, 1e-9, 3.0])
    grads = weighted_grads(route, model, x, start)
    settings, bound = rule_settings(rule, grads, 0.1, len(x))
    whole = flat(clipped_sum(grads, **settings))
    moved = []
    for row in range(len(x)):
        rest = [k for k in range(len(x)) if k != row]
        others = weighted_grads(route, model, x[rest], start[rest])
        part = flat(clipped_sum(others, **without(settings, row)))
        moved.append(float((whole - part).norm()))
    assert max(moved) <= bound * (1 + ROUNDING)
    # The huge record is clipped, not dropped.
    assert moved[1] >= 0.99 * bound


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("route", Route)
def test_lone_record_of_any_size_has_the_bound_for_its_norm(route, size):
    model, x = mixed_net(torch.float32), mixed_batch(1, dtype=torch.float32)
    grads = weighted_grads(route, model, x, torch.tensor([size]))
    moved = float(flat(clipped_sum(grads, clipping="auto_v", max_grad_norm=0.5)).norm())
    assert 0.5 * (1 - ROUNDING) <= moved <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv1d])
@pytest.mark.parametrize("route", Route)
def test_lone_record_under_autocast_adds_no_more_than_the_bound(route, layer):
    # Norms of products rounded to bfloat16 would be wrong by up to 2^-9.
    model = layer(1, 1, *[1] * (layer is nn.Conv1d), bias=False)
    nn.init.ones_(model.weight)

    def loss_of(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.float().square().flatten(1).sum(1)

    for seed in range(16):
        x = random(1, 1, 3, seed=seed, dtype=torch.float32)
        x = x if isinstance(model, nn.Conv1d) else x.mT
        grads = by_route(route, model, loss_of, x)
        moved = float(clipped_sum(grads, max_grad_norm=1e-3)["weight"].double().norm())
        assert moved <= 1e-3 * (1 + ROUNDING)


@pytest.mark.parametrize("route", Route)
def test_common_mode_record_adds_no_more_than_the_bound(route):
    # DP_SPEC, floating point: the terms of gradient and norm cancel to a thousandth.
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(1, 256, 8, generator=generator)
    grad_output = torch.randn(1, 256, 8, generator=generator)
    grad_output -= grad_output.mean(1, keepdim=True)
    grads = by_route(route, nn.Linear(8, 8), lambda m, x: (m(x) * grad_output).flatten(1).sum(1), x)
    truth = (grad_output.double().mT @ x.double()).norm()
    stats = clipped_sum(grads, return_stats=True)[1]
    # Direct norms are those of a float32 gradient; 5e-5 at 2048 positions.
    assert float(stats.sensitive_norms[0]) >= float(truth) * (1 - 5e-5)
    moved = flat(clipped_sum(grads, max_grad_norm=1.0)).norm()
    assert moved <= 1 + 5e-5


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.0, 1e300), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_weights_are_never_rounded_up(values, dtype):
    weights = torch.tensor([*values, 0.0, 0.1, 1.0, 3e38, 1e39, 1e-40, 1e-50], dtype=torch.float64)
    rounded = _rounded_down(weights, dtype)
    assert rounded.dtype == dtype
    assert (rounded.double() <= weights).all()
    assert (rounded >= 0).all()
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    assert (above.double() > weights).all(), "rounded by more than one place"


# --- records that are not finite ---

BAD = [math.nan, math.inf, -math.inf]


def check_dropped(found, stats, expected, norms, row):
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-9 if value.dtype == torch.float64 else 1e-5)
    assert int(stats.sensitive_num_nonfinite) == 1
    assert not stats.sensitive_norms[row].isfinite()
    rest = [k for k in range(len(stats.sensitive_norms)) if k != row]
    assert torch.allclose(stats.sensitive_norms[rest], norms, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("route", Route)
def test_record_with_a_bad_input_adds_exactly_nothing(route, bad, dtype):
    model, x = mixed_net(dtype), mixed_batch(4, dtype=dtype)
    x[1, 1, 2, 3] = bad
    grads = by_route(route, model, energy, x)
    rest = by_route(route, model, energy, x[[0, 2, 3]])
    for more in ({}, {"clipping": "automatic"}, {"clipping": "auto_v"}):
        expected, stats = clipped_sum(rest, **more, return_stats=True)
        check_dropped(
            *clipped_sum(grads, **more, return_stats=True), expected, stats.sensitive_norms, 1
        )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("route", Route)
def test_record_with_a_bad_output_gradient_alone_adds_exactly_nothing(route, bad):
    model, x = mixed_net(torch.float32), mixed_batch(4, dtype=torch.float32)
    start = torch.tensor([1.0, 1.0, bad, 1.0])
    grads = weighted_grads(route, model, x, start)
    expected, stats = clipped_sum(by_route(route, model, energy, x[[0, 1, 3]]), return_stats=True)
    check_dropped(*clipped_sum(grads, return_stats=True), expected, stats.sensitive_norms, 2)


@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unit_with_a_bad_record_adds_exactly_nothing(route, reduction):
    model, x = mixed_net(torch.float32), mixed_batch(4, dtype=torch.float32)
    x[1, 0, 0, 0] = math.nan
    units = {"privacy_unit_ids": torch.tensor([5, 3, 3, 5]), "unit_reduction": reduction}
    found, stats = clipped_sum(by_route(route, model, energy, x), **units, return_stats=True)
    units["privacy_unit_ids"] = torch.tensor([5, 5])
    expected = clipped_sum(by_route(route, model, energy, x[[0, 3]]), **units)
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-5)
    assert int(stats.sensitive_num_nonfinite) == 1


@pytest.mark.parametrize("route", Route)
def test_infinite_gradient_over_padding_alone_adds_nothing(route):
    # The outermost outputs see padding only and are zero: the root's derivative there is infinite.
    model = nn.Conv1d(1, 1, 1, padding=1, bias=False)
    nn.init.ones_(model.weight)
    x = random(3, 1, 4, dtype=torch.float32).abs() + 1
    grads = by_route(route, model, lambda model, x: model(x).sqrt().flatten(1).sum(1), x)
    found, stats = clipped_sum(grads, return_stats=True)
    assert found["weight"].isfinite().all()
    # Either those gradients are none, or they have none: never a finite norm of what is not.
    if int(stats.sensitive_num_nonfinite):
        assert int(stats.sensitive_num_nonfinite) == 3
        assert (found["weight"] == 0).all()


@pytest.mark.parametrize("route", Route)
def test_bad_value_that_no_window_reaches_changes_nothing(route):
    model = randomise(nn.Conv1d(1, 2, 1, stride=2))
    x = random(3, 1, 5, dtype=torch.float32)
    expected = clipped_sum(by_route(route, model, energy, x))
    x[1, 0, 1] = math.nan
    found = clipped_sum(by_route(route, model, energy, x))
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-6)
