"""MONAI's segmentation networks by name, with public initial weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dpfast import _validate
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.task import SegmentationTask

__all__ = ["MODELS", "build_model"]

# The arguments that a network has to be given, where the caller gives none. None of these networks
# mixes samples: they normalise by instance or by groups of channels.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {"channels": (16, 32, 64), "strides": (2, 2), "norm": "instance"},
    "dynunet": {
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
        "filters": (16, 32, 64),
    },
    "segresnet": {},
}
MODELS = tuple(_DEFAULTS)
# These follow from the task, or would make another loss necessary.
_NOT_ARGUMENTS = (
    *("spatial_dims", "dimensions", "in_channels", "out_channels"),
    *("deep_supervision", "deep_supr_num"),
)


def build_model(
    name: str,
    task: SegmentationTask,
    arguments: Mapping[str, Any] | None = None,
    *,
    weights_seed: int = 0,
) -> nn.Module:
    """Make a network for a task.

    Args:
      name: "unet", "dynunet" or "segresnet".
      task: gives axes, channels and classes.
      arguments: of MONAI's class beside these.
      weights_seed: of the initial weights, which are public; the global generator is not touched.

    Returns:
      A module from (B, in_channels, *image_size) to (B, num_classes, *image_size).

    Raises:
      ValueError: an unknown name or argument, or a network that does not take the task's images.
      ImportError: MONAI is not installed.
    """
    function = "build_model"
    _validate.choice(function, "name", name, MODELS)
    network, given = _network(name), dict(arguments or {})
    known = [a for a in inspect.signature(network).parameters if a not in _NOT_ARGUMENTS]
    for argument in given:
        if argument not in known:
            raise ValueError(
                f"{function}: arguments of {name} must be of {', '.join(known)}, got {argument!r}"
            )
    size = (2, task.in_channels, *task.image_size)
    wanted = (2, task.num_classes, *task.image_size)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(weights_seed)
            model: nn.Module = network(
                spatial_dims=task.spatial_dims,
                in_channels=task.in_channels,
                out_channels=task.num_classes,
                **{**_DEFAULTS[name], **given},
            )
            shape = tuple(model(torch.zeros(size)).shape)
    except Exception as error:
        raise ValueError(
            f"{function}: arguments must make a {name} that takes images of shape {size[1:]}, got "
            f"{given}: {type(error).__name__}: {error}"
        ) from error
    if shape != wanted:
        raise ValueError(
            f"{function}: arguments must make a {name} that gives shape {wanted[1:]} for images of "
            f"shape {size[1:]}, got {given}, which gives {shape[1:]}"
        )
    return model


def _network(name: str) -> Any:
    with needs_extra("build_model"):
        if name == "unet":
            from monai.networks.nets.unet import UNet

            return UNet
        if name == "dynunet":
            from monai.networks.nets.dynunet import DynUNet

            return DynUNet
        from monai.networks.nets.segresnet import SegResNet

        return SegResNet
