"""Mean foreground Dice against its definition."""

import numpy as np
import pytest
import torch
from torch import nn

from dpfast.segmentation import mean_foreground_dice, validation_dice


def slow_dice(predictions, labels, num_classes):
    scores = []
    for predicted, actual in zip(predictions.numpy(), labels.numpy(), strict=True):
        for c in range(1, num_classes):
            size = (predicted == c).sum() + (actual == c).sum()
            overlap = 2 * ((predicted == c) & (actual == c)).sum()
            scores.append(overlap / size if size else 1.0)
    return float(np.mean(scores))


def test_dice_of_known_maps():
    labels = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]]])
    predictions = torch.tensor([[[0, 1, 0, 2]], [[0, 0, 2, 0]]])
    # Image 1: 2/3 and 1; image 2: absent from both (1) and a false positive (0).
    assert mean_foreground_dice(predictions, labels, 3) == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)])
def test_dice_equals_its_definition(classes, shape):
    generator = torch.Generator().manual_seed(classes)
    maps = torch.randint(classes, (2, 9, 1, *shape), generator=generator)
    maps[0, 0], maps[1, 0], maps[1, 1] = 0, 0, 0
    expected = slow_dice(maps[0], maps[1], classes)
    assert mean_foreground_dice(maps[0], maps[1], classes) == pytest.approx(expected, rel=1e-6)


class Copy(nn.Module):
    """Predicts the image itself, class by class; wrong while it trains."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        scores = torch.cat([image == c for c in range(3)], 1).float() * self.scale
        return -scores if self.training else scores


def test_validation_dice_does_not_depend_on_the_batches_and_leaves_the_mode():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (7, 1, 5, 5), generator=generator)
    images = torch.where(torch.rand(labels.shape, generator=generator) < 0.3, 0, labels)
    model = Copy()
    expected = slow_dice(images, labels, 3)
    for size in (1, 3, 7):
        parts = zip(images.split(size), labels.split(size), strict=True)
        batches = [{"image": i.float(), "label": target} for i, target in parts]
        assert validation_dice(model, batches, 3) == pytest.approx(expected, rel=1e-6)
        assert model.training
    assert validation_dice(model.eval(), batches, 3) == pytest.approx(expected, rel=1e-6)
    assert not model.training


def test_dice_of_nothing_or_of_other_shapes_is_refused():
    maps = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        mean_foreground_dice(maps, maps[:1], 2)
    with pytest.raises(ValueError, match="one shape"):
        mean_foreground_dice(maps[:, 0, 0], maps[:, 0, 0], 2)
    with pytest.raises(ValueError, match="labels must hold an image, got none"):
        mean_foreground_dice(maps[:0], maps[:0], 2)
    with pytest.raises(ValueError, match="batches must hold an image, got none"):
        validation_dice(Copy(), [], 2)
