"""Dice of predicted class maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dpfast.segmentation._extras import needs_extra

__all__ = ["ClassScores", "class_scores", "mean_foreground_dice", "validation_dice"]


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


class ClassScores(NamedTuple):
    """How well each foreground class was found in each image; shape (N, num_classes - 1), float64.

    NaN where the image does not have the class.

    Attributes:
      dice: overlap, from 0 to 1.
      hausdorff95: 95 % Hausdorff distance between the boundaries, in pixels; the image's diagonal
        where the class was not found at all.
      surface_dice: share of both boundaries that lies within the tolerance of the other, 0 to 1.
    """

    dice: torch.Tensor
    hausdorff95: torch.Tensor
    surface_dice: torch.Tensor


def class_scores(
    predictions: torch.Tensor, labels: torch.Tensor, num_classes: int, *, tolerance: float = 1.0
) -> ClassScores:
    """Overlap and boundary measures of each class, by MONAI.

    Args:
      predictions: class numbers, shape (N, 1, *spatial).
      labels: likewise.
      num_classes: background included.
      tolerance: of the surface Dice, in pixels.

    Raises:
      ValueError: other shapes. ImportError: MONAI is not installed.
    """
    if predictions.shape != labels.shape or predictions.dim() < 3 or predictions.shape[1] != 1:
        raise ValueError(
            "class_scores: predictions and labels must have one shape (N, 1, *spatial), got "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    with needs_extra("class_scores"):
        from monai.metrics.hausdorff_distance import compute_hausdorff_distance
        from monai.metrics.meandice import compute_dice
        from monai.metrics.surface_dice import compute_surface_dice
    found, truth = (
        torch.nn.functional.one_hot(each[:, 0].long(), num_classes).movedim(-1, 1).float()
        for each in (predictions, labels)
    )
    present = truth.flatten(2).any(2)[:, 1:]
    missed = present & ~found.flatten(2).any(2)[:, 1:]
    with warnings.catch_warnings():
        # MONAI's, about classes without a boundary, which are handled below.
        warnings.simplefilter("ignore")
        dice = compute_dice(found, truth, include_background=False)
        distance = compute_hausdorff_distance(
            found, truth, include_background=False, percentile=95.0
        )
        surface = compute_surface_dice(
            found, truth, [tolerance] * (num_classes - 1), include_background=False
        )
    diagonal = math.dist([0] * len(labels.shape[2:]), labels.shape[2:])
    scores = []
    for each, worst in ((dice, 0.0), (distance, diagonal), (surface, 0.0)):
        filled = torch.where(missed, worst, each.double())
        scores.append(torch.where(present, filled, torch.nan))
    return ClassScores(*scores)


def validation_dice(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    class_maps: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """The mean foreground Dice of a model's predictions.

    Args:
      model: from images to scores (N, num_classes, *spatial); its training mode is kept.
      batches: of "image" and "label", such as a DataLoader over `make_dataset`.
      num_classes: background included.
      class_maps: from scores to predicted classes (N, 1, *spatial); None: the highest score's.

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
                scores = model(batch["image"].to(device))
                if class_maps is None:
                    predictions = scores.argmax(1, keepdim=True)
                else:
                    predictions = class_maps(scores)
                labels = batch["label"].to(device)
                total += len(labels) * mean_foreground_dice(predictions, labels, num_classes)
                count += len(labels)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("validation_dice: batches must hold an image, got none")
    return total / count
