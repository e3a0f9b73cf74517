"""The context: what it takes, what it gives and what it leaves alone."""

import copy

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from tests.grad_sample.helpers import (
    all_at_once,
    assert_same_gradients,
    check,
    energy,
    one_at_a_time,
    random,
    randomise,
)


def small_net(dtype=torch.float64):
    """Convolutions, norms, an activation with a weight, and a linear head; input (B, 2, 6, 6)."""
    return randomise(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.InstanceNorm2d(4, affine=True),
            nn.PReLU(4),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.GroupNorm(1, 2),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(18, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
    ).to(dtype)


def images(batch_size=4, dtype=torch.float64):
    return random(batch_size, 2, 6, 6, dtype=dtype)


class ScaledWeight(nn.Module):
    """A linear layer whose weight is computed from two parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3))
        self.scale = nn.Parameter(torch.empty(4, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


# --- shared and frozen parameters ---


def test_gradients_of_a_module_used_twice_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    check(randomise(Twice().double()), energy, random(4, 3))


def test_gradients_of_a_parameter_under_two_modules_add_up():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids).tanh())

    model = randomise(Tied().double())
    check(model, energy, torch.tensor([[0, 1, 1], [2, 2, 2], [4, 0, 3]]))
    assert list(dpfast.per_sample_gradients(model)) == ["embedding.weight"]


def test_frozen_parameters_are_left_out_of_the_mapping():
    model = small_net()
    for name, param in model.named_parameters():
        param.requires_grad_(name in ("0.weight", "2.weight", "7.bias"))
    check(model, energy, images())
    assert list(all_at_once(model, energy, images())) == ["0.weight", "2.weight", "7.bias"]


def test_mapping_has_the_order_and_dtype_of_the_parameters():
    model = small_net()
    model[7].float()
    model.insert(7, ToDtype(torch.float32))
    model.insert(9, ToDtype(torch.float64))
    grads = all_at_once(model, energy, images())
    expected = [(name, p.dtype, (4, *p.shape)) for name, p in model.named_parameters()]
    assert [(name, g.dtype, tuple(g.shape)) for name, g in grads.items()] == expected
    assert len(grads) == len(expected)


class ToDtype(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


# --- checkpoints, casts, modes ---


def test_inplace_activations_equal_one_at_a_time():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.PReLU(),
        nn.ELU(inplace=True),
        nn.Linear(4, 3),
        nn.Hardtanh(inplace=True),
    )
    check(randomise(model.double()), energy, random(4, 2, 6))


PARTS = {
    "square layer": lambda m, x: m.first(x),
    "layers": lambda m, x: m.net(x),
    "functions": lambda m, x: nn.functional.linear(m.net(x) + m.scale, m.weight * m.scale),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("batch_size", [0, 4])
def test_checkpoint_equals_one_at_a_time(part, use_reentrant, batch_size):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.net = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.LayerNorm(3))
            self.scale = nn.Parameter(torch.empty(3))
            self.weight = nn.Parameter(torch.empty(3, 3))

        def forward(self, x):
            x = self.net(self.first(x))
            x = checkpoint(lambda x: PARTS[part](self, x), x, use_reentrant=use_reentrant)
            return x @ self.weight * self.scale

    check(randomise(Checkpointed().double()), energy, random(batch_size, 3))


@pytest.mark.parametrize("within", ["forward", "backward too"])
def test_autocast_equals_one_at_a_time_under_autocast(within):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(torch.float32)
            self.attention = nn.TransformerEncoderLayer(8, 2, 7, 0.0, batch_first=True)
            self.weight = nn.Parameter(torch.empty(3, 8))
            self.scale = nn.Parameter(torch.empty(8))

        def forward(self, x):
            tokens = nn.functional.linear(self.net(x), self.weight.t())[:, None] * self.scale
            return self.attention(tokens.expand(-1, 3, -1)) @ self.weight.t()

    model = randomise(Net())
    x = images(dtype=torch.float32)

    def loss_of(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        return out.float().square().flatten(1).mean(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=within == "backward too"):
        truth = one_at_a_time(model, loss_of, x)
        grads = all_at_once(model, loss_of, x)
    # A few roundings to bfloat16, 2^-9 each, that fall differently in sums of another order.
    assert_same_gradients(grads, truth, tolerance=0.05)


def test_model_in_bfloat16_equals_one_at_a_time():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.PReLU(), nn.GroupNorm(2, 4), nn.Linear(4, 3))
    randomise(model).bfloat16()
    check(model, energy, random(4, 2, 6, dtype=torch.bfloat16), tolerance=0.05)


def test_model_in_eval_mode_equals_one_at_a_time():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(1))
    randomise(model.double())
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(1.7)
    check(model.eval(), energy, images())


def test_attention_in_eval_mode_equals_one_at_a_time():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 7, 0.1, batch_first=True), 2, enable_nested_tensor=False
    )
    check(randomise(model.double()).eval(), energy, random(4, 3, 8))


def test_empty_batch_has_empty_gradients():
    model = small_net()
    model[1] = nn.GroupNorm(2, 4).double()
    grads = all_at_once(model, energy, images(0))
    assert all(grads[name].shape == (0, *p.shape) for name, p in model.named_parameters())


# --- forwards and backwards ---


def test_vector_loss_and_its_sum_give_the_same_gradients():
    model = small_net()
    truth = one_at_a_time(model, energy, images())
    with dpfast.per_sample_gradients(model) as grads:
        energy(model, images()).backward()
    assert_same_gradients(grads, truth)
    with dpfast.per_sample_gradients(model) as grads:
        torch.sum(energy(model, images())).backward()
    assert_same_gradients(grads, truth)


@pytest.mark.parametrize("reduce", [torch.sum, lambda loss: loss.sum(), lambda loss: loss])
def test_loss_that_is_a_tensor_subclass_is_one_per_sample(reduce):
    model = small_net()
    truth = one_at_a_time(model, energy, images())
    with dpfast.per_sample_gradients(model) as grads:
        reduce(energy(model, MetaTensor(images()))).backward()
    assert_same_gradients(grads, truth)


def test_vector_loss_takes_a_weight_per_sample():
    model = small_net()
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    truth = one_at_a_time(model, lambda *told: energy(*told[:2]) * told[2], images(), weights)
    with dpfast.per_sample_gradients(model) as grads:
        energy(model, images()).backward(weights)
    assert_same_gradients(grads, truth)


def test_several_forwards_before_one_backward_add_up():
    def loss_of(model, x):
        return energy(model, x) + 0.5 * energy(model, x.flip(3)) + energy(model, -x)

    check(small_net(), loss_of, images())


def test_several_backwards_in_one_context_add_up():
    model = randomise(ScaledWeight().double())
    x = random(4, 3)
    single = one_at_a_time(model, energy, x)
    truth = one_at_a_time(model, lambda model, x: energy(model, x) + 3 * energy(model, -x), x)
    with dpfast.per_sample_gradients(model) as grads:
        energy(model, x).sum().backward()
        assert_same_gradients({name: grads[name] for name in grads}, single)
        (3 * energy(model, -x)).sum().backward()
    assert_same_gradients(grads, truth)


def test_retained_graph_can_be_walked_twice():
    model = small_net()
    truth = one_at_a_time(model, lambda model, x: 2 * energy(model, x), images())
    with dpfast.per_sample_gradients(model) as grads:
        loss = energy(model, images())
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(grads, truth)


def test_forward_without_gradients_leaves_no_trace():
    model = randomise(ScaledWeight().double())
    x = random(4, 3)
    truth = one_at_a_time(model, energy, x)
    with dpfast.per_sample_gradients(model) as grads:
        with torch.no_grad():
            model(random(9, 3))
        loss = energy(model, x)
        with torch.no_grad():
            expected = model(x)
        loss.backward()
    assert_same_gradients(grads, truth)
    assert not expected.requires_grad


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_windows_of_a_sample_may_be_folded_into_the_batch(windows):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
            self.attention = nn.TransformerEncoderLayer(4, 2, 7, 0.0, batch_first=True)
            self.embedding = nn.Embedding(5, 3)
            self.positions = nn.Parameter(torch.empty(1, 3))
            self.weight = nn.Parameter(torch.empty(3, 4))

        def forward(self, x):
            x = self.net(x) + self.positions
            x = x + self.embedding((x > 0).sum(1))
            return self.attention((x @ self.weight)[:, None] * self.weight)

    def loss_of(model, x):
        out = model(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2]).flatten(1).square().mean(1)

    check(randomise(Net().double()), loss_of, random(4, windows, 2, 6, 6))


def test_losses_of_several_outputs_may_be_added():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(2, 2, 3) for _ in range(3))

        def forward(self, x):
            outs = []
            for layer in self.layers:
                x = layer(x).tanh()
                outs.append(x)
            return outs

    def loss_of(model, x):
        return sum(out.flatten(1).square().mean(1) / k for k, out in enumerate(model(x), 1))

    check(randomise(Deep().double()), loss_of, random(4, 2, 9))


# --- what is left alone ---


def test_grads_of_the_parameters_stay_as_they_were():
    model = small_net()
    truth = one_at_a_time(model, energy, images())
    before = {}
    for index, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, 7.0) if index % 2 else None
        before[param] = param.grad
    assert_same_gradients(all_at_once(model, energy, images()), truth)
    for param, grad in before.items():
        assert param.grad is grad
        assert grad is None or (grad == 7.0).all()


def test_model_stays_as_it_was():
    model = small_net()
    state, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    params, types = dict(model.named_parameters()), [type(m) for m in model.modules()]
    grads = all_at_once(model, energy, images())
    assert list(model.state_dict()) == state
    assert all(torch.equal(model.state_dict()[name], values[name]) for name in state)
    assert all(model.get_parameter(name) is param for name, param in params.items())
    assert [type(m) for m in model.modules()] == types
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(not param._backward_hooks for param in params.values())
    assert not any(grad.requires_grad for grad in grads.values())


def test_forward_hooks_of_the_user_are_called_once():
    model = small_net()
    shapes = []
    model[0].register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    all_at_once(model, energy, images())
    assert shapes == [(4, 4, 6, 6)]


@pytest.mark.parametrize("fails", [False, True])
def test_ordinary_autograd_is_back_after_the_context(fails):
    model = small_net()
    try:
        with dpfast.per_sample_gradients(model):
            energy(model, images()).sum().backward()
            if fails:
                raise KeyError("the user's own")
    except KeyError:
        assert fails
    energy(model, images()).mean().backward()
    assert all(param.grad is not None for param in model.parameters())


# --- on to clip_and_noise ---


def test_mapping_goes_into_clip_and_noise_as_it_is():
    model = small_net()
    grads = all_at_once(model, energy, images())
    truth = one_at_a_time(model, energy, images())
    rows = torch.stack([torch.cat([g[i].flatten() for g in truth.values()]) for i in range(4)])
    norms = rows.norm(dim=1)
    bound = float(norms.median())
    out = dpfast.clip_and_noise(grads, max_grad_norm=bound, noise_multiplier=0.0, mechanism="none")
    weights = (bound / norms).clamp(max=1.0)
    assert (weights < 1).any()
    assert (weights == 1).any()
    expected = {name: torch.einsum("b,b...->...", weights, grad) for name, grad in truth.items()}
    # clip_and_noise aims at the bound less 2^-28 of it.
    assert_same_gradients(out, expected, tolerance=1e-7)


def test_training_step_lowers_the_loss():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        with dpfast.per_sample_gradients(model) as grads:
            loss = energy(model, images())
            loss.sum().backward()
        losses.append(float(loss.detach().mean()))
        noisy = dpfast.clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none"
        )
        for name, param in model.named_parameters():
            param.grad = noisy[name]
        optimizer.step()
    assert losses[-1] < losses[0]
