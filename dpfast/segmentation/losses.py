"""Losses with one number per sample, from MONAI's and PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dpfast.errors import PrivacyError

__all__ = ["PerSampleLoss", "per_sample_loss"]

_NAME = "per_sample_loss"
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


class PerSampleLoss(nn.Module):
    """A loss that returns a vector (B,), entry b of which sample b alone decides.

    Args:
      loss: see `per_sample_loss`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self._vectorised = _vectorised(loss)

    def forward(self, input: Any, target: torch.Tensor) -> torch.Tensor:
        """The loss of every sample.

        Args:
          input: predictions (B, C, *spatial), or a list of them with deep supervision.
          target: (B, ...), as the wrapped loss takes it.

        Returns:
          (B,).

        Raises:
          ValueError: input and target hold different numbers of samples.
        """
        first = input[0] if isinstance(input, (list, tuple)) else input
        if len(first) != len(target):
            raise ValueError(
                f"{_NAME}: target must have {len(first)} samples like input, got {len(target)}"
            )
        if len(target) == 0:
            empty: torch.Tensor = first.sum().reshape(1)[:0]  # keeps the graph
            return empty
        if self._vectorised is not None:
            return self._vectorised(input, target)
        return torch.cat(
            [self._one(_sample(input, b), target[b : b + 1]) for b in range(len(target))]
        )

    def _one(self, input: Any, target: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.loss(input, target)
        if value.numel() != 1:
            raise PrivacyError(
                f"{_NAME}: {type(self.loss).__name__} must give one number for one sample, got "
                f"shape {tuple(value.shape)}"
            )
        return value.reshape(1)


def per_sample_loss(loss: nn.Module) -> PerSampleLoss:
    """Turn a loss into one that returns a vector (B,), the loss of every sample by itself.

    Entry b is what `loss` gives for a batch of sample b alone, so that clipping bounds what a
    sample can do. Dice, DiceCE, Tversky and focal loss, cross-entropy with and without logits and
    deep supervision of these are computed for all samples at once; any other loss, generalised
    Dice among them, one sample after the other.

    Args:
      loss: of MONAI, of PyTorch or one's own, called with predictions and targets. Its reduction
        must be mean or sum.

    Returns:
      The per-sample loss; use it as `per_sample_loss(loss)(predictions, targets)`.

    Raises:
      TypeError: not a module.
      PrivacyError: the loss takes its sums over the batch (`batch=True`), keeps statistics, or has
        no single number per sample (`reduction="none"`).
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"{_NAME}: loss must be a torch.nn.Module, got {type(loss).__name__}")
    for name, part in loss.named_modules():
        where = f"{type(part).__name__} ({name})" if name else type(part).__name__
        if getattr(part, "batch", False) is True:
            raise PrivacyError(
                f"{_NAME}: {where} sums over the batch, so that every sample changes every other "
                "one's loss; build it with batch=False"
            )
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise PrivacyError(f"{_NAME}: {where} keeps statistics over the batch")
        reduction = getattr(part, "reduction", "mean")
        if str(getattr(reduction, "value", reduction)) not in ("mean", "sum"):
            raise PrivacyError(f"{_NAME}: {where} must have reduction mean or sum, got {reduction}")
    return PerSampleLoss(loss)


def _sample(value: Any, b: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [part[b : b + 1] for part in value]
    return value[b : b + 1]


def _reduced(loss: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """(B, ...) to (B,) by the loss's own reduction."""
    rows = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    return rows.sum(1) if str(loss.reduction) == "sum" else rows.mean(1)


def _elementwise(loss: nn.Module) -> Loss:
    """A loss that is the mean or the sum of what it returns without reduction."""
    unreduced = copy.copy(loss)
    unreduced.reduction = "none"  # type: ignore[assignment]
    return lambda input, target: _reduced(loss, unreduced(input, target))


def _cross_entropy(loss: nn.Module) -> Loss | None:
    if loss.weight is not None:
        return None  # its mean is weighted by what the sample's own labels are
    unreduced = copy.copy(loss)
    unreduced.reduction = "none"

    def value(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = unreduced(input, target)
        if target.is_floating_point() or str(loss.reduction) == "sum":
            return _reduced(loss, values)
        counted = (target != loss.ignore_index).reshape(len(target), -1).sum(1)
        return values.reshape(len(values), -1).sum(1) / counted

    return value


def _dice_ce(loss: Any) -> Loss | None:
    parts = (_vectorised(loss.dice), _cross_entropy(loss.cross_entropy))
    binary = _vectorised(loss.binary_cross_entropy)
    dice, cross_entropy = parts
    if dice is None or cross_entropy is None or binary is None:
        return None
    # The loss's own way from targets to what cross-entropy takes, with another cross-entropy.
    adapted = copy.copy(loss)
    adapted._modules = dict(loss._modules)
    adapted.cross_entropy = _Function(cross_entropy)
    adapted.binary_cross_entropy = _Function(binary)
    adapted.dice = _Function(dice)
    return lambda input, target: adapted(input, target)


class _Function(nn.Module):
    def __init__(self, function: Loss) -> None:
        super().__init__()
        self._function = function

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._function(input, target)


def _deep_supervision(loss: Any) -> Loss | None:
    inner = _vectorised(loss.loss)
    if inner is None:
        return None
    adapted = copy.copy(loss)
    adapted._modules = {**loss._modules, "loss": _Function(inner)}

    def value(input: Any, target: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, (list, tuple)):
            result: torch.Tensor = adapted.get_loss(input, target)
            return result
        weights: Sequence[float] = loss.get_weights(levels=len(input))
        return torch.stack(
            [
                weight * adapted.get_loss(part.float(), target)
                for weight, part in zip(weights, input, strict=True)
            ]
        ).sum(0)

    return value


def _vectorised(loss: nn.Module) -> Loss | None:
    """All samples at once, for the types whose formulae are known; None for others."""
    if type(loss) is nn.CrossEntropyLoss:
        return _cross_entropy(loss)
    if type(loss) is nn.BCEWithLogitsLoss:
        return _elementwise(loss) if loss.weight is None else None
    if not type(loss).__module__.startswith("monai.losses"):
        return None
    name = type(loss).__name__
    if name in ("DiceLoss", "TverskyLoss", "FocalLoss"):
        return _elementwise(loss)
    if name == "DiceCELoss":
        return _dice_ce(loss)
    return _deep_supervision(loss) if name == "DeepSupervisionLoss" else None
