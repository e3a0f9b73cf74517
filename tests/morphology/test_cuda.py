"""What exists on CUDA alone: the CPU's results, no synchronisation, graphs, streams, same bits."""

import contextlib

import pytest
import torch

from dpfast import morphology
from dpfast.morphology import PerChannel, ellipse

pytestmark = pytest.mark.gpu
OPERATIONS = ("dilation", "erosion", "opening", "closing", "gradient", "top_hat", "black_hat")
BORDERS = {
    border: {"border": border, "border_value": 0.5} if border == "constant" else {"border": border}
    for border in ("geodesic", "constant", "reflect", "mirror", "nearest", "wrap")
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def synchronisation_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def make_image(*shape, dtype=torch.float32, kind="ties"):
    """Random values: some equal; all different; or with NaN and infinities among them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = (2.0 * x).round()
    if kind == "nonfinite":
        chosen = torch.rand(shape, generator=generator)
        x[chosen < 0.01] = float("nan")
        x[(chosen > 0.01) & (chosen < 0.02)] = float("inf")
        x[(chosen > 0.02) & (chosen < 0.03)] = -float("inf")
    return x.to(dtype)


def value_and_gradient(x, operation, size=None, **told):
    """The operation's value with and without a gradient, and the gradient for a fixed direction."""
    silent = getattr(morphology, operation)(x, size, **told)
    x = x.clone().requires_grad_()
    out = getattr(morphology, operation)(x, size, **told)
    generator = torch.Generator().manual_seed(5)
    # Small whole numbers: their sums are exact in every dtype and order.
    direction = torch.randint(-2, 3, x.shape, generator=generator).to(x)
    (gradient,) = torch.autograd.grad(out, x, direction)
    return silent, out.detach(), gradient


def check_equals_cpu(x, cuda, operation, size=None, **told):
    on_cpu = value_and_gradient(x, operation, size, **told)
    on_cuda = value_and_gradient(x.to(cuda), operation, size, **told)
    for expected, got in zip(on_cpu, on_cuda, strict=True):
        assert got.dtype == x.dtype
        assert got.device == cuda
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


# --- the same as on the CPU ---


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("border", list(BORDERS))
def test_cuda_equals_cpu_for_every_operation_and_border(operation, border, cuda):
    check_equals_cpu(make_image(2, 3, 70, 131), cuda, operation, (5, 4), **BORDERS[border])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ties", "different", "nonfinite"])
def test_cuda_equals_cpu_in_every_dtype(dtype, kind, cuda):
    x = make_image(2, 2, 65, 130, dtype=dtype, kind=kind)
    for operation in ("closing", "gradient"):
        check_equals_cpu(x, cuda, operation, 7)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 15, 31, 32, 63, 101, 1001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cuda_equals_cpu_for_windows_of_every_size(size, dtype, cuda):
    x = make_image(1, 2, 224, 300, dtype=dtype, kind="different")
    check_equals_cpu(x, cuda, "opening", size)
    check_equals_cpu(x, cuda, "dilation", (1, size), border="constant")


@pytest.mark.parametrize("border", list(BORDERS))
@pytest.mark.parametrize("size", [3, (2, 5, 9), 21])
def test_cuda_equals_cpu_for_volumes(size, border, cuda):
    check_equals_cpu(make_image(1, 2, 20, 33, 40), cuda, "closing", size, **BORDERS[border])


@pytest.mark.parametrize("border", list(BORDERS))
def test_cuda_equals_cpu_for_flat_and_additive_elements(border, cuda):
    x = make_image(2, 2, 90, 77)
    told = BORDERS[border]
    check_equals_cpu(x, cuda, "closing", footprint=ellipse(13), **told)
    check_equals_cpu(x, cuda, "top_hat", footprint=ellipse((61, 40)), **told)
    structure = torch.linspace(-1.0, 1.0, 35).reshape(5, 7)
    check_equals_cpu(x, cuda, "opening", structure=structure, **told)
    volume = make_image(1, 1, 12, 30, 41)
    check_equals_cpu(volume, cuda, "gradient", footprint=ellipse(9, spatial_dims=3), **told)


def test_cuda_equals_cpu_for_an_element_with_more_parts_than_one_launch_takes(cuda):
    structure = torch.randn(45, 45, generator=torch.Generator().manual_seed(1))
    check_equals_cpu(make_image(1, 1, 64, 64), cuda, "dilation", structure=structure)


def test_cuda_equals_cpu_with_a_program_per_channel(cuda):
    x = make_image(2, 4, 50, 60)
    check_equals_cpu(x, cuda, "closing", PerChannel(3, 3, (5, 1), 9))


def test_cuda_equals_cpu_for_a_channel_of_more_than_32767_elements_and_far_sources(cuda):
    check_equals_cpu(make_image(1, 1, 700, 900, kind="different"), cuda, "closing", 61)


def test_cuda_call_on_an_empty_batch_gives_an_empty_result(cuda):
    assert morphology.closing(torch.zeros(0, 2, 8, 8, device=cuda), 3).shape == (0, 2, 8, 8)


def test_cuda_gradient_of_inexact_sums_equals_the_cpu_within_rounding(cuda):
    x = make_image(2, 2, 80, 90)
    results = []
    for device in ("cpu", cuda):
        leaf = x.to(device).requires_grad_()
        direction = make_image(2, 2, 80, 90, kind="different").to(device)
        out = morphology.closing(leaf, 9)
        results.append(torch.autograd.grad(out, leaf, direction)[0].cpu())
    # At most 17 * 17 terms each, below 5: as many roundings of a sum of that many, on both sides.
    terms = 17 * 17
    torch.testing.assert_close(*results, rtol=0, atol=2 * terms * (5 * terms) * 2**-24)


# --- no synchronisation; streams, graphs ---


def _cases():
    return {
        "box": ("closing", 5, {}),
        "large": ("opening", 201, {}),
        "terms": ("gradient", 3, {"border": "reflect"}),
        "flat": ("dilation", None, {"footprint": ellipse(11)}),
        "additive": ("erosion", None, {"structure": torch.ones(3, 3)}),
    }


@pytest.mark.parametrize("name", list(_cases()))
def test_cuda_call_never_synchronises(name, cuda):
    operation, size, told = _cases()[name]
    x = make_image(2, 2, 100, 120).to(cuda).requires_grad_()
    direction = torch.ones_like(x)

    def run():
        out = getattr(morphology, operation)(x, size, **told)
        return torch.autograd.grad(out, x, direction)

    run()  # loads the kernels
    torch.cuda.synchronize()
    with synchronisation_is_an_error():
        run()


def test_cuda_call_runs_on_the_current_stream(cuda):
    x = make_image(4, 2, 200, 200).to(cuda)
    expected = morphology.closing(x, 9)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the image arrives long after the call is issued
        late.copy_(x)
        out = morphology.closing(late, 9)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", list(_cases()))
def test_cuda_graph_replay_reads_new_images(name, cuda):
    operation, size, told = _cases()[name]
    x = make_image(2, 2, 100, 120, kind="different").to(cuda)
    run = getattr(morphology, operation)
    run(x, size, **told)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, size, **told)
    for _ in range(2):
        x.copy_(x.flip(-1) * 0.5)
        graph.replay()
        assert torch.equal(out, run(x, size, **told))


# --- repeatability ---


@pytest.mark.parametrize("border", ["geodesic", "wrap"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gradient_repeats_bit_for_bit(dtype, border, cuda):
    x = make_image(3, 4, 150, 170, dtype=dtype).to(cuda).requires_grad_()
    direction = make_image(3, 4, 150, 170, dtype=dtype, kind="different").to(cuda)
    first = None
    for _ in range(5):
        out = morphology.closing(x, 15, border=border)
        (gradient,) = torch.autograd.grad(out, x, direction)
        first = gradient if first is None else first
        assert torch.equal(gradient, first)
