"""`dpfast.profile` finds the layer, the pass and the kernel that take the time."""

import json
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast

_PAUSE = 0.02


class _Pause(torch.autograd.Function):
    """Nothing, slowly: in the forward pass, in the backward pass or in both."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        time.sleep(forward)
        ctx.backward_seconds = backward
        ctx.save_for_backward(x)  # or checkpointing would have nothing to compute again
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        assert len(ctx.saved_tensors) == 1
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class _Slow(nn.Module):
    def __init__(self, forward=0.0, backward=0.0):
        super().__init__()
        self.seconds = (forward, backward)

    def forward(self, x):
        return _Pause.apply(x, *self.seconds)


class _Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def _step(model, shape=(4, 6)):
    x = torch.randn(shape, requires_grad=True)

    def step():
        model(x).square().sum().backward()

    return step


def _layer(profile, name):
    (found,) = [layer for layer in profile.layers if layer.name == name]
    return found


@pytest.mark.parametrize("slow", ["forward", "backward"])
def test_the_slow_pass_of_the_slow_layer_is_found(slow):
    model = nn.Sequential(nn.Linear(6, 6), _Slow(**{slow: _PAUSE}), nn.ReLU(), nn.Linear(6, 6))
    profile = dpfast.profile(_step(model), model, repeats=2)
    fast = "backward" if slow == "forward" else "forward"
    first = profile.layers[0]
    assert (first.name, first.kind) == ("1", "_Slow")
    assert getattr(first, slow) >= _PAUSE > 4 * getattr(first, fast)
    assert all(other.seconds < _PAUSE / 2 for other in profile.layers[1:])
    assert profile.seconds >= _PAUSE


def test_a_layer_that_is_used_twice_has_both_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = _Slow(_PAUSE, _PAUSE)

        def forward(self, x):
            return self.part(self.part(x))

    model = Twice()
    part = _layer(dpfast.profile(_step(model), model, repeats=1), "part")
    assert part.forward >= 2 * _PAUSE
    assert part.backward >= 2 * _PAUSE


def test_what_checkpointing_computes_again_belongs_to_the_backward_pass():
    model = nn.Sequential(_Checkpointed(_Slow(_PAUSE, 0.0)), nn.Linear(6, 6))
    layer = _layer(dpfast.profile(_step(model), model, repeats=1), "0.inner")
    assert _PAUSE <= layer.forward < 2 * _PAUSE
    assert _PAUSE <= layer.backward < 2 * _PAUSE


def test_what_belongs_to_no_layer_is_told_apart():
    model = nn.Linear(6, 6)
    plain = _step(model)

    def step():
        plain()
        with torch.profiler.record_function("waiting"):
            time.sleep(_PAUSE)

    profile = dpfast.profile(step, model, repeats=1)
    assert profile.layers[0].name == "(no layer)"
    assert profile.layers[0].seconds >= _PAUSE
    assert _layer(profile, "(no layer)").kind == ""
    assert _layer(profile, "(model)").kind == "Linear"
    (waiting,) = [kernel for kernel in profile.kernels if kernel.name == "waiting"]
    assert waiting.calls == 1
    assert waiting.seconds >= _PAUSE


def test_per_sample_gradients_belong_to_their_layers_and_the_call_is_among_the_kernels():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
    )
    x = torch.randn(8, 1, 32, 32)

    def step():
        with dpfast.per_sample_gradients(model) as gradients:
            model(x).square().mean(1).sum().backward()
        dpfast.clip_and_noise(gradients, max_grad_norm=1.0, noise_multiplier=1.0, noise=source)

    source = dpfast.NoiseSource(seed=0)
    profile = dpfast.profile(step, model, repeats=2)
    for name in ("0", "2"):
        layer = _layer(profile, name)
        assert layer.kind == "Conv2d"
        assert layer.forward > 0.0
        assert layer.backward > 0.0
    assert _layer(profile, "2").backward > _layer(profile, "1").backward  # of a ReLU
    names = {kernel.name: kernel.calls for kernel in profile.kernels}
    assert names["dpfast::clip_and_noise_"] == 1
    # Nearly all of the step is in the tables.
    total = sum(layer.seconds for layer in profile.layers)
    assert 0.3 * profile.profiled_seconds < total < 1.1 * profile.profiled_seconds
    assert sum(kernel.seconds for kernel in profile.kernels) <= 1.001 * total


def test_steps_are_real_and_counted_and_no_hook_stays():
    model = nn.Linear(6, 6)
    plain, calls = _step(model), []

    def step():
        calls.append(1)
        plain()

    profile = dpfast.profile(step, model, repeats=4)
    assert len(calls) == 1 + 2 * 4
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    saved = json.loads(json.dumps(profile.to_dict()))
    assert saved["layers"][0].keys() == {"name", "kind", "forward", "backward"}
    text = str(profile)
    assert "Linear" in text
    assert "aten::" in text
    assert len(profile.table(rows=1).splitlines()) == 7


def test_an_error_of_the_step_leaves_no_hook_behind():
    model = nn.Linear(6, 6)
    calls = []

    def step():
        calls.append(1)
        model(torch.zeros(1, 6 if len(calls) < 3 else 7))

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dpfast.profile(step, model, repeats=1)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_below_one_are_an_error(repeats):
    with pytest.raises(ValueError, match=f"profile: repeats must be >= 1, got {repeats}"):
        dpfast.profile(lambda: None, nn.Linear(1, 1), repeats=repeats)
