"""What the mapping gives, what it holds, and changes to that after the backward pass."""

import gc
import weakref

import pytest
import torch

import dpfast
from dpfast.grad_sample._deferred import LayerGradient
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    DEFERRING,
    assert_close,
    assert_same_gradients,
    by_route,
    clipped_sum,
    energy,
    forced,
    mixed_batch,
    mixed_net,
    one_at_a_time,
    scaled_energy,
)

# --- changes after the backward pass ---


def hooked_net():
    """The net, and its layers' inputs and outputs of the last forward pass."""
    model, seen = mixed_net(), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda layer, given, out, name=name: seen.__setitem__(name, (given[0], out))
        )
    return model, seen


@pytest.mark.parametrize("layer", ["0", "3", "5", "7", "9"])
@pytest.mark.parametrize("route", DEFERRING)
def test_input_changed_after_the_backward_pass_is_refused(route, layer):
    model, seen = hooked_net()
    grads = by_route(route, model, energy, mixed_batch())
    with torch.no_grad():
        seen[layer][0].mul_(2)
    with pytest.raises(RuntimeError, match=rf"{layer}\.weight .*changed in place"):
        clipped_sum(grads)
    with pytest.raises(RuntimeError, match=rf"{layer}\.weight"):
        grads[f"{layer}.weight"]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("route", DEFERRING)
def test_refused_call_writes_nothing_to_out(route, accumulate):
    model, seen = hooked_net()
    grads = by_route(route, model, energy, mixed_batch())
    with torch.no_grad():
        seen["9"][0].mul_(2)  # the last layer's: the others come first
    out = {name: torch.full_like(param, 7.0).detach() for name, param in model.named_parameters()}
    with pytest.raises(RuntimeError, match="changed in place"):
        clipped_sum(grads, out=out, accumulate=accumulate)
    assert all((value == 7.0).all() for value in out.values())


@pytest.mark.parametrize("route", DEFERRING)
def test_out_that_shares_memory_with_a_kept_gradient_is_refused_before_anything_is_written(route):
    grads = by_route(route, mixed_net(), energy, mixed_batch())
    kept = [name for name, part in grads.parts().items() if isinstance(part, torch.Tensor)]
    out = {name: torch.full(grad.shape[1:], 7.0).double() for name, grad in grads.items()}
    out[kept[-1]] = grads[kept[-1]][0]
    with pytest.raises(ValueError, match="share memory"):
        clipped_sum(grads, out=out)
    assert all((value == 7.0).all() for name, value in out.items() if name != kept[-1])


@pytest.mark.parametrize("route", DEFERRING)
def test_output_gradient_changed_after_the_backward_pass_is_refused(route):
    model, caught = mixed_net(), []

    def watch(layer, given, out):
        out.register_hook(caught.append)

    model[3].register_forward_hook(watch)
    grads = by_route(route, model, energy, mixed_batch())
    caught[0].zero_()
    with pytest.raises(RuntimeError, match=r"3\.weight .*changed in place"):
        clipped_sum(grads)


def test_changed_gradient_is_clipped_by_its_new_norm():
    model, x = mixed_net(torch.float32), mixed_batch(dtype=torch.float32)
    grads = by_route(Route.KEEP, model, energy, x)
    known = [name for name in grads if grads.square_norms(name) is not None]
    assert "0.weight" in known
    before = clipped_sum(grads, return_stats=True)[1].sensitive_norms
    for name in known:
        grads[name].mul_(3.0)
        assert grads.square_norms(name) is None
    found, stats = clipped_sum(grads, return_stats=True)
    expected, expected_stats = clipped_sum(dict(grads), return_stats=True)
    assert (stats.sensitive_norms > 1.1 * before).all()
    assert torch.allclose(stats.sensitive_norms, expected_stats.sensitive_norms, rtol=1e-12)
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-7)


def test_known_norms_are_those_of_what_is_kept():
    model, x = mixed_net(torch.float32), mixed_batch(dtype=torch.float32)
    grads = by_route(Route.KEEP, model, energy, x)
    found = {name: grads.square_norms(name) for name in grads}
    assert any(squares is not None for squares in found.values())
    for name, squares in found.items():
        if squares is not None:
            truth = grads[name].double().flatten(1).square().sum(1)
            assert torch.allclose(squares, truth, rtol=1e-12)


# --- what the mapping gives and holds ---


@pytest.mark.parametrize("route", Route)
def test_looking_up_forms_the_right_gradient_each_time(route):
    model, x = mixed_net(), mixed_batch()
    grads = by_route(route, model, energy, x)
    truth = one_at_a_time(model, energy, x)
    for _ in range(2):
        assert_same_gradients(grads, truth)
    assert not any(grad.requires_grad for grad in grads.values())
    deferred = [name for name, part in grads.parts().items() if isinstance(part, LayerGradient)]
    assert (not deferred) == (route is Route.KEEP)
    for name in deferred:
        assert grads[name] is not grads[name]
        # What is formed is the caller's own.
        grads[name].zero_()
    assert_same_gradients(grads, truth)


@pytest.mark.parametrize("route", Route)
def test_plain_dict_gives_the_same_sum(route):
    grads = by_route(route, mixed_net(), scaled_energy, mixed_batch())
    expected, expected_stats = clipped_sum(grads, return_stats=True)
    found, stats = clipped_sum(dict(grads), return_stats=True)
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-8)
        assert not value.requires_grad
    assert torch.allclose(stats.sensitive_norms, expected_stats.sensitive_norms, rtol=1e-8)
    assert isinstance(expected, dict)


@pytest.mark.parametrize("budget", [None, 4.0])
@pytest.mark.parametrize("route", Route)
def test_nothing_outlives_the_mapping(route, budget):
    model, x = mixed_net(), mixed_batch()
    # PyTorch's own first call under a dispatch mode leaves a cycle of frames behind.
    other = mixed_net()
    with dpfast.per_sample_gradients(other, memory_budget=4.0) as grads:
        energy(other, x).sum().backward()
    del grads
    gc.collect()
    gc.disable()
    try:
        with forced(route), dpfast.per_sample_gradients(model, memory_budget=budget) as grads:
            loss = energy(model, x)
            loss.sum().backward()
        clipped_sum(grads)
        watched = []
        for part in grads.parts().values():
            held = part.held if isinstance(part, LayerGradient) else [part]
            watched += [
                weakref.ref(t.untyped_storage()) for t in held if t.data_ptr() != x.data_ptr()
            ]
        del part, held
        assert len(watched) > 5
        assert all(ref() is not None for ref in watched)
        plan = grads.plan
        del grads
        assert all(ref() is None for ref in watched)
        assert plan.layers
        assert loss.grad_fn is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("route", DEFERRING)
def test_deferring_routes_hold_no_graph(route):
    grads = by_route(route, mixed_net(), energy, mixed_batch())
    for part in grads.parts().values():
        for tensor in part.held if isinstance(part, LayerGradient) else [part]:
            assert not tensor.requires_grad
            assert tensor.grad_fn is None


@pytest.mark.parametrize("route", DEFERRING)
def test_guarantee_tells_that_sums_are_rounded_in_single_precision(route):
    model, x = mixed_net(torch.float32), mixed_batch(dtype=torch.float32)
    for way, expected in ((route, True), (Route.KEEP, False)):
        grads = by_route(way, model, energy, x)
        _, stats = dpfast.clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=1.0, return_stats=True
        )
        assert stats.guarantee.holds
        assert any("not formed" in reason for reason in stats.guarantee.reasons) == expected
