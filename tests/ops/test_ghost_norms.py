"""Norms of per-sample gradients from inner products: right, and never below the exact ones."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfast import reference
from dpfast.ops import ghost_norms
from dpfast.ops.conv_grad_sample import ConvSettings, conv_square_norms
from dpfast.ops.ghost_norms import ghost_square_norms
from tests.ops.test_noise import cpu_lacks, run_with_isa

# Of squared norms, what the bound on rounding errors may add to ordinary data.
ORDINARY = 1e-6


def norms_by_twin(x, grad_output, weight_shape, conv):
    grads = reference.conv_weight_grad_sample(
        x,
        grad_output,
        weight_shape,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        transposed=conv.transposed,
        groups=1,
    )
    return grads.flatten(1).square().sum(1)


def ghost_of(x, grad_output, weight_shape, conv):
    anchor, moving = (x, grad_output) if conv.transposed else (grad_output, x)
    return ghost_square_norms(
        anchor,
        moving,
        kernel=weight_shape[2:],
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
    )


def linear_ghost(x, grad_output):
    """Of a linear layer: x (N, T, d), grad_output (N, T, p)."""
    return ghost_square_norms(
        grad_output.transpose(1, 2),
        x.transpose(1, 2),
        kernel=[1],
        stride=[1],
        padding=[0],
        dilation=[1],
    )


@st.composite
def convolutions(draw):
    """Shapes of a convolution without groups; padding beyond the kernel among them."""
    axes = draw(st.integers(1, 3))
    most = {1: 9, 2: 5, 3: 3}[axes]

    def per_axis(low, high):
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    transposed = draw(st.booleans())
    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2)
    padding, extra = per_axis(0, 5), per_axis(0, most)
    odd = [
        min(1, max(s, d) - 1) if transposed else 0 for s, d in zip(stride, dilation, strict=True)
    ]
    conv = ConvSettings(stride, padding, dilation, transposed, odd, 1)
    weight_shape = [draw(st.sampled_from([1, 2, 5, 17])), draw(st.sampled_from([1, 3, 8])), *kernel]
    size = [
        max(1, (k - 1) * d + 1 + e - (0 if transposed else 2 * p))
        for k, d, e, p in zip(kernel, dilation, extra, padding, strict=True)
    ]
    channels = weight_shape[0] if transposed else weight_shape[1]
    return (draw(st.sampled_from([0, 1, 3])), channels, *size), weight_shape, conv


def tensors_for(case, dtype=torch.float64, seed=0):
    """An input and a gradient of the output, or None where there is no output."""
    shape, weight_shape, conv = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    try:
        output = torch.convolution(x, torch.zeros(weight_shape, dtype=dtype), None, *conv)
    except RuntimeError:  # transposed with a padding that leaves nothing
        return None
    if not output.numel() and shape[0]:
        return None
    return x, torch.randn(output.shape, generator=generator).to(dtype)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_ghost_square_norms_equal_those_of_the_twin(case, dtype):
    tensors = tensors_for(case, dtype)
    if tensors is None:
        return
    truth = norms_by_twin(*tensors, *case[1:])
    found = ghost_of(*tensors, *case[1:])
    assert found.dtype == torch.float64
    assert found.shape == truth.shape
    # The twin's own sums are rounded in float64.
    assert (found >= truth * (1 - 1e-12)).all()
    assert (found <= truth * (1 + ORDINARY)).all()
    if len(found):
        direct = conv_square_norms(*tensors, *case[1:])
        # The gradients' own roundings; products of bfloat16 tensors are rounded to it.
        rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        assert ((found - direct).abs() <= rounding * found.max()).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_ghost_square_norms_by_library_equal_the_kernels(case):
    tensors = tensors_for(case)
    if tensors is None:
        return
    found = ghost_of(*tensors, *case[1:])
    calls = []

    def by_library(*args, **settings):
        calls.append(settings)
        return ghost_norms._by_library(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ghost_norms._native, "ghost_norm", by_library)
        by_ops = ghost_of(*tensors, *case[1:])
    assert bool(calls) == (len(found) > 0)
    torch.testing.assert_close(by_ops, found, rtol=1e-10, atol=0.0)
    truth = norms_by_twin(*tensors, *case[1:])
    assert (by_ops >= truth * (1 - 1e-12)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_windows_outside_of_the_input_add_nothing(transposed):
    conv = ConvSettings([1, 2], [4, 5], [1, 1], transposed, [0, 0], 1)
    shape, size = (2, 3, 12, 14), [3, 2, 2, 3]
    x, grad_output = tensors_for(((2, size[0] if transposed else size[1], *shape[2:]), size, conv))
    truth = norms_by_twin(x, grad_output, size, conv)
    found = ghost_of(x, grad_output, size, conv)
    assert torch.allclose(found, truth, rtol=ORDINARY, atol=0.0)
    assert (found >= truth * (1 - 1e-12)).all()
    if not transposed:
        # The first row of the output sees padding alone.
        grad_output[:, :, 0] = 7.0
        changed = ghost_of(x, grad_output, size, conv)
        assert torch.allclose(changed, truth, rtol=ORDINARY, atol=0.0)


def test_kernel_that_never_meets_the_input_has_norm_zero():
    conv = ConvSettings([9], [3], [1], False, [0], 1)
    x, grad_output = torch.ones(2, 1, 1), torch.ones(2, 4, 1)
    assert ghost_of(x, grad_output, [4, 1, 2], conv).tolist() == [0.0, 0.0]


def test_chunks_of_samples_give_what_single_samples_give(monkeypatch):
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, grad_output = tensors_for(((7, 3, 6, 5), [4, 3, 3, 3], conv))
    whole = ghost_of(x, grad_output, [4, 3, 3, 3], conv)
    for size in (1, ghost_norms.ghost_bytes((4, 3), (30, 30)) * 3):
        monkeypatch.setattr(ghost_norms, "_CHUNK_BYTES", size)
        chunked = ghost_of(x, grad_output, [4, 3, 3, 3], conv)
        assert torch.allclose(chunked, whole, rtol=1e-13, atol=0.0)


def test_strided_and_graph_bearing_tensors_are_taken():
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, grad_output = tensors_for(((2, 3, 6, 5), [4, 3, 3, 3], conv))
    plain = ghost_of(x, grad_output, [4, 3, 3, 3], conv)
    strided = x.movedim(1, 3).contiguous().movedim(3, 1).requires_grad_()
    found = ghost_of(strided, grad_output.flip(0).flip(0), [4, 3, 3, 3], conv)
    assert torch.allclose(found, plain, rtol=1e-13, atol=0.0)
    assert not found.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "grad_output"])
@pytest.mark.parametrize("by_library", [False, True])
def test_norm_of_a_sample_that_is_not_finite_is_not_finite(bad, where, by_library, monkeypatch):
    conv = ConvSettings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, grad_output = tensors_for(((3, 2, 4, 4), [3, 2, 3, 3], conv))
    truth = norms_by_twin(x, grad_output, [3, 2, 3, 3], conv)
    {"x": x, "grad_output": grad_output}[where][1, 1, 2, 2] = bad
    if by_library:
        monkeypatch.setattr(ghost_norms._native, "ghost_norm", ghost_norms._by_library)
    found = ghost_of(x, grad_output, [3, 2, 3, 3], conv)
    assert not found[1].isfinite()
    assert torch.allclose(found[[0, 2]], truth[[0, 2]], rtol=1e-9)


# --- never below the exact norm ---


def exact_square_norm(anchor, moving, conv, kernel):
    """One sample's, in rational numbers: anchor (m, *positions), moving (n, *spatial)."""

    def rational(tensor):
        return [
            {
                place: Fraction(float(channel[place]))
                for place in itertools.product(*map(range, channel.shape))
            }
            for channel in tensor
        ]

    anchors, movings = rational(anchor), rational(moving)
    total = Fraction(0)
    for tap in itertools.product(*map(range, kernel)):
        met = []
        for place in anchors[0]:
            at = tuple(
                p * s - before + t * d
                for p, s, before, t, d in zip(
                    place, conv.stride, conv.padding, tap, conv.dilation, strict=True
                )
            )
            if at in movings[0]:
                met.append((place, at))
        for first, second in itertools.product(anchors, movings):
            total += sum((first[p] * second[q] for p, q in met), Fraction(0)) ** 2
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1e3, 1e6, 1e9]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ghost_square_norms_are_never_below_the_exact_ones(
    seed, axes, transposed, common, by_library, dtype
):
    # Common-mode inputs and gradients that sum to zero: the terms cancel, the more the larger.
    conv = ConvSettings([1] * axes, [1] * axes, [1] * axes, transposed, [0] * axes, 1)
    kernel = [3] if axes == 1 else [2, 2]
    size = [9] if axes == 1 else [3, 4]
    weight_shape = [2, 2, *kernel]
    x, grad_output = tensors_for(((1, 2, *size), weight_shape, conv), seed=seed)
    grad_output -= grad_output.mean(tuple(range(2, 2 + axes)), keepdim=True)
    x, grad_output = (x + common).to(dtype), grad_output.to(dtype)
    anchor, moving = (x, grad_output) if transposed else (grad_output, x)
    exact = exact_square_norm(anchor[0], moving[0], conv, kernel)
    with pytest.MonkeyPatch.context() as patch:
        if by_library:
            patch.setattr(ghost_norms._native, "ghost_norm", ghost_norms._by_library)
        found = Fraction(float(ghost_of(x, grad_output, weight_shape, conv)))
    assert found >= exact
    if common <= 1.0:
        assert found <= exact * Fraction(1 + ORDINARY)


def test_ghost_square_norms_of_equal_positions_that_cancel_entirely_are_not_negative():
    x = torch.full((1, 64, 3), 1e8)
    grad_output = torch.randn(1, 64, 2).double()
    grad_output -= grad_output.mean(1, keepdim=True)
    found = linear_ghost(x, grad_output)
    assert (found >= 0).all()
    exact = grad_output.sum(1).square().sum() * 3e16
    assert found >= exact


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("channels", [8, 64])
def test_common_mode_activations_do_not_hide_a_norm(channels, by_library, monkeypatch):
    # DP_SPEC, floating point: 2048 positions, inputs around 1000, gradients that sum to zero.
    if by_library:
        monkeypatch.setattr(ghost_norms._native, "ghost_norm", ghost_norms._by_library)
    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = 1000 + torch.randn(1, 2048, channels, generator=generator)
        grad_output = torch.randn(1, 2048, channels, generator=generator)
        grad_output -= grad_output.mean(1, keepdim=True)
        gradient = grad_output.double().transpose(1, 2) @ x.double()
        exact = float(gradient.square().sum())
        # What float32 makes of it.
        naive = float(((x @ x.mT) * (grad_output @ grad_output.mT)).sum())
        worst = max(worst, 1 - math.sqrt(max(naive, 0.0) / exact))
        found = float(linear_ghost(x, grad_output))
        # The float64 sums of the exact value are good to 2^-53 times 45,000, which cancels.
        assert found >= exact * (1 - 1e-9)
        # PyTorch's sums may take 2 * 2048 additions one after the other: five times the bound.
        assert math.sqrt(found / exact) <= 1 + (1e-3 if by_library else 1e-4)
    assert worst > 0.005


# --- instruction sets ---

ISA_CASES = """
import torch
from dpfast.ops.ghost_norms import ghost_square_norms

def found():
    generator = torch.Generator().manual_seed(0)
    for channels, size, kernel, stride, padding, dilation in (
        ((3, 5), [37], [3], [1], [1], [1]),
        ((1, 2), [23], [4], [3], [5], [2]),
        ((4, 3), [7, 9], [3, 2], [1, 1], [1, 0], [1, 2]),
        ((2, 2), [6, 11], [3, 3], [2, 2], [1, 4], [1, 1]),
        ((2, 3), [4, 3, 9], [2, 3, 3], [1, 2, 1], [0, 1, 1], [1, 1, 1]),
    ):
        positions = [
            (n + 2 * p - (k - 1) * d - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
        ]
        anchor = torch.randn(2, channels[0], *positions, generator=generator)
        moving = torch.randn(2, channels[1], *size, generator=generator)
        settings = dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
        yield anchor, moving, settings, ghost_square_norms(anchor, moving, **settings)
"""
PRINT = """
from dpfast import _native
for *_, norms in found():
    print(*[value.hex() for value in norms.tolist()])
"""


@pytest.fixture(scope="module")
def isa_truth():
    """By this process, compared with the twin."""
    scope = {}
    exec(ISA_CASES, scope)
    rows = []
    for anchor, moving, told, norms in scope["found"]():
        weight_shape = [anchor.shape[1], moving.shape[1], *told["kernel"]]
        conv = ConvSettings(
            told["stride"], told["padding"], told["dilation"], False, [0] * len(told["stride"]), 1
        )
        truth = norms_by_twin(moving, anchor, weight_shape, conv)
        assert torch.allclose(norms, truth, rtol=1e-9, atol=0.0)
        rows.append(truth)
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_ghost_square_norms_are_right_on_every_instruction_set(name, isa_truth):
    if missing := cpu_lacks(name):
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    run = run_with_isa(name, ISA_CASES + PRINT)
    assert run.returncode == 0, run.stderr
    found = torch.tensor([float.fromhex(v) for v in run.stdout.split()], dtype=torch.float64)
    assert torch.allclose(found, isa_truth, rtol=1e-9, atol=0.0)
    assert (found >= isa_truth * (1 - 1e-12)).all()
