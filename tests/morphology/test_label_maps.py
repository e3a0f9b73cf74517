"""Refining label maps, and measuring how thick a class is."""

import pytest
import torch

from dpfast.morphology import refine
from dpfast.morphology.label_maps import thickness

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def picture(text):
    return torch.tensor([[int(c) for c in line] for line in text.split()]).unsqueeze(0)


def random_maps(*shape, num_classes, seed=0):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [False, True])
def test_a_hole_is_closed_and_a_speck_opened_in_every_dtype(dtype, channel):
    opened = torch.zeros(1, 9, 14, dtype=dtype)
    opened[:, 3:6, 2:5] = 1
    closed = opened.clone()
    closed[:, 4, 9] = 1
    before = closed.clone()
    before[:, 4, 3] = 0
    if channel:
        before, closed, opened = (each.unsqueeze(1) for each in (before, closed, opened))
    kept = before.clone()
    for operation, expected in (("close", closed), ("both", torch.zeros_like(closed))):
        result = refine(before, operation, 3)
        assert (result.dtype, result.shape) == (dtype, before.shape)
        assert torch.equal(result, expected)
    assert torch.equal(refine(closed, "open", 3), opened)
    assert torch.equal(before, kept)


def test_who_held_a_pixel_keeps_it_and_others_fall_to_the_lowest_class():
    # Dilated by one pixel to each side: both classes claim the pixel between them.
    before = picture("00000 20103 00000")
    assert torch.equal(refine(before, "dilation", 3, num_classes=4), picture("21113 21113 21113"))
    assert torch.equal(refine(picture("0120"), "dilation", (1, 3), num_classes=3), picture("1122"))
    before = picture("3012")
    assert torch.equal(refine(before, "dilation", (1, 3), num_classes=4), picture("3112"))


def test_what_no_class_holds_is_background():
    before = picture("22222 22222 22122 22222 22222")
    expected = picture("22222 22222 22022 22222 22222")
    operations = {1: ("open", 3), 2: None}
    assert torch.equal(refine(before, per_class=operations, num_classes=3), expected)


def test_another_class_may_be_the_background():
    before = picture("11111 11111 11011 11111 11111")
    assert torch.equal(refine(before, "open", 3, background=1), torch.ones_like(before))
    assert torch.equal(refine(before, "open", 3)[0, 2, 2], torch.tensor(0))


@pytest.mark.parametrize("shape", [(3, 9, 10), (2, 6, 7, 8), (2, 1, 6, 7, 8), (0, 9, 9)])
def test_the_rule_pixel_by_pixel(shape):
    before = random_maps(*shape, num_classes=4)
    result = refine(before, "close", 3, num_classes=4)
    assert result.shape == before.shape
    claims = torch.stack(
        [refine(before == c, "close", 3) for c in range(1, 4)]
    )  # each class by itself
    for old, new, held in zip(before.flatten(), result.flatten(), claims.flatten(1).T, strict=True):
        holders = [c + 1 for c in range(3) if held[c]]
        if old in holders:
            assert new == old
        else:
            assert new == (holders[0] if holders else 0)


def test_refining_twice_changes_nothing_where_classes_are_apart():
    before = (random_maps(2, 12, 12, num_classes=3) == 0).long()
    once = refine(before, "close", 3)
    assert torch.equal(refine(once, "close", 3), once)


@pytest.mark.parametrize(
    ("mask", "arguments", "error", "message"),
    [
        ([[0]], {}, TypeError, "mask must be a tensor"),
        (torch.zeros(1, 3, 3), {}, TypeError, "mask must be bool or an integer type"),
        (torch.zeros(3, 3, dtype=torch.uint8), {}, ValueError, "mask must have shape"),
        (torch.zeros(1, 2, 3, 3, 3, dtype=torch.uint8), {}, ValueError, "mask must have shape"),
        (torch.full((1, 3, 3), 2), {}, ValueError, "class numbers from 0 to 1"),
        (torch.full((1, 3, 3), -1), {}, ValueError, "class numbers from 0 to 1"),
        (torch.ones(1, 3, 3) > 0, {"num_classes": 3}, ValueError, "num_classes must be 2 for a"),
        (torch.full((1, 3, 3), 1), {"num_classes": 1}, ValueError, "num_classes must be >= 2"),
        (torch.full((1, 3, 3), 1), {"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        (torch.full((1, 3, 3), 1), {"background": 2}, ValueError, "background must be >= 0"),
        (torch.full((1, 3, 3), 1), {"background": None}, TypeError, "background must be an int"),
        (torch.full((1, 3, 3), 1), {"per_class": {0: ("open", 3)}}, ValueError, "not name the"),
        (torch.full((1, 3, 3), 1), {"per_class": {2: None}}, ValueError, "per_class must fit"),
    ],
)
def test_what_cannot_be_refined_is_refused(mask, arguments, error, message):
    with pytest.raises(error, match=message):
        refine(mask, **arguments)


def slow_thickness(region):
    """The largest box by trying all."""
    for side in range(min(region.shape), 0, -1):
        windows = region
        for axis in range(region.dim()):
            windows = windows.unfold(axis, side, 1)
        if bool(windows.flatten(region.dim()).all(-1).any()):
            return side
    return 0


@pytest.mark.parametrize("shape", [(12, 9), (6, 7, 8), (1, 5)])
def test_thickness_is_that_of_the_largest_box(shape):
    for seed in range(20):
        noise = random_maps(*shape, num_classes=6, seed=seed)
        labels = torch.tensor([0, 1, 1, 1, 2, 2])[noise]  # class 3 does not occur
        found = thickness(labels, 4, 99)
        assert found == [slow_thickness(labels == c) for c in (1, 2, 3)]
        assert found[2] == 0
        assert thickness(labels, 4, 2) == [min(side, 2) for side in found]


def test_thickness_reaches_the_image_borders():
    assert thickness(torch.ones(7, 9, dtype=torch.int64), 2, 99) == [7]
    assert thickness(torch.ones(8, 8, 8, dtype=torch.int64), 2, 99) == [8]
    assert thickness(torch.zeros(8, 8, dtype=torch.int64), 2, 99) == [0]
