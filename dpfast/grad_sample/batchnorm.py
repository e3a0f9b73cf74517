"""Layers that mix the samples of a batch: found, refused, replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from dpfast.errors import PrivacyError

__all__ = ["refuse_mixing_layers", "replace_batchnorm"]

_BATCHNORM = (nn.modules.batchnorm._BatchNorm,)
_SAMPLES_SECOND = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_INSTANCENORM = (nn.modules.instancenorm._InstanceNorm,)
_LOOKED_AT = (*_BATCHNORM, *_SAMPLES_SECOND, *_INSTANCENORM)


def refuse_mixing_layers(modules: Mapping[str, nn.Module]) -> None:
    """Raise where a layer in training mode takes or keeps statistics over the batch.

    Args:
      modules: of a model, by name.

    Raises:
      PrivacyError: names the module and the mend.
    """
    for name, module in modules.items():
        if not isinstance(module, _LOOKED_AT):
            continue
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, _SAMPLES_SECOND) and not module.self_attn.batch_first:
            raise PrivacyError(
                f"per_sample_gradients: {where} must have the samples on the first axis; build it "
                "with batch_first=True"
            )
        # InstanceNorm derives from the same base as BatchNorm.
        if not module.training:
            continue
        if isinstance(module, _INSTANCENORM):
            if module.track_running_stats:
                raise PrivacyError(
                    f"per_sample_gradients: {where} must not track running statistics, which would "
                    "publish the batch's; build it with track_running_stats=False"
                )
        elif isinstance(module, _BATCHNORM):
            raise PrivacyError(
                f"per_sample_gradients: {where} mixes the samples in training mode; "
                "dpfast.replace_batchnorm(model) turns BatchNorm into GroupNorm"
            )


def replace_batchnorm(model: nn.Module, *, max_groups: int = 32) -> nn.Module:
    """Replace every BatchNorm of a model by a GroupNorm, in place.

    The scale and the shift stay the same parameters (an optimizer that holds them goes on); the
    running statistics are dropped, so that a pretrained model needs to be trained further.

    Args:
      model: changed in place; a BatchNorm itself is replaced in the result only.
      max_groups: at most so many groups; the largest divisor of the channels up to it is taken.

    Returns:
      The model.

    Raises:
      ValueError: max_groups < 1, or a lazy BatchNorm that has not seen its first input.

    References:
      Wu and He 2018, arXiv:1803.08494.
    """
    if isinstance(max_groups, bool) or not isinstance(max_groups, int) or max_groups < 1:
        raise ValueError(f"replace_batchnorm: max_groups must be an int >= 1, got {max_groups!r}")
    if _is_batchnorm(model):
        return _group_norm(model, max_groups)
    replaced: dict[nn.Module, nn.Module] = {}  # one layer under two names stays one
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and _is_batchnorm(child):
                if child not in replaced:
                    replaced[child] = _group_norm(child, max_groups)
                setattr(module, name, replaced[child])
    return model


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, _BATCHNORM) and not isinstance(module, _INSTANCENORM)


def _group_norm(old: nn.Module, max_groups: int) -> nn.GroupNorm:
    assert isinstance(old, nn.modules.batchnorm._BatchNorm)
    channels = int(old.num_features)
    if channels < 1:
        raise ValueError(
            "replace_batchnorm: a lazy BatchNorm must see its first input before it is replaced"
        )
    groups = max(math.gcd(channels, g) for g in range(1, min(max_groups, channels) + 1))
    like = old.weight if old.affine else torch.empty(())
    new = nn.GroupNorm(
        groups, channels, eps=old.eps, affine=old.affine, device=like.device, dtype=like.dtype
    )
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)
