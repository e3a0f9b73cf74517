"""Networks by name: shapes, arguments, public weights, no mixing of samples."""

import pytest
import torch
from torch import nn

import dpfast
from dpfast.segmentation import SegmentationTask
from dpfast.segmentation.models import MODELS, build_model

TASKS = [
    SegmentationTask("2D", 2, 3, (16, 24), in_channels=2),
    SegmentationTask("3D", 3, 2, (16, 8, 16)),
]
SMALL = {
    "unet": {"channels": [4, 8], "strides": [2], "num_res_units": 1},
    "dynunet": {"filters": [4, 8, 16]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_the_tasks_images_and_keeps_samples_apart(name, task):
    model = build_model(name, task, SMALL[name])
    images = torch.randn(3, task.in_channels, *task.image_size)
    assert model(images).shape == (3, task.num_classes, *task.image_size)
    dpfast.refuse_coupling(model, images, lambda out, target: out.flatten(1).mean(1), images)


@pytest.mark.parametrize("name", MODELS)
def test_defaults_make_a_model(name):
    assert isinstance(build_model(name, TASKS[1]), nn.Module)


def test_weights_follow_from_the_seed_and_the_generator_is_left_alone():
    before = torch.get_rng_state()
    models = [build_model("unet", TASKS[0], SMALL["unet"], weights_seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unet", {"chanels": [4, 8]}, "arguments of unet must be of .*, got 'chanels'"),
        ("unet", {"out_channels": 5}, "got 'out_channels'"),
        ("dynunet", {"deep_supervision": True}, "got 'deep_supervision'"),
        ("unet", {"channels": [4, 8], "strides": [2, 2]}, "must make a unet that takes images of"),
        ("unet", {"channels": 4}, "must make a unet that takes images of shape"),
        # 16 is halved away: instance normalisation of one pixel.
        ("unet", {"channels": [2] * 6, "strides": [2] * 5}, "must make a unet that takes images"),
        ("segresnet", {"blocks_down": [1] * 6, "blocks_up": [1] * 5}, "must make a segresnet that"),
        ("dynunet", {"strides": [2, 2, 2], "upsample_kernel_size": [2, 2]}, "which gives"),
        ("vnet", {}, "name must be one of unet, dynunet, segresnet, got 'vnet'"),
    ],
)
def test_arguments_that_make_no_model_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"^build_model: .*{message}"):
        build_model(name, TASKS[0], arguments)
