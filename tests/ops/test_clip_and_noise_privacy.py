"""What privacy rests on: sensitivity, dropped units, noise scale, the guarantee that is told."""

import math
from fractions import Fraction

import pytest
import torch

from dpfast import NoiseSource, clip_and_noise
from tests import tolerances
from tests.helpers import BOUNDED_RULES, exact_norm, make_grads, root

# A GPU machine may lack Hypothesis; the other tests must still be collected there.
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SILENT = {"noise_multiplier": 0.0, "mechanism": "none"}
# Every norm that could upset a rule: none, subnormal, at the bound, huge, not finite.
SIZES = (
    0.0, 5e-324, 1e-310, 1e-160, 1e-151, 1e-140, 1e-30, 1e-12, 0.3, 0.5, 0.7000000001,
    1.0, 40.0, 1e15, 1e30, 1e150, 1e154, 1e200, math.nan, math.inf, -math.inf,
)  # fmt: skip
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def batches(draw, dtype=torch.float64):
    """A batch of 2 to 6 rows in two tensors: random directions times adversarial sizes."""
    rows = draw(st.integers(2, 6))
    columns = draw(st.sampled_from([(1, 1), (3, 2), (33, 0), (40, 300)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=rows, max_size=rows))
    grads = []
    for width in columns:
        values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        scaled = values * torch.tensor(sizes, dtype=torch.float64)[:, None]
        # A dropped unit has its NaN or Inf anywhere: here in the last column of each tensor.
        for row, size in enumerate(sizes):
            if not math.isfinite(size):
                scaled[row] = values[row]
                if width:
                    scaled[row, -1] = size
        grads.append(scaled.to(dtype))
    return grads


def _moved(grads, kept, **told):
    """Exact norm of the difference that the removed rows make, and the sum's largest element."""
    whole = clip_and_noise(grads, **SILENT, **told)
    changed = dict(told)
    for name in ("privacy_unit_ids", "clipping"):
        if isinstance(told.get(name), torch.Tensor):
            changed[name] = told[name][kept]
    rest = clip_and_noise([g[kept] for g in grads], **SILENT, **changed)
    pairs = list(zip(whole, rest, strict=True))
    assert all(a.isfinite().all() and b.isfinite().all() for a, b in pairs)
    values = [
        Fraction(x) - Fraction(y)
        for a, b in pairs
        for x, y in zip(
            a.double().cpu().flatten().tolist(), b.double().cpu().flatten().tolist(), strict=True
        )
    ]
    largest = max((float(t.abs().max()) for pair in pairs for t in pair if t.numel()), default=0.0)
    if told.get("norm") == "l1":
        size = float(sum(abs(v) for v in values))
    else:
        size = root(sum((v * v for v in values), Fraction(0)))
    return size, largest, len(values)


def _rounding(dtype, rows, columns, largest, norm):
    """Both sums are rounded: each element by at most (rows + 1) units of its largest value."""
    per_element = tolerances.OUTPUT_ROUNDING[torch.float64] * 2 * rows * max(largest, 1.0)
    if dtype != torch.float64:
        per_element += 2 * tolerances.OUTPUT_ROUNDING[dtype] * largest
    return per_element * (columns if norm == "l1" else math.sqrt(columns))


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
@given(grads=batches(), row=st.integers(0, 5))
@quick
def test_sensitivity_is_bounded_when_one_row_is_removed(rule, norm, grads, row, device):
    grads = [g.to(device) for g in grads]
    rows = len(grads[0])
    kept = [b for b in range(rows) if b != row % rows]
    bound = 1.0 if rule == "normalized" else 0.7
    moved, largest, columns = _moved(grads, kept, max_grad_norm=bound, norm=norm, clipping=rule)
    assert moved <= bound + _rounding(torch.float64, rows, columns, largest, norm)


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(grads=batches(), row=st.integers(0, 5))
@settings(quick, max_examples=25)
def test_sensitivity_is_bounded_in_lower_precision(rule, dtype, grads, row, device):
    grads = [g.to(dtype).to(device) for g in grads]
    rows = len(grads[0])
    kept = [b for b in range(rows) if b != row % rows]
    bound = 1.0 if rule == "normalized" else 0.7
    moved, largest, columns = _moved(grads, kept, max_grad_norm=bound, clipping=rule)
    assert moved <= bound + _rounding(torch.float32, rows, columns, largest, "l2")


@pytest.mark.parametrize("norm", ["l2", "l1"])
@given(
    grads=batches(),
    weights=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=6, max_size=6),
    row=st.integers(0, 5),
)
@quick
def test_sensitivity_is_bounded_for_custom_weights(norm, grads, weights, row, device):
    grads = [g.to(device) for g in grads]
    rows = len(grads[0])
    kept = [b for b in range(rows) if b != row % rows]
    clipping = torch.tensor(weights[:rows], dtype=torch.float64, device=device)
    moved, largest, columns = _moved(grads, kept, max_grad_norm=0.7, norm=norm, clipping=clipping)
    assert moved <= 0.7 + _rounding(torch.float64, rows, columns, largest, norm)


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@given(grads=batches(), ids=st.lists(st.integers(-1, 1), min_size=6, max_size=6))
@settings(quick, max_examples=30)
def test_sensitivity_is_bounded_when_one_unit_is_removed(rule, reduction, grads, ids, device):
    grads = [g.to(device) for g in grads]
    rows = len(grads[0])
    unit = ids[0]
    kept = [b for b in range(rows) if ids[b] != unit]
    bound = 1.0 if rule == "normalized" else 0.7
    moved, largest, columns = _moved(
        grads,
        kept,
        max_grad_norm=bound,
        clipping=rule,
        unit_reduction=reduction,
        privacy_unit_ids=torch.tensor(ids[:rows], device=device),
    )
    assert moved <= bound + _rounding(torch.float64, rows, columns, largest, "l2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sensitivity_is_bounded_when_rows_of_a_unit_cancel(dtype, reduction, device):
    # The unit's two rows sum to nearly nothing, so its norm is small although each row is huge:
    # adding them one after the other to the batch's sum would round all other units away.
    others = make_grads(4, [(8,)], dtype=dtype, device=device)[0]
    huge = torch.full((1, 8), 2.0**100, dtype=dtype, device=device)
    grads = [torch.cat([others, huge, -huge])]
    ids = torch.tensor([0, 1, 2, 3, 4, 4], device=device)
    moved, largest, columns = _moved(
        grads, [0, 1, 2, 3], max_grad_norm=0.7, privacy_unit_ids=ids, unit_reduction=reduction
    )
    assert moved <= 0.7 + _rounding(dtype, 6, columns, largest, "l2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_not_rounded_away_by_cancelling_rows(dtype, device):
    huge = torch.full((1, 300), 2.0**100, dtype=dtype, device=device)
    told = {"max_grad_norm": 0.7, "noise_multiplier": 1.0}
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    out = clip_and_noise(
        torch.cat([huge, -huge]), privacy_unit_ids=ids, noise=NoiseSource(1), **told
    )
    assert torch.equal(out, clip_and_noise(huge[:0], noise=NoiseSource(1), **told))


@pytest.mark.parametrize("rule", ["flat", "auto_v"])
def test_sensitivity_is_bounded_when_rows_of_a_unit_nearly_cancel(rule, device):
    # Each row has norm 1 and their sum 2^-50: the weight C / n makes each row huge in turn.
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(1, 64, generator=generator, dtype=torch.float64) + 1.0
    near = row * (1.0 + 2.0**-50 * torch.rand(1, 64, generator=generator, dtype=torch.float64))
    bound = 1e-16 if rule == "flat" else 0.7
    out = clip_and_noise(
        torch.cat([row, -near]).to(device),
        max_grad_norm=bound,
        clipping=rule,
        privacy_unit_ids=torch.zeros(2, dtype=torch.int64, device=device),
        unit_reduction="sum",
        **SILENT,
    )
    assert exact_norm([out]) <= bound


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
@given(grads=batches(), row=st.integers(0, 5))
@settings(quick, max_examples=30)
def test_sensitivity_is_bounded_in_each_group(rule, norm, grads, row, device):
    grads = [g.to(device) for g in grads]
    rows = len(grads[0])
    kept = [b for b in range(rows) if b != row % rows]
    bounds = [1.0, 1.0] if rule == "normalized" else [0.7, 0.02]
    told = {"max_grad_norm": bounds, "norm": norm, "clipping": rule}
    moved, largest, columns = _moved(grads, kept, **told)
    total = sum(bounds) if norm == "l1" else math.hypot(*bounds)
    assert moved <= total + _rounding(torch.float64, rows, columns, largest, norm)
    whole = clip_and_noise(grads, **SILENT, **told)
    rest = clip_and_noise([g[kept] for g in grads], **SILENT, **told)
    for a, b, bound in zip(whole, rest, bounds, strict=True):
        size = exact_norm([a - b], norm)
        assert size <= bound + 2 * _rounding(torch.float64, rows, columns, largest, norm)


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("bound", [1e-30, 0.7, 1e30])
@given(grads=batches())
@settings(quick, max_examples=30)
def test_clipped_unit_alone_has_at_most_the_bound_exactly(rule, norm, bound, grads, device):
    bound = 1.0 if rule == "normalized" else bound
    for row in range(len(grads[0])):
        alone = [g[row : row + 1].to(device) for g in grads]
        out = clip_and_noise(alone, max_grad_norm=bound, norm=norm, clipping=rule, **SILENT)
        assert exact_norm(out, norm) <= bound


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [1, 100, 4097, 20000])
def test_clipped_unit_alone_has_at_most_the_bound_for_many_columns(norm, dtype, columns, device):
    generator = torch.Generator().manual_seed(columns)
    bound = 0.3
    for spread in (0.0, 1.0, 8.0):
        grad = torch.randn(1, columns, generator=generator, dtype=torch.float64)
        grad *= torch.exp(spread * torch.randn(1, columns, generator=generator).double())
        out = clip_and_noise(
            grad.to(dtype).to(device), max_grad_norm=bound, norm=norm, clipping="auto_v", **SILENT
        )
        size = math.fsum(v * v if norm == "l2" else abs(v) for v in out.double().cpu().tolist())
        size = math.sqrt(size) if norm == "l2" else size
        # Float32 elements are each rounded by 2^-24 of their size, so their norm is too.
        slack = 0.0 if dtype == torch.float64 else 2.0**-23
        assert size <= bound * (1.0 + slack)
        assert size >= bound * (1.0 - 2 * tolerances.NORM_MARGIN - slack)


@pytest.mark.parametrize("rule", ["flat", "auto_v", "automatic", "custom"])
def test_clipped_unit_alone_is_bounded_where_the_weight_is_subnormal(rule, device):
    # C / n lies between two subnormal numbers: rounding it up would let a third more through.
    n = 1e307
    for part in (0.51, 0.75, 0.99, 1.5, 2.6, 100.5):
        bound = float(Fraction(part) * Fraction(n) * Fraction(1, 2**1074))
        clipping = torch.ones(1, device=device) if rule == "custom" else rule
        out = clip_and_noise(
            torch.full((1, 1), n, dtype=torch.float64, device=device),
            max_grad_norm=bound,
            norm="l1",
            clipping=clipping,
            **SILENT,
        )
        assert float(out.abs()) <= bound


@pytest.mark.parametrize("rule", [*BOUNDED_RULES, "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grouped", [False, True])
def test_nonfinite_unit_contributes_exactly_zero(rule, bad, grouped, device):
    grads = make_grads(9, [(50,), (7,)], device=device)
    grads[0][3, 49] = bad
    grads[1][6, 0] = bad
    bound = [1.0, 1.0] if grouped else 1.0
    told = {"max_grad_norm": bound, "noise_multiplier": 0.5, "clipping": rule}
    kept = [0, 1, 2, 4, 5, 7, 8]
    with_bad = clip_and_noise(grads, noise=NoiseSource(1), **told)
    without = clip_and_noise([g[kept] for g in grads], noise=NoiseSource(1), **told)
    assert all(torch.equal(a, b) for a, b in zip(with_bad, without, strict=True))


def test_nonfinite_row_drops_its_whole_unit_exactly(device):
    grads = make_grads(6, [(50,)], device=device)
    grads[0][2, 3] = math.nan
    ids = torch.tensor([4, 9, 4, 7, 7, 1], device=device)
    kept = [1, 3, 4, 5]
    told = {"max_grad_norm": 0.5, "noise_multiplier": 0.5}
    with_bad = clip_and_noise(grads, noise=NoiseSource(1), privacy_unit_ids=ids, **told)
    without = clip_and_noise(
        [grads[0][kept]], noise=NoiseSource(1), privacy_unit_ids=ids[kept], **told
    )
    assert torch.equal(with_bad[0], without[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_given_norm_drops_its_unit(dtype, bad, device):
    grads = make_grads(4, [(50,)], device=device)
    norms = torch.tensor([1.0, bad, 1.0, 1.0], dtype=dtype, device=device)
    out = clip_and_noise(grads, max_grad_norm=0.5, norms=norms, **SILENT)
    kept = [0, 2, 3]
    rest = clip_and_noise([grads[0][kept]], max_grad_norm=0.5, norms=norms[kept], **SILENT)
    assert torch.equal(out[0], rest[0])


@pytest.mark.parametrize("rule", BOUNDED_RULES)
def test_noise_does_not_depend_on_the_gradients(rule, device):
    # The same seed and step give the same noise whatever the batch: the difference between the
    # noisy and the silent sum is the noise, and it must not move when norms change by 1e6.
    told = {"max_grad_norm": 1.0, "clipping": rule}
    grads = make_grads(5, [(600,)], dtype=torch.float64, device=device)[0]
    noises = []
    for batch in (grads, 1e6 * grads, 1e-6 * grads, grads[:1], grads[:0]):
        noisy = clip_and_noise(batch, noise_multiplier=2.0, noise=NoiseSource(6), **told)
        noises.append(noisy - clip_and_noise(batch, **SILENT, **told))
    for noise in noises[:-1]:
        torch.testing.assert_close(noise, noises[-1], rtol=0.0, atol=1e-13)


@pytest.mark.statistical
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_noise_std_is_multiplier_times_bound_for_any_norms(size, device):
    # The relative error of a std over n normal samples is 1 / sqrt(2 n): 5 of it is failed with
    # probability 6e-7 for a fresh key; the seed makes it the same every time.
    columns = 500_000
    grads = torch.full((2, columns), size / math.sqrt(columns), device=device)
    told = {"max_grad_norm": 0.5, "expected_batch_size": 8.0}
    noisy = clip_and_noise(grads, noise_multiplier=1.3, noise=NoiseSource(2), **told)
    noise = noisy.double() - clip_and_noise(grads, **SILENT, **told).double()
    expected = 1.3 * 0.5 / 8.0
    tolerance = 5.0 / math.sqrt(2 * columns)
    std = float(noise.square().mean().sqrt())
    assert abs(std / expected - 1.0) < tolerance
    for wrong in (2 / 3, 3 / 2):
        assert abs(std / (wrong * expected) - 1.0) > tolerance


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_noise_differs_between_tensors_steps_and_calls(mechanism, device):
    grads = [torch.zeros(1, 300, device=device) for _ in range(3)]
    source = NoiseSource(0)
    told = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "mechanism": mechanism}
    drawn = [o for _ in range(3) for o in clip_and_noise(grads, noise=source, **told)]
    drawn += [o for _ in range(2) for o in clip_and_noise(grads, **told)]
    for i, a in enumerate(drawn):
        assert all((a != b).all() for b in drawn[:i])


# --- what the caller is told ---


def _guarantee(**told):
    base = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
    _, stats = clip_and_noise(make_grads(3, [(4,)]), return_stats=True, **{**base, **told})
    return stats.guarantee


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_guarantee_holds_for_secure_noise_and_bounded_rule(rule, mechanism):
    guarantee = _guarantee(clipping=rule, mechanism=mechanism)
    assert guarantee.holds
    assert guarantee.mechanism == mechanism
    assert guarantee.noise_multiplier == 1.0
    assert guarantee.sensitivity_norm == ("l1" if mechanism == "laplace" else "l2")
    assert any("real arithmetic" in reason for reason in guarantee.reasons)
    assert _guarantee(noise=NoiseSource()).holds


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"percentile": 50, "max_grad_norm": None}, "percentile"),
        ({"clipping": "none"}, "unbounded"),
        ({"noise_multiplier": 0.0}, "no noise"),
        ({"noise_multiplier": 0.0, "mechanism": "none"}, "no noise"),
        ({"noise": NoiseSource(3)}, "seed"),
    ],
)
def test_guarantee_does_not_hold_and_says_why(told, reason):
    guarantee = _guarantee(**told)
    assert not guarantee.holds
    assert any(reason in text for text in guarantee.reasons)


def test_guarantee_names_what_depends_on_the_caller():
    custom = _guarantee(clipping=torch.ones(3))
    assert custom.holds
    assert any("weight" in reason for reason in custom.reasons)
    given_norms = _guarantee(norms=torch.ones(3))
    assert given_norms.holds
    assert any("norms" in reason for reason in given_norms.reasons)


def test_guarantee_names_what_accumulation_and_laplace_depend_on():
    grads = torch.ones(2, 3)
    told = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "return_stats": True}
    _, plain = clip_and_noise(grads, **told)
    _, added = clip_and_noise(grads, out=torch.zeros(3), accumulate=True, **told)
    _, laplace = clip_and_noise(grads, mechanism="laplace", norm="l2", **told)
    assert plain.guarantee.holds
    assert len(plain.guarantee.reasons) == 1
    assert any("out held" in reason for reason in added.guarantee.reasons)
    assert any("zCDP" in reason for reason in laplace.guarantee.reasons)


def test_given_norm_below_zero_drops_its_row():
    grads = torch.tensor([[5.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    norms = torch.tensor([-5.0, 0.5], dtype=torch.float64)
    result = clip_and_noise(grads, max_grad_norm=1.0, norms=norms, **SILENT)
    assert torch.equal(result, grads[1])
