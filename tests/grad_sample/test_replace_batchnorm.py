"""replace_batchnorm: what it replaces, what it keeps, what it refuses."""

import pytest
import torch
from torch import nn

import dpfast
from tests.grad_sample.helpers import check, energy, random, randomise

LAYERS = [(nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3), (nn.SyncBatchNorm, 2)]


def net():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3),
        nn.BatchNorm1d(6, eps=0.01),
        nn.Sequential(nn.ReLU(), nn.ModuleDict({"norm": nn.BatchNorm1d(6)})["norm"]),
        nn.Tanh(),
        nn.InstanceNorm1d(6, affine=True),
        nn.Linear(4, 2),
    )


def test_parameters_names_and_order_stay():
    model = net()
    before = dict(model.named_parameters())
    assert dpfast.replace_batchnorm(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not list(model.buffers())


def test_nested_batchnorms_are_replaced_and_nothing_else():
    model = net()
    before = list(model.modules())
    dpfast.replace_batchnorm(model)
    for old, new in zip(before, model.modules(), strict=True):
        if isinstance(old, nn.BatchNorm1d):
            assert type(new) is nn.GroupNorm
            assert new.eps == old.eps
        else:
            assert new is old


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays(training):
    model = dpfast.replace_batchnorm(net().train(training))
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize(("layer", "axes"), LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_itself_is_replaced_in_the_result(layer, axes, affine):
    old = layer(6, affine=affine).double()
    new = dpfast.replace_batchnorm(old)
    assert type(new) is nn.GroupNorm
    assert new.affine is affine
    assert new.weight is old.weight
    assert new.bias is old.bias
    x = random(3, 6, *[4] * axes)
    assert torch.allclose(new(x), nn.functional.group_norm(x, 6))


@pytest.mark.parametrize(
    ("channels", "max_groups", "groups"),
    [
        (64, 32, 32),
        (6, 32, 6),
        (48, 32, 24),
        (7, 5, 1),
        (35, 32, 7),
        (6, 4, 3),
        (8, 1, 1),
        (1, 9, 1),
    ],
)
def test_groups_are_the_largest_divisor_of_the_channels_up_to_the_bound(
    channels, max_groups, groups
):
    new = dpfast.replace_batchnorm(nn.BatchNorm2d(channels), max_groups=max_groups)
    assert new.num_groups == groups
    assert new.num_channels == channels


def test_default_bound_is_32_groups():
    assert dpfast.replace_batchnorm(nn.BatchNorm2d(96)).num_groups == 32


def test_dtype_and_frozen_flags_stay():
    model = net().double()
    model[1].weight.requires_grad_(False)
    dpfast.replace_batchnorm(model)
    assert model[1].weight.dtype == torch.float64
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad


def test_batchnorm_in_two_places_keeps_its_parameters_shared():
    norm = nn.BatchNorm1d(4)
    model = dpfast.replace_batchnorm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert type(model["a"]) is type(model["b"][0]) is nn.GroupNorm
    assert model["a"].weight is model["b"][0].weight is norm.weight


def test_one_module_under_two_names_is_replaced_under_both():
    model = nn.Module()
    model.first = nn.BatchNorm1d(4)
    model.second = model.first
    dpfast.replace_batchnorm(model)
    assert type(model.first) is type(model.second) is nn.GroupNorm


@pytest.mark.parametrize("max_groups", [0, -1, 2.0, True, "2", None])
def test_bad_bound_is_refused(max_groups):
    with pytest.raises(ValueError, match="max_groups must be an int >= 1, got"):
        dpfast.replace_batchnorm(net(), max_groups=max_groups)


def test_lazy_batchnorm_is_refused():
    with pytest.raises(ValueError, match="lazy BatchNorm"):
        dpfast.replace_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_model_trains_afterwards():
    model = randomise(dpfast.replace_batchnorm(net(), max_groups=3).double())
    check(model, energy, random(4, 2, 6))
