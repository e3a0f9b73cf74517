"""The op as torch.library and torch.compile see it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpfast.morphology import PerChannel, apply, closing, ellipse
from dpfast.morphology.elements import make_element
from dpfast.morphology.functional import OPERATIONS
from dpfast.ops._morphology_program import encode

# torch's own, while inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


def program_of(operation, size, channels, border="geodesic"):
    element = make_element("test", size, None, None, 0, 2)
    return encode((OPERATIONS[operation](element),) * channels, border, 0.0)


@pytest.mark.parametrize("operation", ["closing", "gradient", "top_hat"])
def test_opcheck_passes(operation):
    x = torch.randn(2, 3, 9, 10, requires_grad=True)
    program, values, chains = program_of(operation, 3, 3)
    op = torch.ops.dpfast.morphology.default
    torch.library.opcheck(op, (x, program, values, chains))
    torch.library.opcheck(op, (x.detach(), program, values, 0))
    index = op(x, program, values, chains)[1]
    backward = torch.ops.dpfast.morphology_backward.default
    # Its own gradient is refused, so that it is not among the checks.
    torch.library.opcheck(backward, (torch.randn(x.shape), index, program, values))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_needs_no_graph_break(backend):
    torch._dynamo.reset()
    mask = ellipse(5).tolist()  # what is traced must not read a tensor

    def refined(x):
        y = apply(x * 2.0, PerChannel("closing", "top_hat", "identity"), 3)
        return closing(y, footprint=mask).square()

    compiled = torch.compile(refined, fullgraph=True, backend=backend)
    x, y = (torch.randn(2, 3, 12, 13) for _ in range(2))
    y = y.requires_grad_()
    for given in (x, y):
        assert torch.equal(compiled(given), refined(given))
    grads = [torch.autograd.grad(f(y).sum(), y)[0] for f in (compiled, refined)]
    assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(compiled(y), refined(y))


def test_fake_tensors_have_the_shapes_and_the_index_its_dtype():
    for side, size, dtype in (
        (40, 31, torch.int16),
        (3000, 31, torch.int16),
        (3000, 301, torch.int32),
    ):
        program, values, chains = program_of("gradient", size, 2)
        with FakeTensorMode():
            x = torch.empty(4, 2, side, side)
            out, index = torch.ops.dpfast.morphology(x, program, values, chains)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert (index.shape, index.dtype) == ((2, *x.shape), dtype)


@pytest.mark.parametrize(
    ("border", "shape", "size", "dtype"),
    [
        ("geodesic", (1200, 1200), (61, 3), torch.int16),  # in boxes
        ("geodesic", (1000, 1000), (201, 201), torch.int32),
        ("wrap", (190, 190), (61, 3), torch.int32),
        ("reflect", (30, 90, 90), (7, 9, 5), torch.int16),  # in boxes
        ("wrap", (12, 70, 60), (3, 3, 5), torch.int32),
        ("nearest", (25, 60, 60), (21, 3, 21), torch.int16),
    ],
)
def test_far_sources_are_found(border, shape, size, dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 1, *shape)
    grads = []
    for each in (size, (3,) * len(shape)):
        y = x.clone().requires_grad_()
        out = closing(y, each, border=border)
        if each is size:
            assert out.grad_fn.saved_tensors[0].dtype == dtype
        out.backward(torch.ones_like(out))
        grads.append(y.grad)
        # Every output has one source.
        assert int(y.grad.sum()) == x.numel()
        assert torch.isin(out.detach(), x[y.grad > 0]).all()
    assert not torch.equal(*grads)


def test_an_index_is_kept_for_gradients_alone():
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    program, values, _ = program_of("closing", 3, 1)
    assert torch.ops.dpfast.morphology(x, program, values, 0)[1].numel() == 0
    with torch.no_grad():
        assert not closing(x, 3).requires_grad
    out = torch.ops.dpfast.morphology(x, program, values, 0)[0]
    with pytest.raises(RuntimeError, match="x must require a gradient"):
        out.sum().backward()


def test_a_second_gradient_is_refused():
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(closing(x, 3).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a gradient"):
        grad.sum().backward()
