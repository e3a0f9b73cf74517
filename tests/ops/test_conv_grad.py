"""The ordinary gradients of convolutions against PyTorch's own, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfast.ops.conv_grad import conv_grad, conv_input_grad
from dpfast.ops.conv_grad_sample import ConvSettings


@st.composite
def convolutions(draw):
    """Shapes around the choices: few positions, few channels, padding beyond the kernel."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    small = st.lists(st.integers(1, 2), min_size=axes, max_size=axes)
    stride, dilation = draw(small), draw(small)
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    padding = draw(st.lists(st.integers(0, 3), min_size=axes, max_size=axes))
    extra = draw(st.lists(st.integers(0, 3), min_size=axes, max_size=axes))
    size = [(k - 1) * d + 1 + e for k, d, e in zip(kernel, dilation, extra, strict=True)]
    channels = st.sampled_from([1, 3, 8, 15, 16, 40])
    transposed = draw(st.booleans())
    conv = ConvSettings(
        stride,
        [min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True)]
        if transposed
        else padding,
        dilation,
        transposed,
        [0] * axes,
        groups,
    )
    inner, outer = groups * draw(channels), draw(channels)
    shape = (inner, outer, *kernel) if transposed else (groups * outer, inner // groups, *kernel)
    return (draw(st.integers(1, 3)), inner, *size), shape, conv, draw(st.integers(0, 2**32))


def tensors(case):
    x_shape, weight_shape, conv, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator) for s in (x_shape, weight_shape))
    out = torch.convolution(x, weight, None, *conv)
    return x, weight, torch.randn(out.shape, generator=generator)


def truth(x, weight, grad_output, conv):
    wide = (t.double() for t in (grad_output, x, weight))
    return torch.ops.aten.convolution_backward(*wide, None, *conv, [True, True, False])[:2]


def assert_close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30)


@settings(max_examples=150)
@given(convolutions())
def test_conv_grads_are_pytorchs(case):
    x, weight, grad_output = tensors(case)
    conv = case[2]
    of_input, of_weight = truth(x, weight, grad_output, conv)
    assert_close(conv_input_grad(x, grad_output, weight, conv), of_input)
    found = conv_grad(x, grad_output, weight.shape, conv)
    assert found.is_contiguous()
    assert_close(found, of_weight)


@pytest.mark.parametrize("size", [2, 12])  # by patches, and by the library
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_conv_grad_writes_or_adds_to_out(size, strided, accumulate):
    x, grad_output = torch.randn(1, 64, size, size), torch.randn(1, 64, size, size)
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    shape = torch.Size((64, 64, 3, 3))
    out = torch.ones(shape).transpose(0, 1) if strided else torch.ones(shape)
    returned = conv_grad(x, grad_output, shape, conv, out, accumulate=accumulate)
    assert returned is out
    expected = truth(x, torch.empty(shape), grad_output, conv)[1]
    assert_close(out, expected + 1.0 if accumulate else expected)


def test_conv_input_grad_of_few_channels_keeps_float64():
    x, weight = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    grad_output = torch.randn(2, 4, 6, 6).double()
    expected = truth(x, weight, grad_output, conv)[0]
    assert_close(conv_input_grad(x, grad_output, weight, conv), expected, 1e-14)
