"""The engine on every device: the same sums, thresholds that stay there."""

import pytest
import torch
from torch import nn

from dpfast import NoiseSource, NoisyHistogram, PercentilePaper, PrivacyEngine, PrivateQuantile
from tests.privacy.helpers import loader_of, make, vectors

IDS = [i // 3 for i in range(30)]


def gradients(device, **settings):
    """Of each step of two epochs, on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
    engine = PrivacyEngine(noise=NoiseSource(seed=2))
    engine, model, optimizer, loader = make(
        loader_of(vectors(30), batch_size=5), engine=engine, model=model, **settings
    )
    found = []
    for _ in range(2):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x.to(device))[:, 0].sum().backward()
            optimizer.step()
            if model[0].weight.grad is not None:
                assert model[0].weight.grad.device.type == device.type
                found.append(model[0].weight.grad.cpu().clone())
    return torch.stack(found), engine


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mechanism": "laplace"},
        {"threshold": PrivateQuantile()},
        {"threshold": NoisyHistogram(), "physical_batch_size": 2},
        {"threshold": PercentilePaper()},
        {"privacy_unit": "patient", "privacy_unit_ids": IDS, "max_samples_per_unit": 2},
        {"max_grad_norm": [1.0, 0.5, 1.0, 0.5], "group_noise_weights": "proportional"},
    ],
)
def test_device_does_not_change_the_released_gradients(device, settings):
    here, engine = gradients(torch.device("cpu"), **settings)
    there, other = gradients(device, **settings)
    # Two steps of training apart, rounding has grown a little.
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    assert engine.steps == other.steps
    if engine.max_grad_norm is not None:
        assert other.max_grad_norm == pytest.approx(engine.max_grad_norm, rel=1e-4)


@pytest.mark.parametrize("threshold", [PrivateQuantile(), NoisyHistogram()])
def test_threshold_lives_where_the_gradients_are(device, threshold):
    _, engine = gradients(device, threshold=threshold)
    assert engine._steps.statistic.bound.device.type == device.type
    state = engine.state_dict()
    _, again = gradients(device, threshold=threshold)
    again.load_state_dict({**state, "ledger": again.ledger.state_dict()})
    assert again.max_grad_norm == engine.max_grad_norm


def test_memory_budget_and_strategy_reach_the_gradients(device):
    whole, _ = gradients(device)
    for settings in ({"strategy": "keep"}, {"strategy": "ghost"}, {"memory_budget": 4.0}):
        found, _ = gradients(device, **settings)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
