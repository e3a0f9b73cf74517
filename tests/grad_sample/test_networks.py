"""Whole segmentation networks against ordinary autograd on one sample at a time."""

import pytest
import torch
from torch import nn

import dpfast
from dpfast import PrivacyError
from dpfast.grad_sample.planner import Route
from tests.grad_sample.helpers import (
    all_at_once,
    assert_close,
    assert_same_gradients,
    one_at_a_time,
    random,
)

BATCH_SIZE = 3


def loss_of(model, images, masks):
    """Mean squared error a sample, over all outputs of a deeply supervised network."""
    return squared_error(model(images), masks)


def squared_error(out, masks):
    if isinstance(out, (list, tuple)):
        return sum(squared_error(part, masks) for part in out)
    if out.dim() == masks.dim() + 1:  # the outputs of deep supervision on an axis of their own
        return sum(squared_error(part, masks) for part in out.unbind(1))
    masks = nn.functional.interpolate(masks, out.shape[2:])
    return (out - masks).square().flatten(1).mean(1)


def without_chance(model):
    """Dropout and stochastic depth differ between a batch and its samples: switched off."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
        for name in ("drop_connect_rate", "_drop_connect_rate"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def unused_parameters(model, *batch):
    """Parameters that ordinary autograd leaves without a gradient."""
    loss_of(model, *batch).sum().backward()
    unused = [param for param in model.parameters() if param.requires_grad and param.grad is None]
    model.zero_grad()
    return unused


def prepared(build, shape):
    """The network in float64, and images and masks for it."""
    torch.manual_seed(0)
    model = without_chance(build()).double().train()
    images = random(BATCH_SIZE, *shape)
    return model, images, random(BATCH_SIZE, 1, *shape[1:], seed=2)


def check_network(build, shape):
    model, *batch = prepared(build, shape)
    for param in unused_parameters(model, *batch):
        param.requires_grad_(False)
    truth = one_at_a_time(model, loss_of, *batch)
    assert_same_gradients(all_at_once(model, loss_of, *batch), truth)
    assert all(param.grad is None for param in model.parameters())
    # Samples that all have the same gradients would prove little.
    assert any(not torch.allclose(grad[0], grad[1]) for grad in truth.values())


# --- MONAI ---

NETWORKS = {
    "UNet 2D": (lambda n: n.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), (1, 32, 32)),
    "UNet 3D": (lambda n: n.UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1), (1, 16, 16, 16)),
    "BasicUNet": (lambda n: n.BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8)), (1, 32, 32)),
    "BasicUNetPlusPlus": (
        lambda n: n.BasicUNetPlusPlus(
            2, 1, 2, features=(8, 8, 16, 16, 32, 8), deep_supervision=True
        ),
        (1, 32, 32),
    ),
    "SegResNet 2D": (lambda n: n.SegResNet(2, 8, 1, 2), (1, 32, 32)),
    "SegResNet 3D": (lambda n: n.SegResNet(3, 8, 1, 2), (1, 16, 16, 16)),
    "SegResNetDS": (lambda n: n.SegResNetDS(2, 8, 1, 2, norm="INSTANCE", dsdepth=2), (1, 32, 32)),
    "DynUNet": (
        lambda n: n.DynUNet(
            3, 1, 2, (3, 3, 3, 3), (1, 2, 2, 2), (2, 2, 2), filters=(4, 8, 8, 16),
            deep_supervision=True, deep_supr_num=2, res_block=True,
        ),
        (1, 16, 16, 16),
    ),
    "UNETR": (
        lambda n: n.UNETR(
            1, 2, (32, 32), feature_size=8, hidden_size=24, mlp_dim=32, num_heads=3,
            spatial_dims=2, norm_name="instance",
        ),
        (1, 32, 32),
    ),
    "SwinUNETR": (lambda n: n.SwinUNETR(1, 2, feature_size=12, spatial_dims=2), (1, 64, 64)),
}  # fmt: skip
WITH_BATCHNORM = {
    "AttentionUnet": (lambda n: n.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), (1, 32, 32)),
    "VNet": (
        lambda n: n.VNet(2, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0)),
        (1, 32, 32),
    ),
    "FlexibleUNet": (
        lambda n: n.FlexibleUNet(1, 2, "efficientnet-b0", pretrained=False, spatial_dims=2),
        (1, 32, 32),
    ),
}


def monai_networks(name):
    nets = pytest.importorskip("monai.networks.nets")
    if name in ("UNETR", "SwinUNETR"):
        pytest.importorskip("einops", reason="MONAI's transformers rearrange with einops")
    return nets


@pytest.mark.parametrize("name", NETWORKS)
def test_monai_network_equals_one_at_a_time(name):
    nets = monai_networks(name)
    build, shape = NETWORKS[name]
    check_network(lambda: build(nets), shape)


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_monai_network_equals_one_at_a_time_once_batchnorm_is_replaced(name):
    nets = monai_networks(name)
    build, shape = WITH_BATCHNORM[name]
    check_network(lambda: dpfast.replace_batchnorm(build(nets)), shape)


@pytest.mark.slow  # 45 million parameters in float64
def test_vnet_in_3d_equals_one_at_a_time():
    nets = monai_networks("VNet")
    settings = {"dropout_prob_down": 0.0, "dropout_prob_up": (0.0, 0.0)}
    check_network(lambda: dpfast.replace_batchnorm(nets.VNet(3, 1, 2, **settings)), (1, 16, 16, 16))


@pytest.mark.parametrize("name", [*NETWORKS, *WITH_BATCHNORM])
def test_every_strategy_gives_a_monai_network_the_same_clipped_sum(name):
    nets = monai_networks(name)
    build, shape = {**NETWORKS, **WITH_BATCHNORM}[name]
    model, *batch = prepared(lambda: dpfast.replace_batchnorm(build(nets)), shape)
    for param in unused_parameters(model, *batch):
        param.requires_grad_(False)

    def clipped(**settings):
        with dpfast.per_sample_gradients(model, **settings) as grads:
            loss_of(model, *batch).sum().backward()
        result = dpfast.clip_and_noise(
            grads,
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            mechanism="none",
            clipping="automatic",
        )
        return result, {layer.route for layer in grads.plan.layers}

    expected, routes = clipped(strategy="keep")
    assert routes == {Route.KEEP}
    size = max(float(value.abs().max()) for value in expected.values())
    seen = set()
    # The first step under a budget holds as little as it can, the second follows the plan.
    for settings in (
        {"strategy": "recompute"},
        {"strategy": "ghost"},
        {},
        {"memory_budget": 2.0},
        {"memory_budget": 2.0},
    ):
        found, routes = clipped(**settings)
        seen |= routes
        for key, value in expected.items():
            assert_close(found[key] / size, value / size, key, 1e-9)
    assert seen == set(Route)


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_monai_network_with_batchnorm_is_refused(name):
    model = WITH_BATCHNORM[name][0](monai_networks(name))
    with pytest.raises(PrivacyError, match="replace_batchnorm"):
        dpfast.per_sample_gradients(model)


def test_monai_network_is_refused_as_long_as_unused_parameters_are_trainable():
    build, shape = NETWORKS["UNETR"]
    model, *batch = prepared(lambda: build(monai_networks("UNETR")), shape)
    names = [name for name, _ in model.named_parameters()]
    unused = unused_parameters(model, *batch)
    assert 0 < len(unused) < len(names)
    with pytest.raises(PrivacyError, match=r"requires_grad_\(False\)"):
        all_at_once(model, loss_of, *batch)


# --- written here ---


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if channels != out else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.body(x)
        out += self.shortcut(x)
        return self.activation(out)


def residual_net():
    return dpfast.replace_batchnorm(
        nn.Sequential(
            nn.Conv2d(1, 8, 5, 2, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            Residual(8, 8, 1),
            Residual(8, 16, 2),
            Residual(16, 16, 1),
            nn.ConvTranspose2d(16, 2, 4, 4),
        ),
        max_groups=4,
    )


class VisionTransformer(nn.Module):
    """Patches of 8 x 8, a position embedding, two encoder layers, one linear head a patch."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 16, 16))
        self.scale = nn.Parameter(torch.ones(16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.head = nn.Linear(16, 64)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        out = self.head(self.encoder(tokens * self.scale)).unflatten(1, (4, 4)).unflatten(3, (8, 8))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, None]


@pytest.mark.parametrize("build", [residual_net, VisionTransformer])
def test_network_equals_one_at_a_time(build):
    check_network(build, (1, 32, 32))
