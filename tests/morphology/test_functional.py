"""The operations against SciPy, the twin, max-pool and kornia."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from dpfast.morphology import (
    OPERATIONS,
    PerChannel,
    apply,
    black_hat,
    closing,
    cross,
    dilation,
    ellipse,
    erosion,
    gradient,
    opening,
    top_hat,
)
from tests.morphology.helpers import BORDERS, check_against_twin

SCIPY = {
    "dilation": ndimage.grey_dilation,
    "erosion": ndimage.grey_erosion,
    "opening": ndimage.grey_opening,
    "closing": ndimage.grey_closing,
    "gradient": ndimage.morphological_gradient,
    "top_hat": ndimage.white_tophat,
    "black_hat": ndimage.black_tophat,
}
OURS = {f.__name__: f for f in (dilation, erosion, opening, closing, gradient, top_hat, black_hat)}


def by_scipy(operation, x, **settings):
    channels = [SCIPY[operation](c, **settings) for c in x.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(channels)).reshape(x.shape)


@pytest.mark.parametrize("operation", SCIPY)
@pytest.mark.parametrize("shape", [(13, 37), (6, 9, 20)])
@pytest.mark.parametrize("border", BORDERS[1:])
def test_boxes_of_every_size_equal_scipy(operation, shape, border):
    torch.manual_seed(0)
    x = torch.randn(1, 2, *shape)
    value = 0.3 if border == "constant" else 0.0
    for size in (*range(1, 10), 15, 16, 31):
        want = by_scipy(operation, x, size=(size,) * len(shape), mode=border, cval=value)
        got = OURS[operation](x, size, border=border, border_value=value)
        assert torch.equal(got, want), size
        traced = apply(x.requires_grad_(), operation, size, border=border, border_value=value)
        assert torch.equal(traced.detach(), want), size
        x = x.detach()


@pytest.mark.parametrize("operation", ["dilation", "erosion", "opening", "closing"])
@pytest.mark.parametrize("size", [3, 4, 15])
def test_the_geodesic_border_is_that_of_infinite_padding(operation, size):
    torch.manual_seed(1)
    x = torch.randn(1, 1, 20, 24)
    # A single stage: what lies outside never wins.
    for stage in ("dilation", "erosion"):
        outside = -np.inf if stage == "dilation" else np.inf
        want = by_scipy(stage, x, size=(size, size), mode="constant", cval=outside)
        assert torch.equal(OURS[stage](x, size), want)
    first, second = {"opening": (erosion, dilation), "closing": (dilation, erosion)}.get(
        operation, (OURS[operation], lambda y, _: y)
    )
    assert torch.equal(OURS[operation](x, size), second(first(x, size), size))


@pytest.mark.parametrize("operation", SCIPY)
@pytest.mark.parametrize("border", BORDERS[1:])
def test_elements_of_any_shape_equal_scipy(operation, border):
    torch.manual_seed(2)
    value = -0.2 if border == "constant" else 0.0
    for shape, footprint in (
        ((17, 23), ellipse((7, 5))),
        ((17, 23), cross((4, 9))),
        ((17, 23), torch.rand(5, 6) < 0.4),
        ((7, 9, 11), ellipse(5, spatial_dims=3)),
        ((7, 9, 11), torch.rand(3, 4, 6) < 0.3),
    ):
        x = torch.randn(1, 2, *shape)
        mask = footprint.numpy()
        want = by_scipy(operation, x, footprint=mask, mode=border, cval=value)
        got = OURS[operation](x, footprint=footprint, border=border, border_value=value)
        assert torch.equal(got, want)
        heights = torch.rand(footprint.shape).double()
        want = by_scipy(
            operation, x, footprint=mask, structure=heights.numpy(), mode=border, cval=value
        )
        got = OURS[operation](
            x, footprint=footprint, structure=heights, border=border, border_value=value
        )
        # SciPy sums in double precision, and closes and opens in single.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", ["dilation", "erosion", "opening", "closing"])
@pytest.mark.parametrize(
    ("size", "origin"), [((4, 5), (1, -2)), ((2, 7), (-1, 3)), ((6, 1), (2, 0))]
)
def test_the_origin_is_scipys(operation, size, origin):
    x = torch.randn(1, 1, 15, 16)
    want = by_scipy(operation, x, size=size, origin=origin, mode="reflect")
    assert torch.equal(OURS[operation](x, size, origin=origin, border="reflect"), want)
    mask = torch.rand(size) < 0.6
    mask[0, 0] = True
    want = by_scipy(operation, x, footprint=mask.numpy(), origin=origin, mode="mirror")
    got = OURS[operation](x, footprint=mask, origin=origin, border="mirror")
    assert torch.equal(got, want)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_the_twin_with_ties(operation, dtype):
    torch.manual_seed(3)
    for shape, footprint, border in (
        ((9, 18), torch.ones(3, 4, dtype=torch.bool), "geodesic"),
        ((9, 18), ellipse(5), "constant"),
        ((5, 4, 9), torch.ones(3, 2, 5, dtype=torch.bool), "reflect"),
        ((5, 4, 9), cross(3, spatial_dims=3), "wrap"),
    ):
        x = torch.randint(-3, 4, (2, 2, *shape)).to(dtype)  # many equal values
        grad = torch.randint(-4, 5, x.shape)
        settings = {"border": border, "border_value": 1.0 if border == "constant" else 0.0}
        check_against_twin(x, operation, footprint, grad, **settings)
        if bool(footprint.all()):
            size = tuple(footprint.shape)
            check_against_twin(x, operation, footprint, grad, size=size, **settings)
        heights = torch.randint(-2, 3, footprint.shape).double()
        check_against_twin(x, operation, footprint, grad, structure=heights, **settings)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("operation", ["dilation", "erosion", "closing", "gradient", "top_hat"])
def test_nan_spreads_over_the_element_and_infinities_are_values(operation, border):
    torch.manual_seed(4)
    x = torch.randn(2, 2, 11, 21)
    x[0, 0, 3, 5] = x[0, 1, 0, 0] = torch.nan
    x[0, 0, 8, 8] = x[1, 0, 2, 2] = torch.inf
    x[0, 0, 9, 15] = x[1, 0, 5, 9] = -torch.inf
    x[1, 1] = -torch.inf
    grad = torch.ones(x.shape)
    for dtype in (torch.float32, torch.float64):
        for size in (2, 3, 7):
            footprint = torch.ones(size, size, dtype=torch.bool)
            settings = {"border": border, "border_value": 0.5 if border == "constant" else 0.0}
            check_against_twin(x.to(dtype), operation, footprint, grad, size=size, **settings)
            check_against_twin(x.to(dtype), operation, ellipse(size), grad, **settings)


def test_an_element_that_lies_outside_wholly_gives_no_value_and_no_gradient():
    x = torch.randn(1, 1, 4, 5, requires_grad=True)
    left = torch.tensor([[True, False, False]])  # of the input to the right in a dilation
    grown, shrunk = dilation(x, footprint=left), erosion(x, footprint=left)
    assert torch.equal(grown[..., :-1], x[..., 1:])
    assert (grown[..., -1] == -torch.inf).all()
    assert torch.equal(shrunk[..., 1:], x[..., :-1])
    assert (shrunk[..., 0] == torch.inf).all()
    grown.backward(torch.ones_like(grown))
    assert torch.equal(x.grad[..., 1:], torch.ones(1, 1, 4, 4))
    assert (x.grad[..., 0] == 0).all()
    y = closing(x.detach().requires_grad_(), footprint=left)
    assert torch.equal(y[..., 1:], x.detach()[..., 1:])


@pytest.mark.parametrize("size", [3, 5, 9])
def test_gradients_equal_those_of_max_pool(size):
    torch.manual_seed(5)
    for pool, shape in ((functional.max_pool2d, (12, 17)), (functional.max_pool3d, (6, 7, 11))):
        values = torch.randn(2, 3, *shape)
        steps = torch.randint(0, 4, values.shape).float()  # ties
        for x, operation in itertools.product((values, steps), ("dilation", "closing")):
            if operation == "closing" and x is steps:
                continue  # max-pool sends a tie back stage by stage

            def pooled(y, pool=pool):
                return pool(y, size, 1, size // 2)

            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            got = OURS[operation](ours, size)
            want = pooled(theirs) if operation == "dilation" else -pooled(-pooled(theirs))
            assert torch.equal(got, want)
            grad = torch.randn_like(got)
            got.backward(grad)
            want.backward(grad)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", SCIPY)
def test_values_and_gradients_equal_kornias(operation):
    kornia = pytest.importorskip("kornia.morphology")
    torch.manual_seed(6)
    names = {"black_hat": "bottom_hat"}
    theirs = getattr(kornia, names.get(operation, operation))
    for footprint, heights in (
        (torch.ones(3, 5), None),
        (ellipse((5, 7)).float(), None),
        (cross(5).float(), torch.rand(5, 5)),
    ):
        x = torch.randn(2, 2, 14, 19)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got = OURS[operation](a, footprint=footprint, structure=heights)
        want = theirs(b, footprint, structuring_element=heights)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        grad = torch.randn_like(got)
        got.backward(grad)
        want.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("border", BORDERS)
def test_gradcheck(operation, border):
    torch.manual_seed(7)
    value = 0.1 if border == "constant" else 0.0

    def run(x, **element):
        return apply(x, operation, border=border, border_value=value, **element)

    flat = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(1, 1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(x, size=(3, 2)), flat)
    assert torch.autograd.gradcheck(lambda x: run(x, footprint=cross(3)), flat)
    heights = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: run(x, structure=heights), flat)
    assert torch.autograd.gradcheck(lambda x: run(x, size=(2, 3, 3)), deep)


def test_a_channel_may_have_an_operation_and_an_element_of_its_own():
    x = torch.randn(2, 5, 16, 18, requires_grad=True)
    operations = ("closing", "identity", "gradient", "top_hat", "erosion")
    sizes = (3, 1, (5, 2), 7, 31)
    together = apply(x, PerChannel(*operations), PerChannel(*sizes))
    alone = [
        apply(x[:, c : c + 1], operation, size)
        for c, (operation, size) in enumerate(zip(operations, sizes, strict=True))
    ]
    assert torch.equal(together, torch.cat(alone, 1))
    grad = torch.randn_like(together)
    (mine,) = torch.autograd.grad(together, x, grad)
    (theirs,) = torch.autograd.grad(torch.cat(alone, 1), x, grad)
    torch.testing.assert_close(mine, theirs)  # the order of a sum depends on the largest element
    masks = PerChannel(ellipse(3), ellipse(5), cross(3), ellipse((3, 9)), torch.ones(2, 2))
    got = dilation(x, footprint=masks)
    for c, mask in enumerate(masks.values):
        assert torch.equal(got[:, c : c + 1], dilation(x[:, c : c + 1], footprint=mask))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 300, 260), 7),
        ((1, 2, 40, 50, 60), 7),
        ((1, 1, 65, 35, 47), 3),
        ((1, 1, 301, 290), 15),
    ],
)
def test_bits_do_not_depend_on_the_number_of_threads(shape, size):
    x = torch.randn(shape)
    grad = torch.randn(shape)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            traced = x.clone().requires_grad_()
            out = closing(traced, size)
            out.backward(grad)
            masked = opening(x, footprint=ellipse(5, spatial_dims=len(shape) - 2))
            found.append((closing(x, size), out.detach(), traced.grad, masked))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_layouts_empty_batches_and_single_elements():
    x = torch.randn(2, 3, 9, 10)
    assert torch.equal(closing(x.to(memory_format=torch.channels_last), 3), closing(x, 3))
    assert torch.equal(closing(x[:, :, ::2, 1:], 3), closing(x[:, :, ::2, 1:].contiguous(), 3))
    assert torch.equal(dilation(x.transpose(2, 3), (3, 5)), dilation(x, (5, 3)).transpose(2, 3))
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        empty = torch.empty(shape, requires_grad=True)
        closing(empty, 3).sum().backward()
        assert empty.grad.shape == shape
    one = torch.randn(1, 1, 1, 1)
    for border in BORDERS:
        value = float(one) if border == "constant" else 0.0
        assert torch.equal(closing(one, 31, border=border, border_value=value), one)
