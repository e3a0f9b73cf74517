"""Per-sample weight gradients of convolutions against the float64 twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfast import reference
from dpfast.ops.conv_grad_sample import ConvSettings, conv_grad_sample, conv_square_norms


def check(x, grad_output, weight_shape, conv, *, tolerance):
    found, bias, squares = conv_grad_sample(x, grad_output, weight_shape, conv)
    truth = reference.conv_weight_grad_sample(
        x,
        grad_output,
        weight_shape,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        transposed=conv.transposed,
        groups=conv.groups,
    )
    assert found.shape == truth.shape
    assert found.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = truth.abs().max().clamp(min=1e-30) if truth.numel() else 1.0
    assert ((found - truth).abs() <= tolerance * scale).all()
    flat = grad_output.double().flatten(2)
    assert bias.dtype == found.dtype
    if squares is not None:
        assert squares.dtype == torch.float64
        assert torch.allclose(squares, found.double().square().flatten(1).sum(1), rtol=1e-12)
    measured = conv_square_norms(x, grad_output, weight_shape, conv)
    assert torch.allclose(measured, found.double().square().flatten(1).sum(1), rtol=1e-12)
    assert ((bias - flat.sum(2)).abs() <= tolerance * flat.abs().sum(2)).all()


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_axis = {
        name: draw(st.lists(values, min_size=axes, max_size=axes))
        for name, values in {
            "stride": small,
            "padding": st.integers(0, 2),
            "dilation": st.integers(1, 2),
            "kernel": st.integers(1, 4),
            "extra": st.integers(0, 9 if axes < 3 else 4),
            "output_padding": st.integers(0, 2),
        }.items()
    }
    transposed = draw(st.booleans())
    # Around the widths of vectors, and several of them.
    channels = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 65])
    weight = [groups * draw(channels), draw(channels)]
    size = [
        (k - 1) * d + 1 + e
        for k, d, e in zip(per_axis["kernel"], per_axis["dilation"], per_axis["extra"], strict=True)
    ]
    odd = [
        min(o, max(s, d) - 1) if transposed else 0
        for o, s, d in zip(
            per_axis["output_padding"], per_axis["stride"], per_axis["dilation"], strict=True
        )
    ]
    conv = ConvSettings(
        per_axis["stride"], per_axis["padding"], per_axis["dilation"], transposed, odd, groups
    )
    shape = [*weight, *per_axis["kernel"]]
    in_channels = weight[0] if transposed else weight[1] * groups
    return (draw(st.sampled_from([0, 1, 3])), in_channels, *size), shape, conv


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_conv_weight_grad_sample_equals_twin(case, dtype):
    shape, weight_shape, conv = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    try:
        output = torch.convolution(x, torch.zeros(weight_shape, dtype=dtype), None, *conv)
    except RuntimeError:  # transposed with a padding that leaves nothing
        return
    grad_output = torch.randn(output.shape, generator=generator).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 2e-2
    check(x, grad_output, weight_shape, conv, tolerance=tolerance)


@pytest.mark.parametrize("channels", [(16, 16), (3, 40)])
@pytest.mark.parametrize("size", [(70, 130), (20, 30, 40)])
def test_conv_weight_grad_sample_equals_twin_over_several_blocks(channels, size):
    axes = len(size)
    conv = ConvSettings([1] * axes, [1] * axes, [1] * axes, False, [0] * axes, 1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels[0], *size, generator=generator)
    grad_output = torch.randn(2, channels[1], *size, generator=generator)
    check(x, grad_output, (channels[1], channels[0], *[3] * axes), conv, tolerance=2e-5)


def test_conv_weight_grad_sample_takes_strided_tensors():
    conv = ConvSettings([2, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x = torch.randn(2, 9, 8, 5).movedim(3, 1)
    grad_output = torch.randn(2, 5, 8, 17).movedim(3, 1)
    check(x, grad_output, (17, 5, 3, 3), conv, tolerance=2e-5)


def test_conv_weight_grad_sample_gives_the_same_bits_for_any_number_of_threads():
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, grad_output = torch.randn(5, 20, 33, 31), torch.randn(5, 70, 33, 31)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(conv_grad_sample(x, grad_output, (70, 20, 3, 3), conv)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
