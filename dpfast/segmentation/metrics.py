"""Dice of predicted class maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dpfast.segmentation._extras import needs_extra

__all__ = ["mean_foreground_dice", "validation_dice"]


def mean_foreground_dice(
    predictions: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> float:
    """The Dice by MONAI's DiceMetric, averaged over images and classes, without background.

    A class that is neither in the label map nor predicted scores 1.

    Args:
      predictions: class numbers, shape (N, 1, *spatial), N >= 1.
      labels: likewise.
      num_classes: background included.

    Raises:
      ValueError: other shapes, or no image. ImportError: MONAI is not installed.
    """
    if predictions.shape != labels.shape or predictions.dim() < 3 or predictions.shape[1] != 1:
        raise ValueError(
            "mean_foreground_dice: predictions and labels must have one shape (N, 1, *spatial), "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("mean_foreground_dice: labels must hold an image, got none")
    with needs_extra("mean_foreground_dice"):
        from monai.metrics.meandice import DiceMetric
    metric: Any = DiceMetric(include_background=False, ignore_empty=False, num_classes=num_classes)
    metric(predictions, labels)
    return float(metric.aggregate())


def validation_dice(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    refine: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """The mean foreground Dice of a model's predictions.

    Args:
      model: from images to scores (N, num_classes, *spatial); its training mode is kept.
      batches: of "image" and "label", such as a DataLoader over `make_dataset`.
      num_classes: background included.
      refine: what is done to the predicted class maps (N, 1, *spatial), such as
        `dpfast.morphology.refine`.

    Raises:
      ValueError: no image.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                predictions = model(batch["image"].to(device)).argmax(1, keepdim=True)
                if refine is not None:
                    predictions = refine(predictions)
                labels = batch["label"].to(device)
                total += len(labels) * mean_foreground_dice(predictions, labels, num_classes)
                count += len(labels)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("validation_dice: batches must hold an image, got none")
    return total / count
