"""The CUDA kernels of per-sample convolution gradients: exact, repeatable, asynchronous."""

import contextlib

import pytest
import torch

from dpfast import _native, reference
from dpfast.ops.conv_grad_sample import ConvSettings, conv_grad_sample

pytestmark = pytest.mark.gpu

# name: (x, weight, stride, padding, dilation, groups), a convolution.
CASES = {
    "1d": ((3, 5, 301), (7, 5, 4), [2], [1], [1], 1),
    "2d": ((2, 16, 40, 33), (24, 16, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "2d even rows": ((2, 16, 32, 32), (70, 16, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "2d strided": ((3, 17, 21, 30), (40, 17, 3, 2), [2, 1], [2, 0], [1, 1], 1),
    "2d dilated": ((2, 8, 30, 31), (130, 8, 3, 3), [1, 1], [2, 3], [2, 3], 1),
    "2d grouped": ((2, 12, 19, 20), (18, 4, 3, 3), [1, 1], [1, 1], [1, 1], 3),
    "2d depthwise": ((2, 9, 19, 20), (9, 1, 3, 3), [1, 1], [1, 1], [1, 1], 9),
    "2d to one channel": ((2, 33, 25, 24), (1, 33, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "2d few positions": ((3, 130, 5, 4), (64, 130, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "2d many positions": ((1, 2, 300, 301), (3, 2, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "3d": ((2, 6, 9, 10, 11), (33, 6, 3, 3, 3), [1, 1, 1], [1, 1, 1], [1, 1, 1], 1),
    "3d strided": ((2, 16, 9, 10, 12), (32, 16, 2, 3, 3), [2, 2, 1], [0, 1, 1], [1, 1, 2], 1),
}

# Sums in float32 of at most 10^5 products: 2^-24 a step, in a random walk, of the largest result.
EXACT = 2e-5
# TF32 rounds either factor by 2^-11.
TF32 = 4e-3


def make_case(name, *, transposed=False, dtype=torch.float32):
    """CPU tensors; the random values are exact in every dtype of the tests."""
    shape, weight_shape, stride, padding, dilation, groups = CASES[name]
    conv = ConvSettings(stride, padding, dilation, False, [0] * len(stride), groups)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    output = torch.convolution(x, torch.zeros(weight_shape, dtype=dtype), None, *conv)
    grad_output = torch.randn(output.shape, generator=generator).to(dtype)
    if transposed:  # input and output change places
        x, grad_output = grad_output, x
        conv = conv._replace(transposed=True)
    return x, grad_output, weight_shape, conv


def twin(x, grad_output, weight_shape, conv):
    return reference.conv_weight_grad_sample(
        x,
        grad_output,
        weight_shape,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        transposed=conv.transposed,
        groups=conv.groups,
    )


def check(found, truth, tolerance):
    assert found.dtype == torch.float32
    assert found.shape == truth.shape
    assert ((found.cpu() - truth).abs().max() <= tolerance * truth.abs().max()).all()


@pytest.fixture
def tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    return request.param


exact = pytest.mark.parametrize("tf32", [False], indirect=True, ids=["float32"])
both_precisions = pytest.mark.parametrize(
    "tf32", [False, True], indirect=True, ids=["float32", "tf32"]
)


# --- against the float64 twin ---


@both_precisions
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_cuda_conv_grad_sample_equals_twin(name, transposed, tf32, cuda):
    x, grad_output, weight_shape, conv = make_case(name, transposed=transposed)
    found, bias, _ = conv_grad_sample(x.to(cuda), grad_output.to(cuda), weight_shape, conv)
    check(found, twin(x, grad_output, weight_shape, conv), TF32 if tf32 else EXACT)
    check(bias, grad_output.double().flatten(2).sum(2), EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(CASES))
def test_cuda_conv_grad_sample_sums_16_bit_inputs_in_float32(name, dtype, cuda):
    x, grad_output, weight_shape, conv = make_case(name, dtype=dtype)
    found, *_ = conv_grad_sample(x.to(cuda), grad_output.to(cuda), weight_shape, conv)
    check(found, twin(x, grad_output, weight_shape, conv), EXACT)  # of the rounded inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@exact
def test_cuda_conv_grad_sample_takes_strided_and_unaligned_tensors(tf32, dtype, cuda):
    x, grad_output, weight_shape, conv = make_case("2d even rows", dtype=dtype)
    truth = twin(x, grad_output, weight_shape, conv)
    last = [t.to(cuda).contiguous(memory_format=torch.channels_last) for t in (x, grad_output)]
    check(conv_grad_sample(*last, weight_shape, conv)[0], truth, EXACT)
    shifted = []
    for t in (x, grad_output):
        room = torch.empty(t.numel() + 1, dtype=dtype, device=cuda)
        shifted.append(room[1:].view(t.shape).copy_(t))
    check(conv_grad_sample(*shifted, weight_shape, conv)[0], truth, EXACT)


@exact
def test_cuda_conv_grad_sample_equals_one_grouped_convolution(tf32, cuda):
    x, grad_output, weight_shape, conv = make_case("2d even rows")
    x, grad_output = x.to(cuda), grad_output.to(cuda)
    samples = x.shape[0]
    grouped = torch.ops.aten.convolution_backward(
        grad_output.flatten(0, 1)[None],
        x.flatten(0, 1)[None],
        x.new_empty(()).expand(samples * weight_shape[0], *weight_shape[1:]),
        None,
        *conv._replace(groups=samples),
        [False, True, False],
    )[1]
    found, *_ = conv_grad_sample(x, grad_output, weight_shape, conv)
    check(found, grouped.view(samples, *weight_shape).double().cpu(), EXACT)


def test_cuda_conv_grad_sample_of_float64_goes_to_the_library(cuda):
    x, grad_output, weight_shape, conv = make_case("2d", dtype=torch.float64)
    found, *_ = conv_grad_sample(x.to(cuda), grad_output.to(cuda), weight_shape, conv)
    truth = twin(x, grad_output, weight_shape, conv)
    assert found.dtype == torch.float64
    assert ((found.cpu() - truth).abs() <= 1e-12 * truth.abs().max()).all()


def test_cuda_conv_grad_sample_of_no_samples(cuda):
    x, grad_output, weight_shape, conv = make_case("2d")
    found, bias, _ = conv_grad_sample(x[:0].to(cuda), grad_output[:0].to(cuda), weight_shape, conv)
    assert found.shape == (0, *weight_shape)
    assert bias.shape == (0, weight_shape[0])


# --- precision is PyTorch's setting ---


def test_cuda_conv_grad_sample_uses_tf32_only_where_pytorch_may(monkeypatch, cuda):
    x, grad_output, weight_shape, conv = make_case("2d even rows")
    truth = twin(x, grad_output, weight_shape, conv)
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        found, *_ = conv_grad_sample(x.to(cuda), grad_output.to(cuda), weight_shape, conv)
        errors[allowed] = float((found.cpu() - truth).abs().max())
    assert 20.0 * errors[False] < errors[True]


# --- norms ---


def native_call(x, grad_output, weight_shape, conv, *, out, norms, allow_tf32):
    _native.conv_grad(
        grad_output,
        x,
        out,
        groups=conv.groups,
        kernel=weight_shape[2:],
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        swapped=False,
        square_norms=norms,
        allow_tf32=allow_tf32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["2d", "2d grouped", "2d many positions", "3d strided"])
def test_cuda_square_norms_are_those_of_the_stored_values(name, dtype, cuda):
    x, grad_output, weight_shape, conv = make_case(name, dtype=dtype)
    told = (x.to(cuda), grad_output.to(cuda), weight_shape, conv)
    out = torch.full((x.shape[0], *weight_shape), float("nan"), device=cuda)
    for allow_tf32 in (False, True):
        norms = torch.full((x.shape[0],), float("nan"), dtype=torch.float64, device=cuda)
        native_call(*told, out=out, norms=norms, allow_tf32=allow_tf32)
        stored = out.double().flatten(1).square().sum(1)
        assert ((norms - stored).abs() <= 1e-12 * stored).all()


@pytest.mark.parametrize("name", ["2d", "2d many positions"])
def test_cuda_square_norms_alone_are_never_from_tf32(name, cuda):
    x, grad_output, weight_shape, conv = make_case(name)
    told = (x.to(cuda), grad_output.to(cuda), weight_shape, conv)
    out = torch.empty(x.shape[0], *weight_shape, device=cuda)
    norms = [torch.empty(x.shape[0], dtype=torch.float64, device=cuda) for _ in range(2)]
    native_call(*told, out=out, norms=norms[0], allow_tf32=False)
    native_call(*told, out=None, norms=norms[1], allow_tf32=True)
    assert torch.equal(norms[0], norms[1])


# --- repeatable, asynchronous, in graphs ---


@both_precisions
def test_cuda_conv_grad_sample_repeats_its_bits(tf32, cuda):
    for name in ("2d many positions", "3d"):
        x, grad_output, weight_shape, conv = make_case(name)
        told = (x.to(cuda), grad_output.to(cuda), weight_shape, conv)
        first = conv_grad_sample(*told)
        for _ in range(5):
            again = conv_grad_sample(*told)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@contextlib.contextmanager
def synchronisation_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_cuda_conv_grad_sample_never_synchronises(cuda):
    for name in ("2d", "2d many positions"):
        x, grad_output, weight_shape, conv = make_case(name)
        told = (x.to(cuda), grad_output.to(cuda), weight_shape, conv)
        conv_grad_sample(*told)  # the first use loads kernels
        torch.cuda.synchronize()
        with synchronisation_is_an_error():
            conv_grad_sample(*told)


def test_cuda_conv_grad_sample_runs_on_the_current_stream(cuda):
    x, grad_output, weight_shape, conv = make_case("2d")
    x, grad_output = x.to(cuda), grad_output.to(cuda)
    expected, *_ = conv_grad_sample(x, grad_output, weight_shape, conv)
    late = torch.zeros_like(grad_output)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the gradients arrive long after the call is issued
        late.copy_(grad_output)
        found, *_ = conv_grad_sample(x, late, weight_shape, conv)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["2d", "2d many positions"])
def test_cuda_conv_grad_sample_works_in_a_graph(name, cuda):
    x, grad_output, weight_shape, conv = make_case(name)
    x, grad_output = x.to(cuda), grad_output.to(cuda)
    expected = conv_grad_sample(x, grad_output, weight_shape, conv)
    seen = torch.zeros_like(grad_output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = conv_grad_sample(x, seen, weight_shape, conv)
    seen.copy_(grad_output)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- contract ---


def test_cuda_conv_grad_refuses_two_dtypes(cuda):
    x, grad_output, weight_shape, conv = make_case("2d")
    out = torch.empty(x.shape[0], *weight_shape, device=cuda)
    with pytest.raises(TypeError, match=r"^conv_grad: anchor and moving must have one dtype"):
        native_call(
            x.to(cuda).half(),
            grad_output.to(cuda),
            weight_shape,
            conv,
            out=out,
            norms=None,
            allow_tf32=False,
        )
