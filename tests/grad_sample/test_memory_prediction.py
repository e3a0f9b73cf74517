"""How well a plan under a memory budget foretells the step."""

import pytest
import torch
from torch import nn

from dpfast.grad_sample._memory import MemoryTracker
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    by_route,
    clipped_sum,
    energy,
    forced,
    norms_of,
    random,
    step,
    wide_net,
)


def unet():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    return nets.UNet(2, 1, 2, (8, 96, 96), (2, 1), num_res_units=2)


UNET_SHARES = (1.1, 1.25, 1.5, 4.0)


@pytest.fixture(scope="module")
def unet_plans():
    """By share: the plan of a later step, its peak, and the clipped sum; keeping costs much."""
    model, x = unet(), random(8, 1, 24, 24, dtype=torch.float32)
    found = {}
    for share in UNET_SHARES:
        for _ in range(2):
            tracker = MemoryTracker()
            with tracker:
                grads = step(model, x, share)
                noisy = clipped_sum(grads)
            plan = grads.plan
            del grads
        found[share] = plan, tracker.highest(), noisy
    return model, x, found


@pytest.mark.parametrize("share", UNET_SHARES)
def test_predicted_peak_is_the_real_one(unet_plans, share):
    plan, peak, _ = unet_plans[2][share]
    assert plan.predicted <= plan.budget
    assert peak == pytest.approx(plan.predicted, rel=0.1)


def test_ordinary_peak_is_that_of_an_ordinary_step(unet_plans):
    model, x, found = unet_plans
    model.zero_grad()
    with MemoryTracker() as tracker:
        (model(x).flatten(1) - 0.3).square().mean(1).sum().backward()
        peak = tracker.highest()
    model.zero_grad()
    assert found[1.5][0].ordinary == pytest.approx(peak, rel=0.1)


def test_tight_budget_keeps_less_than_a_loose_one(unet_plans):
    _, _, found = unet_plans
    kept = [
        sum(each.route is Route.KEEP for each in found[share][0].layers) for share in UNET_SHARES
    ]
    peaks = [found[share][1] for share in UNET_SHARES]
    assert kept[0] < kept[-1]
    assert kept == sorted(kept)
    assert peaks[0] < peaks[-1]


def test_budgets_change_no_result(unet_plans):
    model, x, found = unet_plans
    expected = clipped_sum(by_route(Route.KEEP, model, energy, x))
    # The bound is 1. Biases before an instance norm are rounding noise by themselves.
    for _, _, sums in found.values():
        error = norms_of({name: (sums[name] - expected[name])[None] for name in expected})
        assert error <= 1e-4


def test_weight_used_twice_is_planned_as_it_is_kept():
    # Its gradients are formed whatever the plan.
    torch.manual_seed(0)
    model = nn.ModuleDict({"twice": nn.Linear(128, 128), "once": nn.Linear(128, 128)})

    def loss_of(model, x):
        out = model["once"](model["twice"](model["twice"](x).tanh()).tanh())
        return out.square().mean(1)

    x = torch.randn(16, 128)
    for _ in range(2):
        tracker = MemoryTracker()
        with tracker:
            grads = step(model, x, 60.0, loss_of)
            clipped_sum(grads)
    assert tracker.highest() == pytest.approx(grads.plan.predicted, rel=0.1)


def test_routes_of_the_plan_are_taken(monkeypatch):
    model, x = wide_net(), torch.randn(16, 64)
    step(model, x, 1.5)
    with forced(Route.KEEP):  # what decides without a plan
        planned = step(model, x, 1.5).plan
        free = step(model, x, None).plan
    assert all(each.route is Route.KEEP for each in free.layers)
    assert all(each.route is not Route.KEEP for each in planned.layers)
