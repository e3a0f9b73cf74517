"""Bad input: a clear error, and nothing done."""

import pytest
import torch

from dpfast.morphology import PerChannel, apply, closing, cross, dilation, ellipse

X = torch.zeros(1, 2, 6, 6)
HEIGHTS = torch.zeros(3, 3)
LEARNT = torch.zeros(3, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X.long()}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": X[0]}, ValueError, r"x must have shape .* got \(2, 6, 6\)"),
        ({"x": X[None, None]}, ValueError, "x must have shape"),
        ({"size": 0}, ValueError, "size must be >= 1"),
        ({"size": 2**20}, ValueError, "size must be >= 1 and <= 32768"),
        ({"size": 3.0}, TypeError, "size must be whole numbers, got 3.0"),
        ({"size": True}, TypeError, "size must be whole numbers"),
        ({"size": (3, 3, 3)}, ValueError, "must have 2 axes like x, got 3"),
        ({"size": (3,)}, ValueError, "size must have 2 or 3 axes"),
        ({"size": 3, "footprint": ellipse(3)}, ValueError, "size must not be given with footprint"),
        ({"footprint": torch.zeros(3, 3)}, ValueError, "footprint must have a position"),
        ({"footprint": torch.ones(3)}, ValueError, "must have 2 axes like x, got 1"),
        ({"footprint": torch.ones(0, 3)}, ValueError, "footprint must not be empty"),
        ({"footprint": "disk"}, TypeError, "footprint must be an array"),
        ({"structure": HEIGHTS * torch.nan}, ValueError, "structure must be finite"),
        (
            {"structure": HEIGHTS.clone().requires_grad_()},
            ValueError,
            "must not require a gradient",
        ),
        (
            {"structure": torch.zeros(3, 3), "footprint": ellipse(5)},
            ValueError,
            "footprint must have the shape of structure",
        ),
        (
            {"structure": torch.zeros(2, 6), "footprint": torch.ones(3, 4)},
            ValueError,
            "footprint must have the shape of structure",
        ),
        ({"size": 3, "origin": 2}, ValueError, "origin must be >= -1 and <= 1 for a size of 3"),
        ({"size": 4, "origin": -3}, ValueError, "origin must be >= -2 and <= 1"),
        ({"size": 3, "origin": 0.5}, TypeError, "origin must be whole numbers"),
        ({"size": 3, "origin": (0, 0, 0)}, ValueError, "origin must have 2 axes"),
        ({"border": "zero"}, ValueError, "border must be one of geodesic"),
        ({"border": None}, TypeError, "border must be a str"),
        ({"border_value": 1.0}, ValueError, "border_value has no effect with border 'geodesic'"),
        ({"border": "constant", "border_value": torch.nan}, ValueError, "must not be NaN"),
        ({"border": "constant", "border_value": "1"}, TypeError, "border_value must be a number"),
        ({"size": PerChannel(3, 3, 3)}, ValueError, "size must have 2 values, one per channel"),
        ({"operation": "close"}, ValueError, "operation must be one of dilation"),
        ({"operation": PerChannel("closing")}, ValueError, "operation must have 2 values"),
        ({"operation": None}, TypeError, "operation must be a str"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    given = {"x": X, "operation": "closing", **arguments}
    with pytest.raises(error, match=message) as raised:
        apply(**given)
    assert str(raised.value).startswith("apply: ")


def test_the_error_names_the_function_that_was_called():
    with pytest.raises(ValueError, match=r"^closing: size"):
        closing(X, -1)
    with pytest.raises(ValueError, match=r"^ellipse: size"):
        ellipse(0)
    with pytest.raises(ValueError, match=r"^cross: spatial_dims"):
        cross(3, spatial_dims=4)
    with pytest.raises(ValueError, match="PerChannel: there must be one value"):
        PerChannel()


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="bordr"):
        dilation(X, 3, bordr="wrap")


def test_shapes_of_elements():
    for size in (1, 2, 3):  # the corner's centre is nearer than the rim
        assert ellipse(size).all()
    rows = [(~row).nonzero().flatten().tolist() for row in ellipse(5)]
    assert rows == [[0, 4], [], [], [], [0, 4]]
    assert abs(float(ellipse(101).sum()) / (torch.pi * 50.5**2) - 1.0) < 0.01
    assert ellipse(7, spatial_dims=3).shape == (7, 7, 7)
    assert int(cross(5).sum()) == 9
    assert int(cross((4, 5)).sum()) == 12
    assert int(cross(3, spatial_dims=3).sum()) == 7
    for mask in (ellipse(9), ellipse((4, 7)), cross((2, 6)), ellipse((3, 4, 5))):
        assert torch.equal(mask, mask.flip(*range(mask.dim())))
