"""The op as torch.library and torch.compile see it."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dpfast
from dpfast import NoiseSource
from tests.helpers import make_grads

OP = torch.ops.dpfast.clip_and_noise_.default
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    ),
]
PLAIN = {
    "bounds": [0.5],
    "bound_tensor": None,
    "percentile": None,
    "clipping": "flat",
    "stability": 1.0,
    "custom_weights": None,
    "norm": "l2",
    "norms": None,
    "privacy_unit_ids": None,
    "average_rows": False,
    "mechanism": "gaussian",
    "noise_multiplier": 1.0,
    "group_noise_weights": [],
    "proportional_noise": False,
    "num_groups": 1,
    "divisor": 1.0,
    "accumulate": False,
}
SETTINGS = {
    "plain": {},
    "silent": {"mechanism": "none", "noise_multiplier": 0.0},
    "accumulate": {"accumulate": True, "divisor": 4.0},
    "groups": {"bounds": [0.5, 0.6], "num_groups": 2, "group_noise_weights": [1.0, 2.0]},
    "percentile": {"bounds": [], "percentile": 50.0},
    "bound": {"bounds": [], "bound_tensor": torch.tensor([0.5])},
    "bounds": {"bounds": [], "bound_tensor": torch.tensor([0.5, 0.2]), "num_groups": 2},
    "custom": {"clipping": "custom", "custom_weights": torch.tensor([0.1, 2.0, 3.0])},
    "norms": {"norms": torch.tensor([[1.0, 2.0, 3.0]])},
    # As many units as rows: opcheck compares results, and the slot of no unit holds NaN.
    "units": {"privacy_unit_ids": torch.tensor([4, 2, 9]), "average_rows": True},
    "laplace": {"mechanism": "laplace", "norm": "l1"},
}
# torch's own, while inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def moved(settings, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_registration_passes_opcheck(name, dtype, device):
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grads = make_grads(3, [(4, 5), (3,)], dtype=dtype, device=device)
    out = [torch.zeros(g.shape[1:], dtype=out_dtype, device=device) for g in grads]
    settings = moved({**PLAIN, **SETTINGS[name]}, device)
    state = NoiseSource(1).state_on(device) if settings["noise_multiplier"] else None
    torch.library.opcheck(OP, (grads, out, state), settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_registration_fake_kernel_tells_the_real_shapes(name, device):
    grads = make_grads(3, [(4, 5), (3,)], device=device)
    out = [torch.zeros(g.shape[1:], device=device) for g in grads]
    settings = moved({**PLAIN, **SETTINGS[name]}, device)
    real = OP(grads, out, NoiseSource(1).state_on(device), **settings)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OP([mode.from_tensor(g) for g in grads], [mode.from_tensor(o) for o in out], None,
                  **settings)  # fmt: skip
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_registration_public_call_works_on_fake_and_meta_tensors():
    with FakeTensorMode():
        grads = {"a": torch.ones(3, 4), "b": torch.ones(3, 2, 5, dtype=torch.bfloat16)}
        out, stats = dpfast.clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=1.0, return_stats=True
        )
        assert out["b"].shape == (2, 5)
        assert out["b"].dtype == torch.float32
        assert stats.sensitive_norms.shape == (3,)
    on_meta = dpfast.clip_and_noise(
        torch.ones(3, 4, device="meta"), max_grad_norm=1.0, noise_multiplier=1.0
    )
    assert on_meta.shape == (4,)
    assert on_meta.device.type == "meta"


def test_registration_gradients_do_not_flow_through():
    grad = torch.ones(3, 4, requires_grad=True)
    out = dpfast.clip_and_noise(grad * 2.0, max_grad_norm=1.0, noise_multiplier=1.0)
    assert not out.requires_grad


def test_registration_sources_made_in_inference_mode_serve_outside_too(device):
    grad = torch.ones(2, 3, device=device)
    told = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
    with torch.inference_mode():
        source = NoiseSource(1)
        dpfast.clip_and_noise(grad, noise=source, **told)
        dpfast.clip_and_noise(grad, **told)
    dpfast.clip_and_noise(grad, noise=source, **told)
    dpfast.clip_and_noise(grad, **told)
    assert source.step == 2


def test_registration_call_works_with_deterministic_algorithms(device):
    ids = torch.tensor([3, 1, 3], device=device)
    torch.use_deterministic_algorithms(True)
    try:
        out = dpfast.clip_and_noise(
            torch.ones(3, 4, device=device),
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            privacy_unit_ids=ids,
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()


class _Names(TorchDispatchMode):
    """Takes down the ops that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    pass


def test_registration_past_the_dispatcher_gives_the_same_bits(device):
    grads = make_grads(4, [(3, 2), (5,)], device=device)

    def call(given):
        return dpfast.clip_and_noise(
            given, max_grad_norm=0.5, noise_multiplier=1.0, noise=NoiseSource(3)
        )

    plain = call(grads)
    with _Names() as names:
        traced = call(grads)
    assert OP in names.seen
    wrapped = call([g.as_subclass(_Wrapped) for g in grads])
    for a, b, c in zip(plain, traced, wrapped, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_registration_op_is_seen_by_the_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dpfast.clip_and_noise(torch.ones(2, 3), max_grad_norm=1.0, noise_multiplier=1.0)
    assert "dpfast::clip_and_noise_" in {event.key for event in profile.key_averages()}


def test_registration_autograd_knows_that_out_has_changed(device):
    weight = torch.ones(3, device=device, requires_grad=True)
    out = torch.zeros(3, device=device)
    product = weight * out  # saves out for weight's gradient
    dpfast.clip_and_noise(
        torch.ones(2, 3, device=device), max_grad_norm=1.0, noise_multiplier=1.0, out=out
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# --- torch.compile ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_registration_compiled_seeded_call_equals_eager(backend, dtype, device):
    a, b = make_grads(3, [(4, 5), (3,)], dtype=dtype, device=device)
    source = NoiseSource(3, device=device)

    def step(grads):
        grads = {key: 2.0 * value for key, value in grads.items()}
        out = dpfast.clip_and_noise(grads, max_grad_norm=0.5, noise_multiplier=1.0, noise=source)
        return {key: value + 1.0 for key, value in out.items()}

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = [compiled({"a": a, "b": b}) for _ in range(3)]
    assert source.step == 3  # runs count, traces do not
    source = NoiseSource(3, device=device)
    for result in results:
        expected = step({"a": a, "b": b})
        assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert not torch.equal(results[0]["a"], results[1]["a"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 4])
def test_registration_two_calls_in_one_compiled_function_draw_different_noise(
    backend, seed, device
):
    grads = {"w": torch.zeros(2, 50, device=device)}
    source = None if seed is None else NoiseSource(seed, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def twice(grads):
        told = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "noise": source}
        return dpfast.clip_and_noise(grads, **told)["w"], dpfast.clip_and_noise(grads, **told)["w"]

    drawn = [out for _ in range(3) for out in twice(grads)]
    for i, x in enumerate(drawn):
        assert all((x != y).all() for y in drawn[:i])
    if source is not None:
        assert source.step == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_compiled_call_takes_all_settings(backend, device):
    grads = make_grads(6, [(4, 5), (3,)], device=device)
    ids = torch.tensor([4, 2, 4, 9, 9, 1], device=device)
    bound = torch.tensor(0.4, device=device)

    def step(grads, ids, bound, out):
        _, stats = dpfast.clip_and_noise(
            grads,
            max_grad_norm=bound,
            noise_multiplier=0.0,
            clipping="psac",
            privacy_unit_ids=ids,
            expected_batch_size=4.0,
            out=out,
            accumulate=True,
            return_stats=True,
        )
        return stats.sensitive_norms, stats.max_grad_norm

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        out = [torch.ones(g.shape[1:], device=device) for g in grads]
        results.append((*run(grads, ids, bound, out), *out))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_registration_compiled_call_takes_changing_batch_sizes(backend, device):
    source = NoiseSource(3, device=device)

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(grads):
        return dpfast.clip_and_noise(grads, max_grad_norm=0.5, noise_multiplier=1.0, noise=source)

    eager = NoiseSource(3)
    for rows in (4, 7, 1, 0, 5):
        (grad,) = make_grads(rows, [(6,)], device=device)
        expected = dpfast.clip_and_noise(grad, max_grad_norm=0.5, noise_multiplier=1.0, noise=eager)
        assert torch.equal(step(grad), expected)
    assert source.step == 5


def test_registration_compiled_call_with_noise_is_not_removed_as_unused(device):
    source = NoiseSource(3, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(grads):
        dpfast.clip_and_noise(grads, max_grad_norm=0.5, noise_multiplier=1.0, noise=source)
        return grads + 1.0

    step(torch.ones(2, 3, device=device))
    assert source.step == 1
