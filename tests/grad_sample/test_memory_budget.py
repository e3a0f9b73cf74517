"""memory_budget: what it takes, what it refuses, and what is measured."""

import math
import re

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast.grad_sample import _budget
from dpfast.grad_sample._memory import MemoryTracker
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    assert_close,
    by_route,
    clipped_sum,
    energy,
    mixed_batch,
    mixed_net,
    random,
    randomise,
    step,
    wide_net,
)


def assert_no_modes():
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not _get_current_function_mode_stack()


@pytest.fixture
def trackers(monkeypatch):
    """The memory trackers that were made."""
    made = []

    def make():
        made.append(MemoryTracker())
        return made[-1]

    monkeypatch.setattr(_budget, "MemoryTracker", make)
    return made


def measured_step(model, x, budget, loss_of=energy):
    """The second step of a new kind: the first only makes it known."""
    step(model, x, budget, loss_of)
    return step(model, x, budget, loss_of)


# --- arguments ---


@pytest.mark.parametrize("budget", [True, False, "1", [1], torch.tensor(1.0), 1 + 0j])
def test_budget_of_another_type_is_refused(budget):
    with pytest.raises(TypeError, match="memory_budget must be an int"):
        dpfast.per_sample_gradients(wide_net(), memory_budget=budget)


@pytest.mark.parametrize("budget", [0, 0.0, -1, -1.0, math.nan, math.inf, -math.inf])
def test_budget_that_is_no_amount_is_refused(budget):
    with pytest.raises(ValueError, match="memory_budget must be finite and > 0, got"):
        dpfast.per_sample_gradients(wide_net(), memory_budget=budget)


@pytest.mark.parametrize("budget", [0.5, 1000])
def test_budget_too_small_is_refused_on_leaving_the_first_context(budget):
    model, x = wide_net(), torch.randn(16, 64)
    for _ in range(2):
        reached = False
        with (  # noqa: PT012
            pytest.raises(ValueError, match=f"memory_budget={budget} ") as caught,
            dpfast.per_sample_gradients(model, memory_budget=budget),
        ):
            energy(model, x).sum().backward()
            reached = True
        assert reached
        assert_no_modes()
        assert re.search(r"the least found", str(caught.value))
        assert "ordinary" in str(caught.value)
    # A budget that is large enough is taken after all.
    plan = step(model, x, 100.0).plan
    assert plan.predicted <= plan.budget


def test_budget_just_enough_is_taken():
    x = torch.randn(16, 64)
    loose = step(wide_net(), x, 100.0).plan
    shares = (1.0, 1.1, 1.2, 1.4, 1.8, 2.5)
    least = [share for share in shares if fits(wide_net(), x, share)]
    assert least, "nothing fits in 2.5 times the ordinary step"
    assert least == [share for share in shares if share >= least[0]]
    plan = step(wide_net(), x, least[0]).plan
    assert plan.predicted <= plan.budget == int(least[0] * plan.ordinary)
    assert plan.ordinary == loose.ordinary


def fits(model, x, share):
    try:
        step(model, x, share)
    except ValueError:
        return False
    return True


def test_budget_in_bytes_holds_for_every_batch_size():
    model = wide_net()
    plan = step(model, torch.randn(16, 64), 2**22).plan
    assert plan.budget == pytest.approx(2**22, rel=0.2)
    for batch_size in (1, 3, 8, 17):
        plan = step(model, torch.randn(batch_size, 64), 2**22).plan
        assert plan.predicted <= plan.budget <= 2**22
        assert plan.batch_size == batch_size


# --- one measurement for each kind of step ---


def test_plan_is_measured_once_for_inputs_of_one_shape(trackers, monkeypatch):
    model, x = mixed_net(), mixed_batch()
    first = step(model, x, 3.0).plan
    assert len(trackers) == 1

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(MemoryTracker, "__enter__", fail)
    for batch_size in (6, 2, 9, 1):
        plan = step(model, mixed_batch(batch_size), 3.0).plan
        assert plan.batch_size == batch_size
        assert None not in (plan.budget, plan.ordinary, plan.predicted)
        assert plan.ordinary == pytest.approx(first.ordinary * batch_size / 6, rel=0.01)
    step(model, x, 5.0)  # another budget needs no other measurement
    step(model, x, 2**26)
    assert len(trackers) == 1
    assert_no_modes()


def test_another_kind_of_step_is_measured_for_itself(trackers):
    model = randomise(nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 1)))
    made = 0
    for x in (random(4, 2, 8), random(4, 2, 16), random(4, 2, 16).float()):
        for _ in range(2):
            model.to(x.dtype)
            step(model, x, 4.0)
        made += 1
        assert len(trackers) == made
    measured_step(model.eval(), x, 4.0)
    assert len(trackers) == made + 1
    step(model.train(), x, 4.0)
    assert len(trackers) == made + 1
    # Another model's plans are its own.
    step(randomise(nn.Sequential(nn.Conv1d(2, 3, 3))), x, 4.0)
    assert len(trackers) == made + 2


def test_windows_of_samples_are_not_taken_for_samples():
    # The first layer sees the same shape for each row, whatever the rows of a sample.
    model = wide_net()

    def loss_of(model, x):
        return energy(model, x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1)

    single, many = torch.randn(4, 1, 64), torch.randn(4, 16, 64)
    step(model, single, 4.0, loss_of)
    assert step(model, many, 4.0, loss_of).plan.ordinary is None
    found = step(model, many, 4.0, loss_of).plan
    measured = step(wide_net(), many, 4.0, loss_of).plan
    assert found.ordinary == pytest.approx(measured.ordinary, rel=0.01)
    assert found.predicted >= 0.9 * sum(each.bytes for each in found.layers)


def test_step_under_autocast_is_not_taken_for_one_in_full_precision():
    def under_autocast(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.float().square().mean(1)

    model, x = wide_net(), torch.randn(64, 64)
    step(model, x, 4.0, under_autocast)
    found = measured_step(model, x, 4.0).plan
    assert found.ordinary == step(wide_net(), x, 4.0).plan.ordinary


def test_thawed_layers_are_not_planned_as_if_frozen():
    model, x = wide_net(), torch.randn(64, 64)
    model[4].requires_grad_(False)
    model[2].requires_grad_(False)
    step(model, x, 3.0)
    model.requires_grad_(True)
    measured_step(model, x, 3.0)
    thawed = step(model, x, 3.0).plan
    other = wide_net()
    step(other, x, 3.0)
    assert thawed.predicted == pytest.approx(step(other, x, 3.0).plan.predicted, rel=0.01)


def test_first_step_goes_the_leanest_way_and_is_right():
    model, x = mixed_net(), mixed_batch()
    expected = clipped_sum(by_route(Route.KEEP, model, energy, x))
    for _ in range(2):
        found = clipped_sum(step(model, x, 4.0))
        for name, value in expected.items():
            assert_close(found[name], value, name, 1e-8)


# --- edges ---


@pytest.mark.parametrize("budget", [None, 4.0, 2**24])
@pytest.mark.parametrize("batch_size", [0, 1])
def test_empty_and_single_batches_are_taken(batch_size, budget):
    model = mixed_net()
    for _ in range(2):
        grads = step(model, mixed_batch(batch_size), budget)
        expected = clipped_sum(dict(grads))
        found, stats = clipped_sum(grads, return_stats=True)
        for name, value in expected.items():
            assert_close(found[name], value, name, 1e-8)
        assert stats.sensitive_norms.shape == (batch_size,)
        assert all(len(grad) == batch_size for grad in grads.values())
        plan = grads.plan
        assert plan.batch_size == batch_size
        assert (plan.predicted is None) == (budget is None or batch_size == 0)
        str(plan)


def test_empty_first_batch_leaves_the_measurement_to_the_next(trackers):
    model = mixed_net()
    step(model, mixed_batch(0), 4.0)
    assert step(model, mixed_batch(), 4.0).plan.predicted is not None
    assert step(model, mixed_batch(0), 4.0).plan.predicted is None
    step(model, mixed_batch(), 4.0)
    assert len(trackers) == 2


@pytest.mark.parametrize("budget", [None, 4.0])
@pytest.mark.parametrize("where", ["forward", "between", "backward", "after", "after a look"])
def test_error_inside_the_context_leaves_nothing_behind(where, budget, trackers):
    model, x = mixed_net(), mixed_batch()

    def fail(*_):
        raise KeyError("the user's own")

    def hook(layer, given, out):
        if where == "forward":
            fail()
        if where == "backward":
            out.register_hook(fail)

    handle = model[5].register_forward_hook(hook)
    grads = dpfast.per_sample_gradients(model, memory_budget=budget)
    with pytest.raises(KeyError, match="the user's own"), grads:  # noqa: PT012
        loss = energy(model, x)
        if where == "between":
            fail()
        loss.sum().backward()
        if where == "after a look":
            assert len(grads["0.weight"]) == 6
        fail()
    handle.remove()
    assert_no_modes()
    for look_up in (lambda: grads["0.weight"], lambda: dict(grads), lambda: clipped_sum(grads)):
        with pytest.raises(RuntimeError, match="there are no gradients"):
            look_up()
    expected = clipped_sum(by_route(Route.KEEP, model, energy, x))
    found = clipped_sum(step(model, x, budget))
    for name, value in expected.items():
        assert_close(found[name], value, name, 1e-8)
    # The step that failed measured nothing.
    assert len(trackers) == (0 if budget is None else 2)
    assert_no_modes()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_first_layer_is_measured(use_reentrant):
    model = mixed_net()
    x = mixed_batch().requires_grad_()

    def loss_of(model, x):
        return energy(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)

    expected = clipped_sum(by_route(Route.KEEP, model, energy, x))
    try:
        for _ in range(2):
            grads = step(model, x, 6.0, loss_of)
            assert_no_modes()
            assert grads.plan.predicted is not None
            found = clipped_sum(grads)
            for name, value in expected.items():
                assert_close(found[name], value, name, 1e-8)
    finally:
        # Whatever was left behind must not fail other tests.
        while torch._C._len_torch_dispatch_stack():
            torch._C._pop_torch_dispatch_stack()
        while _get_current_function_mode_stack():
            _pop_mode()


def test_dispatch_mode_that_ends_before_the_context_does_not_take_the_tracker_along():
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    model, x = wide_net(), torch.randn(16, 64)
    with dpfast.per_sample_gradients(model, memory_budget=4.0) as grads:
        with Count():
            loss = energy(model, x)
        forward_calls = Count.calls
        loss.sum().backward()
    assert_no_modes()
    assert Count.calls == forward_calls > 0
    other = wide_net()
    assert grads.plan.ordinary == pytest.approx(step(other, x, 4.0).plan.ordinary, rel=0.05)
