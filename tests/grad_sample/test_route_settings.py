"""Every setting of clip_and_noise gives the same result on every route of a gradient."""

import math

import pytest
import torch
from torch import nn

import dpfast
from dpfast import NoiseSource
from dpfast.grad_sample._deferred import LayerGradient
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    DEFERRING,
    assert_close,
    assert_same_gradients,
    assert_same_sums,
    by_route,
    clipped_sum,
    mixed_batch,
    mixed_net,
    norms_of,
    scaled_energy,
)

UNITS = torch.tensor([7, 2, 7, 9, 2, 2])
SETTINGS = {
    "flat": {},
    "automatic": {"clipping": "automatic"},
    "auto_v": {"clipping": "auto_v"},
    "normalized": {"clipping": "normalized"},
    "psac": {"clipping": "psac", "stability_constant": 0.2},
    "none": {"clipping": "none"},
    "own weights": {"clipping": torch.tensor([0.1, 5.0, 0.0, 1.0, 1e-3, 2.0]).double()},
    "percentile": {"max_grad_norm": None, "percentile": 60.0},
    "mean of units": {"privacy_unit_ids": UNITS},
    "sum of units": {"privacy_unit_ids": UNITS, "unit_reduction": "sum"},
    "own weights of units": {
        "privacy_unit_ids": UNITS,
        "clipping": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.0, 1.0]).double(),
    },
    "l1": {"norm": "l1"},
    "l1 of units": {"norm": "l1", "privacy_unit_ids": UNITS},
    "percentile of units": {"privacy_unit_ids": UNITS, "max_grad_norm": None, "percentile": 50.0},
    "expected batch size": {"expected_batch_size": 7.5},
    "bound in a tensor": {"max_grad_norm": torch.tensor(0.7)},
}
NOISE = {
    "gaussian": {"mechanism": "gaussian", "noise_multiplier": 1.3},
    "laplace": {"mechanism": "laplace", "noise_multiplier": 0.4},
    "laplace of units": {
        "mechanism": "laplace",
        "noise_multiplier": 0.4,
        "privacy_unit_ids": UNITS,
    },
    "divided": {"mechanism": "gaussian", "noise_multiplier": 1.3, "expected_batch_size": 5.0},
    "equal groups": {"mechanism": "gaussian", "noise_multiplier": 0.7, "groups": "equal"},
    "proportional groups": {
        "mechanism": "gaussian",
        "noise_multiplier": 0.7,
        "groups": "proportional",
    },
    "own group weights": {"mechanism": "gaussian", "noise_multiplier": 0.7, "groups": "own"},
    "laplace groups": {"mechanism": "laplace", "noise_multiplier": 0.7, "groups": "equal"},
}


def group_settings(grads, weights):
    """One bound per tensor, and the noise's weights."""
    own = {name: 0.5 + 0.1 * k for k, name in enumerate(grads)}
    return {
        "max_grad_norm": {name: 0.01 * 2.0**k for k, name in enumerate(grads)},
        "group_noise_weights": own if weights == "own" else weights,
    }


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def routes(request):
    """Gradients of the same samples by route."""
    model, x = mixed_net(request.param), mixed_batch(dtype=request.param)
    return {route: by_route(route, model, scaled_energy, x) for route in Route}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("route", DEFERRING)
def test_setting_gives_the_same_sum_norms_and_threshold_on_every_route(routes, route, name):
    expected, expected_stats = clipped_sum(routes[Route.KEEP], **SETTINGS[name], return_stats=True)
    found, stats = clipped_sum(routes[route], **SETTINGS[name], return_stats=True)
    assert_same_sums(found, expected)
    torch.testing.assert_close(
        stats.sensitive_norms, expected_stats.sensitive_norms, rtol=1e-6, atol=0.0, equal_nan=True
    )
    torch.testing.assert_close(
        stats.max_grad_norm, expected_stats.max_grad_norm, rtol=1e-6, atol=0.0
    )
    assert int(stats.sensitive_num_nonfinite) == 0
    norms = expected_stats.sensitive_norms
    assert norms[~norms.isnan()].max() > 1e2 * norms[~norms.isnan()].min()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("route", Route)
def test_given_norms_are_used_on_every_route(routes, route, dtype):
    grads = routes[route]
    norms = norms_of(routes[Route.KEEP]).to(dtype)
    found, stats = clipped_sum(grads, norms=norms, return_stats=True)
    # The margin for norms in float32 is wider.
    tolerance = 1e-5 if dtype == torch.float32 else None
    assert_same_sums(found, clipped_sum(routes[Route.KEEP]), tolerance)
    assert torch.equal(stats.sensitive_norms, norms.double())
    # Twice the norms are not checked, and halve the sums of what is clipped.
    doubled = clipped_sum(grads, norms=2 * norms, clipping="auto_v")
    single = clipped_sum(grads, norms=norms, clipping="auto_v")
    assert_same_sums({n: 2 * value for n, value in doubled.items()}, single, tolerance)


@pytest.mark.parametrize("weights", ["equal", "proportional", "own"])
@pytest.mark.parametrize("route", DEFERRING)
def test_groups_have_the_same_sums_and_norms_on_every_route(routes, route, weights):
    settings = group_settings(routes[route], weights)
    expected, expected_stats = clipped_sum(routes[Route.KEEP], **settings, return_stats=True)
    found, stats = clipped_sum(routes[route], **settings, return_stats=True)
    assert_same_sums(found, expected)
    assert stats.sensitive_norms.shape == (len(found), 6)
    torch.testing.assert_close(
        stats.sensitive_norms, expected_stats.sensitive_norms, rtol=1e-6, atol=0.0
    )


def noise_of(grads, settings):
    """What a seeded source adds, from the noisy and the noiseless sum."""
    settings = dict(settings)
    if "groups" in settings:
        settings |= group_settings(grads, settings.pop("groups"))
    noisy = dpfast.clip_and_noise(
        grads, **{"max_grad_norm": 1.0, **settings}, noise=NoiseSource(seed=5)
    )
    norm = "l1" if settings["mechanism"] == "laplace" else "l2"
    plain = clipped_sum(
        grads, **{**settings, "mechanism": "none", "noise_multiplier": 0.0, "norm": norm}
    )
    return {name: noisy[name].double() - plain[name].double() for name in noisy}, noisy


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("route", DEFERRING)
def test_noise_is_the_same_whatever_the_route(routes, route, name):
    expected, sums = noise_of(routes[Route.KEEP], NOISE[name])
    found, _ = noise_of(routes[route], NOISE[name])
    for key, noise in expected.items():
        # Noisy and noiseless sums, each rounded once, or twice where a sum came first.
        unit = 2.0**-53 if sums[key].dtype == torch.float64 else 2.0**-24
        allowed = 8 * unit * (sums[key].abs().max() + noise.abs().max())
        assert (found[key] - noise).abs().max() <= allowed
        assert noise.abs().max() > 1e3 * allowed


@pytest.mark.parametrize("route", DEFERRING)
@pytest.mark.parametrize("strided", [False, True])
def test_physical_batches_accumulate_into_out(routes, route, strided):
    def accumulated(grads):
        out = {}
        for name, grad in grads.items():
            wide = torch.full((*grad.shape[1:], 2), 3.0, dtype=grad.dtype)
            out[name] = wide[..., 0] if strided else wide[..., 0].clone()
        clipped_sum(grads, out=out)
        clipped_sum(grads, out=out, accumulate=True, max_grad_norm=0.3)
        last = {"mechanism": "gaussian", "noise_multiplier": 0.5, "expected_batch_size": 12.0}
        result, stats = clipped_sum(
            grads, out=out, accumulate=True, noise=NoiseSource(seed=3), **last, return_stats=True
        )
        assert all(result[name] is out[name] for name in out)
        return result, stats

    found, stats = accumulated(routes[route])
    expected, expected_stats = accumulated(routes[Route.KEEP])
    assert_same_sums(found, expected)
    torch.testing.assert_close(stats.sensitive_norms, expected_stats.sensitive_norms)


@pytest.mark.parametrize("route", Route)
def test_one_value_of_one_sample_is_summed_into_out(route, monkeypatch):
    # A stand-in of one value has the layout of an ordinary tensor; it must not be read either.
    make, made = LayerGradient.stand_in, []

    def poisoned(self):
        made.append(make(self))
        made[-1].as_strided((1,), (1,)).fill_(math.nan)
        return made[-1]

    monkeypatch.setattr(LayerGradient, "stand_in", poisoned)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    grads = by_route(route, model, lambda model, x: model(x).sum(1), torch.tensor([[0.5]]))
    for accumulate in (False, True):
        out = {"weight": torch.tensor([[8.0]])}
        clipped_sum(grads, out=out, accumulate=accumulate)
        assert_close(out["weight"], torch.tensor([[8.5 if accumulate else 0.5]]))


@pytest.mark.parametrize("route", Route)
def test_clipping_leaves_the_gradients_as_they_were(routes, route):
    grads = routes[route]
    before = {name: grad.clone() for name, grad in grads.items()}
    first = clipped_sum(grads)
    assert_same_gradients(grads, before, tolerance=0.0)
    second = clipped_sum(grads)
    assert all(torch.equal(first[name], second[name]) for name in first)
