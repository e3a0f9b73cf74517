import math

import pytest
import torch

from dpfast.segmentation.metrics import class_scores

pytest.importorskip("monai")


def test_a_perfect_prediction_and_a_shifted_one():
    truth = torch.zeros(2, 1, 20, 30, dtype=torch.long)
    truth[:, :, 4:12, 5:15] = 1
    truth[:, :, 14:18, 5:15] = 2
    shifted = truth.clone()
    shifted[1] = truth[1].roll(3, -1)
    scores = class_scores(shifted, truth, 3)
    assert scores.dice[0].tolist() == [1.0, 1.0]
    assert scores.hausdorff95[0].tolist() == [0.0, 0.0]
    assert scores.surface_dice[0].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scores.dice[1], torch.full((2,), 0.7).double())
    assert scores.hausdorff95[1].tolist() == [3.0, 3.0]
    assert (scores.surface_dice[1] < 1.0).all()
    # Within three pixels all of the boundary is found.
    assert class_scores(shifted, truth, 3, tolerance=3.0).surface_dice[1].tolist() == [1.0, 1.0]


def test_a_class_that_was_missed_counts_as_the_worst_and_an_absent_one_not_at_all():
    truth = torch.zeros(1, 1, 6, 8, 10, dtype=torch.long)
    truth[0, 0, 2:4, 2:5, 2:5] = 1
    empty = torch.zeros_like(truth)
    scores = class_scores(empty, truth, 3)
    assert float(scores.dice[0, 0]) == 0.0
    assert float(scores.surface_dice[0, 0]) == 0.0
    assert float(scores.hausdorff95[0, 0]) == pytest.approx(math.dist((0, 0, 0), (6, 8, 10)))
    assert all(math.isnan(float(each[0, 1])) for each in scores)
    # Found where it is not: still not counted for that class.
    wrong = truth + (truth == 1).long()
    assert all(math.isnan(float(each[0, 1])) for each in class_scores(wrong, truth, 3))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="class_scores: predictions and labels must have one"):
        class_scores(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5), 2)
