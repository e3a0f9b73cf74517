"""What exists on CUDA alone: same noise as the CPU, no synchronisation, graphs, streams."""

import contextlib

import pytest
import torch

from dpfast import NoiseSource, clip_and_noise, reference
from tests import tolerances
from tests.helpers import DTYPES, allowed_error, check_close, make_grads, twin_noise

pytestmark = pytest.mark.gpu
PLAIN = {"max_grad_norm": 0.7, "noise_multiplier": 0.4}


@contextlib.contextmanager
def synchronisation_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- the same as on the CPU ---


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("columns", [1, 255, 257, 4097, 1 << 22])
def test_cuda_noise_has_the_bits_of_the_cpu_in_float32(mechanism, columns, cuda):
    results = []
    for device in ("cpu", cuda):
        source = NoiseSource(5)
        zeros = [torch.zeros(2, columns, device=device), torch.zeros(2, 3, 5, device=device)]
        for _ in range(2):
            results.append(
                clip_and_noise(
                    zeros,
                    max_grad_norm=1.0,
                    noise_multiplier=1.0,
                    mechanism=mechanism,
                    noise=source,
                )
            )
        assert source.step == 2
    for a, b in ((results[0], results[2]), (results[1], results[3])):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_cuda_equals_cpu_for_large_gradients(dtype, norm, cuda):
    grads = make_grads(16, [(1 << 18,), (1000, 33), (7,)], dtype=dtype)
    told = {"max_grad_norm": 0.7, "noise_multiplier": 0.01, "norm": norm}
    on_cpu = clip_and_noise(grads, noise=NoiseSource(1), **told)
    on_cuda = clip_and_noise([g.to(cuda) for g in grads], noise=NoiseSource(1), **told)
    noise = twin_noise(grads, 1, 0, "gaussian")
    expected = reference.clip_and_noise(grads, noise=noise, **told)
    errors = [2.0 * e for e in allowed_error(grads, expected, noise, {})]
    check_close(on_cuda, [o.double() for o in on_cpu], errors)


def test_cuda_noise_source_follows_the_gradients_and_keeps_its_count(cuda):
    source = NoiseSource(3)
    drawn = [
        clip_and_noise(torch.zeros(1, 500, device=device), noise=source, **PLAIN).cpu()
        for device in ("cpu", cuda, "cpu", cuda)
    ]
    assert source.step == 4
    again = NoiseSource(3)
    for out in drawn:
        assert torch.equal(out, clip_and_noise(torch.zeros(1, 500), noise=again, **PLAIN))


# --- no synchronisation ---


def _sync_cases(device):
    ids = torch.tensor([7, 3, 7, 9, 3, 1], device=device)
    return {
        "plain": PLAIN,
        "laplace": {**PLAIN, "mechanism": "laplace"},
        "silent": {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "mechanism": "none"},
        "groups": {**PLAIN, "max_grad_norm": [0.5, 0.6], "group_noise_weights": "proportional"},
        "units": {**PLAIN, "privacy_unit_ids": ids},
        "bound": {**PLAIN, "max_grad_norm": torch.tensor(0.5, device=device)},
        "bounds": {**PLAIN, "max_grad_norm": torch.tensor([0.5, 0.6], device=device)},
        "percentile": {**PLAIN, "max_grad_norm": None, "percentile": 60, "return_stats": True},
        "norms": {**PLAIN, "norms": torch.ones(6, device=device)},
        "weights": {**PLAIN, "clipping": torch.ones(6, device=device)},
        "stats": {**PLAIN, "return_stats": True, "privacy_unit_ids": ids},
    }


@pytest.mark.parametrize("name", list(_sync_cases("cpu")))
def test_cuda_call_never_synchronises(name, cuda):
    told = _sync_cases(cuda)[name]
    grads = make_grads(6, [(300,), (4, 5)], device=cuda)
    sources = (NoiseSource(1, device=cuda), None)
    for noise in sources:  # the first use loads kernels and makes the default source
        clip_and_noise(grads, noise=noise, **told)
    torch.cuda.synchronize()
    with synchronisation_is_an_error():
        for noise in sources:
            clip_and_noise(grads, noise=noise, **told)


def test_cuda_synchronisation_would_be_noticed(cuda):
    with synchronisation_is_an_error(), pytest.raises(RuntimeError):
        torch.ones(3, device=cuda).sum().item()


# --- streams and graphs ---


def test_cuda_call_runs_on_the_current_stream(cuda):
    grads = make_grads(8, [(5000,), (33,)], device=cuda)
    expected = clip_and_noise(grads, noise=NoiseSource(1), **PLAIN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = [torch.zeros_like(g) for g in grads]
    source = NoiseSource(1, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the gradients arrive long after the call is issued
        for target, grad in zip(late, grads, strict=True):
            target.copy_(grad)
        out = clip_and_noise(late, noise=source, **PLAIN)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("name", list(_sync_cases("cpu")))
def test_cuda_graph_replay_draws_fresh_noise(name, cuda):
    told = _sync_cases(cuda)[name]
    grads = make_grads(6, [(300,), (4, 5)], device=cuda)
    source = NoiseSource(1, device=cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        clip_and_noise(grads, noise=source, **told)
    torch.cuda.current_stream().wait_stream(side)
    before = source.step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = clip_and_noise(grads, noise=source, **told)
    out = result[0] if told.get("return_stats") else result
    assert source.step == before  # capturing draws nothing
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([o.clone() for o in out])
    noisy = told["noise_multiplier"] != 0.0
    assert source.step == before + (3 if noisy else 0)
    eager = NoiseSource(1, device=cuda)
    clip_and_noise(grads, noise=eager, **told)
    for outs in replayed:
        result = clip_and_noise(grads, noise=eager, **told)
        expected = result[0] if told.get("return_stats") else result
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    if noisy:
        assert (replayed[0][0] != replayed[1][0]).float().mean() > 0.9


def test_cuda_graph_replay_reads_new_gradients_and_bounds(cuda):
    grads = make_grads(6, [(300,)], device=cuda)
    bound = torch.tensor(0.5, device=cuda)
    told = {"noise_multiplier": 0.0, "mechanism": "none"}
    clip_and_noise(grads, max_grad_norm=bound, **told)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = clip_and_noise(grads, max_grad_norm=bound, **told)
    for scale, value in ((1.0, 0.5), (3.0, 0.25)):
        grads[0].mul_(scale)
        bound.fill_(value)
        graph.replay()
        assert torch.equal(out, clip_and_noise(grads, max_grad_norm=bound, **told)[0])


# --- repeatability and size ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_units", [False, True])
def test_cuda_call_repeats_bit_for_bit(dtype, with_units, cuda):
    grads = make_grads(70, [(20_000,), (33,), (1,)], dtype=dtype, device=cuda)
    ids = (torch.arange(70) * 7919 % 20).to(cuda) if with_units else None
    first = None
    for _ in range(5):
        out, stats = clip_and_noise(
            grads, noise=NoiseSource(1), privacy_unit_ids=ids, return_stats=True, **PLAIN
        )
        got = [*out, stats.sensitive_norms.nan_to_num(-1.0)]
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


@pytest.mark.parametrize("count", [512, 513, 2000])
def test_cuda_call_takes_many_small_tensors(count, cuda):
    grads = make_grads(4, [(1 + k % 7,) for k in range(count)], device=cuda)
    out = clip_and_noise(grads, noise=NoiseSource(1), **PLAIN)
    noise = twin_noise(grads, 1, 0, "gaussian")
    expected = reference.clip_and_noise(grads, noise=noise, **PLAIN)
    check_close(out, expected.out, allowed_error(grads, expected, noise, {}))


@pytest.mark.slow
def test_cuda_call_takes_more_than_2_to_31_elements(cuda):
    rows, columns = 3, 3 * 2**28 + 5  # 2.4e9 elements, 4.8 GB
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    grads = torch.zeros(rows, columns, dtype=torch.bfloat16, device=cuda)
    grads[2, -1] = 3.0
    grads[1, 0] = 4.0
    out, stats = clip_and_noise(
        grads, max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none", return_stats=True
    )
    assert stats.sensitive_norms.tolist() == [0.0, 4.0, 3.0]
    assert float(out[0]) == pytest.approx(1.0, rel=2 * tolerances.NORM_MARGIN + 2.0**-23)
    assert float(out[-1]) == pytest.approx(1.0, rel=2 * tolerances.NORM_MARGIN + 2.0**-23)
    assert int(out.count_nonzero()) == 2


# --- contract ---


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("grouped", [False, True])
def test_cuda_unusable_bound_in_a_tensor_gives_nan(bad, grouped, cuda):
    grads = make_grads(3, [(40,), (5,)], device=cuda)
    bound = torch.tensor([1.0, bad] if grouped else bad, device=cuda)
    out = clip_and_noise(grads, max_grad_norm=bound, noise_multiplier=1.0)
    assert all(o.isnan().all() for o in out)


def test_cuda_more_units_than_weights_give_nan(cuda):
    # The CPU raises; on CUDA the number of units is not known to the host.
    ids = torch.tensor([1, 2, 3], device=cuda)
    out = clip_and_noise(
        torch.ones(3, 40, device=cuda),
        clipping=torch.ones(2, device=cuda),
        privacy_unit_ids=ids,
        **PLAIN,
    )
    assert out.isnan().all()


@pytest.mark.parametrize("name", ["max_grad_norm", "privacy_unit_ids", "norms", "clipping", "out"])
def test_cuda_refuses_tensors_on_another_device(name, cuda):
    grad = torch.ones(3, 4, device=cuda)
    value = {
        "max_grad_norm": torch.tensor(1.0),
        "privacy_unit_ids": torch.arange(3),
        "norms": torch.ones(3),
        "clipping": torch.ones(3),
        "out": torch.empty(4),
    }[name]
    source = NoiseSource(1, device=cuda)
    with pytest.raises(ValueError, match=f"^clip_and_noise: {name}"):
        clip_and_noise(grad, noise=source, **{**PLAIN, name: value})
    assert source.step == 0


def test_cuda_refuses_gradients_on_two_devices(cuda):
    with pytest.raises(ValueError, match=r"^clip_and_noise: grad_samples\[1\] must be on cuda"):
        clip_and_noise([torch.ones(3, 4, device=cuda), torch.ones(3, 4)], **PLAIN)


def test_cuda_call_works_on_a_device_that_is_not_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1 - cuda.index)
    grads = make_grads(5, [(300,)])
    expected = clip_and_noise([g.to(cuda) for g in grads], noise=NoiseSource(1), **PLAIN)
    out = clip_and_noise([g.to(other) for g in grads], noise=NoiseSource(1), **PLAIN)
    assert torch.equal(out[0].cpu(), expected[0].cpu())
