"""clip_and_noise at its edges: empty and odd sizes, structures, strides, memory."""

import math
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from dpfast import NoiseSource, clip_and_noise
from tests.helpers import DTYPES, check_against_twin, make_grads

Layer = namedtuple("Layer", ["weight", "bias"])
PLAIN = {"max_grad_norm": 0.7, "noise_multiplier": 0.4}


# --- sizes ---


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_and_noise_equals_twin_around_chunk_sizes(columns, dtype, device):
    grads = make_grads(3, [(columns,)], dtype=dtype, device=device)
    check_against_twin(grads, **PLAIN)
    check_against_twin(grads, mechanism="laplace", **PLAIN)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 600])
@pytest.mark.parametrize("with_units", [False, True])
def test_clip_and_noise_equals_twin_for_any_number_of_rows(rows, with_units, device):
    ids = torch.arange(rows, device=device) * 7919 % max(1, rows // 2) if with_units else None
    grads = make_grads(rows, [(33,), (4,)], device=device)
    check_against_twin(grads, privacy_unit_ids=ids, **PLAIN)


@pytest.mark.parametrize("same", [True, False])
def test_clip_and_noise_equals_twin_with_one_large_unit_or_many_units(same, device):
    ids = torch.zeros(300, dtype=torch.int64) if same else torch.randperm(300) - 150
    grads = make_grads(300, [(40,)], device=device)
    check_against_twin(grads, privacy_unit_ids=ids.to(device), **PLAIN)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_clip_and_noise_takes_empty_parameters(rows, grouped, device):
    grads = make_grads(rows, [(0,), (4, 0, 2), (5,)], device=device)
    bound = [0.1, 0.2, 0.3] if grouped else 0.3
    check_against_twin(grads, max_grad_norm=bound, noise_multiplier=1.0)


def test_clip_and_noise_of_nothing_but_empty_parameters_is_empty(device):
    source = NoiseSource(1)
    out, stats = clip_and_noise(
        torch.zeros(3, 0, device=device), noise=source, return_stats=True, **PLAIN
    )
    assert out.shape == (0,)
    assert stats.sensitive_norms.cpu().tolist() == [0.0, 0.0, 0.0]
    assert source.step == 1


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("clipping", ["flat", "custom"])
@pytest.mark.parametrize("given", [False, True])
def test_clip_and_noise_of_empty_batch_is_noise_alone(ids, clipping, given, device):
    empty = torch.zeros(0, device=device)
    check_against_twin(
        make_grads(0, device=device),
        clipping=empty if clipping == "custom" else "flat",
        privacy_unit_ids=empty.long() if ids else None,
        norms=empty if given else None,
        **PLAIN,
    )


def test_clip_and_noise_without_noise_of_empty_batch_is_zero(device):
    out = clip_and_noise(
        make_grads(0, device=device), max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none"
    )
    assert all((o == 0).all() for o in out)


@pytest.mark.slow
def test_clip_and_noise_takes_many_small_tensors(device):
    grads = make_grads(3, [(1 + k % 5,) for k in range(700)], device=device)
    check_against_twin(grads, **PLAIN)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 65504.0, 2.0**-24, 2.0**-149, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_clip_and_noise_equals_twin_for_extreme_values(value, dtype, norm, device):
    grads = [torch.full((2, 3), value, dtype=torch.float64).to(dtype).to(device)]
    if not grads[0].isfinite().all():
        pytest.skip("the value is not finite in this dtype")
    check_against_twin(grads, norm=norm, **PLAIN)


@pytest.mark.parametrize("rule", ["flat", "automatic", "auto_v", "normalized", "psac", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_and_noise_drops_nonfinite_units(rule, bad, dtype, device):
    grads = make_grads(6, [(40,), (3,)], dtype=dtype, device=device)
    grads[0][1, 17] = bad
    grads[1][4, 2] = bad
    for ids in (None, torch.tensor([5, 6, 7, 7, 8, 9], device=device)):
        out, stats = check_against_twin(
            grads,
            max_grad_norm=1.0,
            noise_multiplier=0.3,
            clipping=rule,
            privacy_unit_ids=ids,
        )
        assert int(stats.sensitive_num_nonfinite) == 2
        assert all(o.isfinite().all() for o in out)


def test_clip_and_noise_drops_unit_from_all_groups_if_one_is_nonfinite(device):
    grads = make_grads(4, [(6,), (3,)], device=device)
    grads[1][2, 0] = float("nan")
    check_against_twin(grads, max_grad_norm=[0.5, 0.6], noise_multiplier=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_and_noise_larger_than_the_caches_gives_the_same_bits_in_parts(dtype, device):
    # Large outputs are written around the caches, here to a place that fits no vector.
    rows, columns, cut = 9, 2**21 // dtype.itemsize * 2 + 5, 2**18
    generator = torch.Generator().manual_seed(4)
    grads = torch.randn(rows, columns, generator=generator, dtype=dtype).to(device)
    assert grads.nbytes > 2**25
    buffer = torch.full((columns + 2,), 7.0, dtype=dtype, device=device)
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "mechanism": "none"}
    _, stats = clip_and_noise(grads, out=buffer[1:-1], return_stats=True, **settings)
    for start in range(0, columns, cut):
        part = clip_and_noise(
            grads[:, start : start + cut], norms=stats.sensitive_norms, **settings
        )
        assert torch.equal(buffer[1:-1][start : start + cut], part)
    assert buffer[0] == 7.0
    assert buffer[-1] == 7.0


# --- structures ---


def test_clip_and_noise_returns_the_structure_it_was_given(device):
    first, second = make_grads(3, [(4, 2), (5,)], device=device)

    def run(grads, **more):
        return clip_and_noise(grads, noise=NoiseSource(2), **PLAIN, **more)

    as_list = run([first, second])
    assert isinstance(as_list, list)
    as_tuple = run((first, second))
    assert type(as_tuple) is tuple
    named = run(Layer(first, second))
    assert isinstance(named, Layer)
    mapping = {"a.weight": first, "b": second}
    as_dict = run(mapping)
    assert list(as_dict) == ["a.weight", "b"]
    for kind in (OrderedDict, MappingProxyType):
        assert list(run(kind(mapping))) == ["a.weight", "b"]
    for other in (as_tuple, tuple(named), tuple(as_dict.values())):
        assert all(torch.equal(a, b) for a, b in zip(as_list, other, strict=True))
    single = run(first)
    assert torch.equal(single, run([first])[0])


def test_clip_and_noise_writes_out_by_key_and_returns_it(device):
    first, second = make_grads(3, [(4, 2), (5,)], device=device)
    out = {"b": torch.empty(5, device=device), "a": torch.empty(4, 2, device=device)}
    result = clip_and_noise({"a": first, "b": second}, out=out, noise=NoiseSource(2), **PLAIN)
    assert result is out
    expected = clip_and_noise({"a": first, "b": second}, noise=NoiseSource(2), **PLAIN)
    assert all(torch.equal(out[key], expected[key]) for key in expected)


def test_clip_and_noise_takes_bounds_and_weights_by_key(device):
    first, second = make_grads(3, [(4, 2), (5,)], device=device)
    by_key = clip_and_noise(
        {"a": first, "b": second},
        max_grad_norm={"b": 0.2, "a": 0.5},
        group_noise_weights={"b": 3.0, "a": 1.0},
        noise_multiplier=1.0,
        noise=NoiseSource(2),
    )
    in_order = clip_and_noise(
        [first, second],
        max_grad_norm=[0.5, 0.2],
        group_noise_weights=(1.0, 3.0),
        noise_multiplier=1.0,
        noise=NoiseSource(2),
    )
    assert all(torch.equal(a, b) for a, b in zip(by_key.values(), in_order, strict=True))


def test_clip_and_noise_stats_have_documented_shapes(device):
    grads = make_grads(4, [(6,), (3,)], device=device)
    _, one = clip_and_noise(grads, return_stats=True, **PLAIN)
    assert one.max_grad_norm.shape == ()
    assert one.sensitive_norms.shape == (4,)
    _, many = clip_and_noise(
        grads, max_grad_norm=[1.0, 2.0], noise_multiplier=1.0, return_stats=True
    )
    assert many.max_grad_norm.shape == (2,)
    assert many.sensitive_norms.shape == (2, 4)
    for stats in (one, many):
        assert stats.sensitive_num_nonfinite.shape == ()
        assert stats.sensitive_num_nonfinite.dtype == torch.int64
        assert stats.max_grad_norm.dtype == stats.sensitive_norms.dtype == torch.float64
        assert stats.max_grad_norm.device == grads[0].device


# --- memory ---


def _column_strided(grad):
    wide = torch.zeros(*grad.shape[:-1], 2 * grad.shape[-1], dtype=grad.dtype, device=grad.device)
    wide[..., ::2] = grad
    return wide[..., ::2]


def _row_strided(grad):
    taller = torch.full((2 * len(grad), *grad.shape[1:]), math.nan).to(grad)
    taller[::2] = grad
    return taller[::2]


def _transposed(grad):
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


def _batch_last(grad):
    return grad.movedim(0, -1).contiguous().movedim(-1, 0)


def _unaligned(grad):
    flat = torch.empty(grad.numel() + 1, dtype=grad.dtype, device=grad.device)
    flat[1:] = grad.reshape(-1)
    return flat[1:].view(grad.shape)


def _channels_last(grad):
    return grad[..., None].to(memory_format=torch.channels_last)[..., 0]


LAYOUTS = (_column_strided, _row_strided, _transposed, _batch_last, _unaligned, _channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_and_noise_gives_same_bits_for_any_layout(layout, dtype, device):
    (grad,) = make_grads(5, [(7, 37)], dtype=dtype, device=device)
    odd = layout(grad)
    assert torch.equal(odd, grad)
    expected = clip_and_noise(grad, noise=NoiseSource(1), **PLAIN)
    assert torch.equal(clip_and_noise(odd, noise=NoiseSource(1), **PLAIN), expected)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_clip_and_noise_gives_same_bits_for_any_column_stride(layout, device):
    (grad,) = make_grads(40, [(40,)], device=device)
    odd = {"strided": grad[:, ::3], "transposed": grad.t(), "expanded": grad[:, :1].expand(40, 40)}
    expected = clip_and_noise(odd[layout].contiguous(), noise=NoiseSource(1), **PLAIN)
    assert torch.equal(clip_and_noise(odd[layout], noise=NoiseSource(1), **PLAIN), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_clip_and_noise_takes_expanded_gradients(axis, device):
    shape = [4, 5, 6]
    shape[axis] = 1
    grad = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(device).expand(4, 5, 6)
    expected = clip_and_noise(grad.contiguous(), noise=NoiseSource(1), **PLAIN)
    assert torch.equal(clip_and_noise(grad, noise=NoiseSource(1), **PLAIN), expected)
    check_against_twin([grad], **PLAIN)


def test_clip_and_noise_takes_gradients_sharing_memory_with_each_other(device):
    (grad,) = make_grads(4, [(6,)], device=device)
    check_against_twin([grad, grad, grad[:, 1:4]], **PLAIN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_clip_and_noise_writes_noncontiguous_out_and_nothing_beside_it(dtype, accumulate, device):
    (grad,) = make_grads(5, [(7, 37)], dtype=dtype, device=device)
    start = torch.linspace(-1, 1, 7 * 37, dtype=dtype).reshape(7, 37).to(device)
    plain = start.clone()
    clip_and_noise(grad, out=plain, accumulate=accumulate, noise=NoiseSource(1), **PLAIN)
    wide = torch.full((37, 14), -5.0, dtype=dtype, device=device)
    view = wide[:, ::2].t()
    view.copy_(start)
    clip_and_noise(grad, out=view, accumulate=accumulate, noise=NoiseSource(1), **PLAIN)
    assert torch.equal(view, plain)
    assert (wide[:, 1::2] == -5.0).all()


def test_clip_and_noise_writes_unaligned_out(device):
    (grad,) = make_grads(5, [(300,)], device=device)
    base = torch.full((302,), -5.0, device=device)
    out = clip_and_noise(grad, out=base[1:301], noise=NoiseSource(1), **PLAIN)
    assert torch.equal(out, clip_and_noise(grad, noise=NoiseSource(1), **PLAIN))
    assert base[0] == -5.0
    assert base[301] == -5.0


def test_clip_and_noise_leaves_its_inputs_unchanged(device):
    grads = make_grads(5, device=device)
    before = [g.clone() for g in grads]
    ids = torch.tensor([3, 1, 3, 2, 1], device=device)
    norms = torch.tensor([1.0, 2.0, 3.0], device=device)
    clip_and_noise(grads, privacy_unit_ids=ids, norms=norms, **PLAIN)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert ids.tolist() == [3, 1, 3, 2, 1]
    assert norms.tolist() == [1.0, 2.0, 3.0]


def test_clip_and_noise_output_requires_no_grad(device):
    grad = torch.ones(3, 4, device=device, requires_grad=True)
    out = clip_and_noise(grad, **PLAIN)
    assert not out.requires_grad


def test_clip_and_noise_takes_negated_views(device):
    values = torch.complex(torch.zeros(3, 4), torch.arange(12.0).reshape(3, 4)).to(device)
    negated = values.conj().imag
    assert negated.is_neg()
    expected = clip_and_noise(negated.clone().resolve_neg(), noise=NoiseSource(1), **PLAIN)
    assert torch.equal(clip_and_noise(negated, noise=NoiseSource(1), **PLAIN), expected)


# --- processes ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_clip_and_noise_works_first_in_a_child_of_a_process_that_used_threads():
    # PyTorch's threads do not survive the fork; a call that waited for them would hang, as
    # PyTorch's own does.
    code = """
import os, sys, torch
torch.set_num_threads(2)
import dpfast
grads = torch.ones(16, 2**17)
child = os.fork()
if child == 0:
    out = dpfast.clip_and_noise(
        grads, max_grad_norm=1e9, noise_multiplier=0.0, mechanism="none"
    )
    torch.set_num_threads(1)
    os._exit(0 if float(out.min()) > 15.99 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=False, cwd=Path(__file__).anchor
    )
    assert run.returncode == 0
