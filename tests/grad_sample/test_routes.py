"""Every route of a layer's gradient ends in the same clipped sum."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    assert_same_gradients,
    assert_same_sums,
    by_route,
    check_routes,
    clipped_sum,
    energy,
    forced,
    mixed_batch,
    mixed_net,
    one_at_a_time,
    random,
    randomise,
    scaled_energy,
    sizes_of,
)
from tests.grad_sample.test_networks import NETWORKS, loss_of, monai_networks, prepared

# --- layers ---

LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(3, 5, 3), (3, 9)),
    "Conv1d, stride, padding": (lambda: nn.Conv1d(2, 17, 4, 3, 2, bias=False), (2, 11)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    "Conv2d, everything": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (3, 1), (1, 2)), (3, 7, 6)),
    "Conv2d, same": (lambda: nn.Conv2d(2, 3, 4, padding="same", bias=False), (2, 5, 5)),
    "Conv2d, reflection": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        (2, 5, 5),
    ),
    "Conv2d, product": (lambda: nn.Conv2d(4, 3, 1), (4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3, 1, 1, bias=False), (2, 4, 3, 5)),
    "Conv3d, stride": (lambda: nn.Conv3d(1, 3, (1, 3, 2), 2, (0, 1, 2), (1, 2, 1)), (1, 4, 5, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (3, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 2, 2, bias=False), (3, 4, 3)),
    "ConvTranspose2d, everything": (
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), (2, 3), 1, (1, 2), 1, True, 2),
        (2, 4, 3),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 3, 2, 1, 1), (2, 3, 2, 3)),
    "Linear": (lambda: nn.Linear(6, 4), (6,)),
    "Linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "Linear, positions": (lambda: nn.Linear(6, 4), (7, 6)),
    "Linear, more positions": (lambda: nn.Linear(3, 4), (3, 2, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_has_the_same_clipped_sum_on_every_route(name, dtype):
    build, shape = LAYERS[name]
    model = randomise(nn.Sequential(build())).to(dtype)
    check_routes(model, scaled_energy, random(5, *shape, dtype=dtype))


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [2, 4])
def test_layer_with_groups_has_the_same_clipped_sum_and_no_ghost_norms(layer, groups):
    model = randomise(layer(4, 8, 3, 2, 1, groups=groups).double())
    x = random(5, 4, 6, 5)
    check_routes(model, scaled_energy, x, routes=[Route.RECOMPUTE])
    with forced(Route.GHOST), dpfast.per_sample_gradients(model) as grads:
        energy(model, x).sum().backward()
    assert [layer.route for layer in grads.plan.layers] == [Route.KEEP]


def test_linear_layer_on_windows_of_samples_has_the_same_clipped_sum():
    model = randomise(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())

    def loss_of(model, x):
        out = model(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out.square().flatten(1).mean(1)

    check_routes(model, loss_of, random(5, 3, 4))
    check_routes(model, loss_of, random(5, 3, 2, 4))


class Attention(nn.Module):
    def __init__(self, across):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.across = across

    def forward(self, x):
        other = x.flip(1) if self.across else x
        return self.head(self.attention(x, other, other, need_weights=False)[0])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_has_the_same_clipped_sum_on_every_route(dtype, across):
    model = randomise(Attention(across)).to(dtype)
    check_routes(model, scaled_energy, 0.3 * random(4, 5, 8, dtype=dtype), tolerance=None)


@pytest.mark.parametrize("name", ["UNet 2D", "UNet 3D", "SegResNet 2D", "DynUNet"])
def test_network_has_the_same_clipped_sum_on_every_route(name):
    nets = monai_networks(name)
    build, shape = NETWORKS[name]
    model, *batch = prepared(lambda: build(nets), shape)
    check_routes(model, loss_of, *batch)


# --- uses of a weight ---


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


@pytest.mark.parametrize("route", Route)
def test_weight_used_twice_is_kept_and_right(route):
    model, x = randomise(Twice().double()), random(4, 3)
    grads = by_route(route, model, scaled_energy, x)
    assert_same_gradients(grads, one_at_a_time_scaled(model, x))
    parts = grads.parts()
    assert isinstance(parts["layer.weight"], torch.Tensor)
    assert isinstance(parts["head.weight"], torch.Tensor) == (route is Route.KEEP)
    check_routes(model, scaled_energy, x)


def one_at_a_time_scaled(model, x):
    """Of scaled_energy, which looks at a sample's place in the batch."""
    return one_at_a_time(model, lambda m, x, size: energy(m, x) * size, x, sizes_of(len(x)))


def test_two_forwards_before_one_backward_have_the_same_clipped_sum():
    def loss_of(model, x):
        return scaled_energy(model, x) + 0.5 * energy(model, x.flip(3))

    check_routes(mixed_net(), loss_of, mixed_batch())


@pytest.mark.parametrize("route", Route)
def test_two_backwards_in_one_context_have_the_same_clipped_sum(route):
    model, x = mixed_net(), mixed_batch()
    truth = one_at_a_time(model, lambda model, x: energy(model, x) + energy(model, -x), x)
    with forced(route), dpfast.per_sample_gradients(model) as grads:
        energy(model, x).sum().backward()
        once = clipped_sum(grads, max_grad_norm=1e6)
        energy(model, -x).sum().backward()
    single = one_at_a_time(model, energy, x)
    assert_same_sums(once, {name: grad.sum(0) for name, grad in single.items()})
    twice = clipped_sum(grads, max_grad_norm=1e6)
    assert_same_sums(twice, {name: grad.sum(0) for name, grad in truth.items()})


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3))
        self.scale = nn.Parameter(torch.empty(4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.weight * self.scale).tanh())


def test_computed_weights_have_the_same_clipped_sum():
    check_routes(randomise(Computed().double()), scaled_energy, random(5, 3))


def test_frozen_parameters_have_no_part_in_the_clipped_sum():
    model = mixed_net()
    for name, param in model.named_parameters():
        param.requires_grad_(name in ("0.weight", "3.bias", "7.weight", "8.weight"))
    check_routes(model, scaled_energy, mixed_batch())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_has_the_same_clipped_sum(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mixed_net()

        def forward(self, x):
            x = self.net[:4](x)
            return self.net[7:](checkpoint(self.net[4:7], x, use_reentrant=use_reentrant))

    model = Checkpointed().double()
    check_routes(model, scaled_energy, mixed_batch())
    plain = by_route(Route.RECOMPUTE, model.net, scaled_energy, mixed_batch())
    grads = by_route(Route.RECOMPUTE, model, scaled_energy, mixed_batch())
    expected = {f"net.{name}": grad for name, grad in clipped_sum(plain).items()}
    assert_same_sums(clipped_sum(grads), expected)


def test_inplace_activations_have_the_same_clipped_sum():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Linear(4, 3),
        nn.ELU(inplace=True),
        nn.Linear(3, 3),
        nn.Hardtanh(-3, 3, inplace=True),
    )
    check_routes(randomise(model.double()), scaled_energy, random(5, 2, 6))


def test_residual_sums_in_place_have_the_same_clipped_sum():
    # Both branches get one gradient, to which autograd may add in place.
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv1d(3, 3, 3, padding=1)
            self.second = nn.Conv1d(3, 3, 1)
            self.third = nn.Linear(5, 5)

        def forward(self, x):
            x = self.first(x)
            x = x + self.second(x)
            y = self.third(x)
            y += x
            return y

    check_routes(randomise(Residual().double()), scaled_energy, random(5, 3, 5))


def test_autocast_has_about_the_same_clipped_sum_on_every_route():
    model, x = mixed_net(torch.float32), mixed_batch(dtype=torch.float32)

    def loss_of(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.float().square().flatten(1).mean(1)

    check_routes(model, loss_of, x, tolerance=0.05)
