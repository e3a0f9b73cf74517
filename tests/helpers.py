"""What several test files share: gradients, the comparison with the twin, exact norms."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from dpfast import NoiseSource, clip_and_noise, reference
from tests import tolerances

RULES = ("flat", "automatic", "auto_v", "normalized", "psac", "none")
BOUNDED_RULES = RULES[:-1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Chunk edges of the kernels (256 noise elements, 4096 columns) among them.
SHAPES = ((3, 5), (), (257,), (0,), (4097,))


def make_grads(
    num_rows: int,
    shapes: Sequence[Sequence[int]] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Per-sample gradients whose norms lie on both sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    columns = sum(math.prod(shape) for shape in shapes)
    sizes = torch.logspace(-1.5, 1.5, num_rows).double() if num_rows else torch.zeros(0).double()
    grads = []
    for shape in shapes:
        values = torch.randn(num_rows, *shape, generator=generator, dtype=torch.float64)
        values *= (sizes / math.sqrt(max(columns, 1))).reshape(-1, *[1] * len(shape))
        grads.append(values.to(dtype).to(device))
    return grads


def twin_noise(
    grads: Sequence[torch.Tensor], seed: int, step: int, mechanism: str
) -> list[torch.Tensor]:
    """The twin's standard noise for a NoiseSource(seed) that has served `step` calls."""
    return [
        reference.standard_noise(
            reference.seed_key(seed),
            step,
            index,
            mechanism,
            g[0].numel() if len(g) else math.prod(g.shape[1:]),
            double_precision=g.dtype == torch.float64,
        )
        for index, g in enumerate(grads)
    ]


def _as_list(value: Any) -> Any:
    return value.double().cpu().tolist() if isinstance(value, torch.Tensor) else value


def allowed_error(
    grads: Sequence[torch.Tensor],
    expected: reference.ReferenceResult,
    noise: Sequence[torch.Tensor] | None,
    settings: dict[str, Any],
) -> list[torch.Tensor]:
    """By how much each element may differ from the twin's; derivations in tolerances.py."""
    given = settings.get("norms")
    single = given is not None and given.dtype == torch.float32
    margin = tolerances.GIVEN_SINGLE_NORM_MARGIN if single else tolerances.NORM_MARGIN
    divisor = settings.get("expected_batch_size") or 1.0
    ids = settings.get("privacy_unit_ids")
    errors = []
    for k, (grad, out) in enumerate(zip(grads, expected.out, strict=True)):
        group = k if expected.weights.shape[0] > 1 else 0
        weights = expected.weights[group]
        if ids is not None:
            _, unit_of_row, counts = ids.cpu().unique(return_inverse=True, return_counts=True)
            if settings.get("unit_reduction", "mean") == "mean":
                weights = weights / counts
            weights = weights[unit_of_row]
        rows = grad.detach().cpu().double().reshape(len(grad), out.numel()).abs()
        rows = torch.where(weights[:, None] == 0, 0.0, rows)  # a dropped row may hold NaN
        moved = (weights.abs()[:, None] * rows).sum(0)
        if settings.get("start") is not None:
            total = moved + settings["start"][k].cpu().double().reshape(-1).abs()
        else:
            total = moved
        short = 0.0 if grad.dtype == torch.float64 else tolerances.SHORT_WEIGHT
        error = 1.001 * (margin + short) * moved + tolerances.SUMMATION * total
        if noise is not None:
            scale = expected.noise_scales[group]
            size = noise[k].abs()
            error += scale * tolerances.noise_error(grad.dtype) * size.clamp(min=1.0)
            error += scale * tolerances.SUMMATION * size
        dtype = tolerances.output_dtype(grad.dtype)
        rounding = tolerances.OUTPUT_ROUNDING[dtype] * out.abs().reshape(-1) * 1.001
        errors.append(
            (error / divisor + rounding + tolerances.OUTPUT_UNDERFLOW[dtype]).reshape(out.shape)
        )
    return errors


def check_against_twin(
    grads: list[torch.Tensor], *, seed: int | None = 11, **settings: Any
) -> tuple[list[torch.Tensor], Any]:
    """Run the op with a seeded source and compare output, threshold and norms with the twin."""
    source = None if seed is None else NoiseSource(seed)
    out, stats = clip_and_noise(grads, noise=source, return_stats=True, **settings)
    mechanism = settings.get("mechanism", "gaussian")
    noisy = mechanism != "none" and settings["noise_multiplier"] != 0.0
    noise = twin_noise(grads, seed or 0, 0, mechanism) if noisy else None
    told = dict(settings, max_grad_norm=_as_list(settings["max_grad_norm"]))
    expected = reference.clip_and_noise(grads, noise=noise, **told)
    check_close(out, expected.out, allowed_error(grads, expected, noise, settings))
    for result, grad in zip(out, grads, strict=True):
        assert result.dtype == tolerances.output_dtype(grad.dtype)
        assert result.shape == grad.shape[1:]
    check_stats(stats, expected)
    return out, stats


def check_close(
    out: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], errors: Sequence[torch.Tensor]
) -> None:
    for index, (a, b, error) in enumerate(zip(out, expected, errors, strict=True)):
        difference = (a.detach().cpu().double() - b).abs()
        bad = ~(difference <= error)
        assert not bad.any(), (
            f"tensor {index}: {int(bad.sum())} of {bad.numel()} elements differ, by up to "
            f"{float(difference.max()):.3g} where {float(error.max()):.3g} is allowed"
        )


def check_stats(stats: Any, expected: reference.ReferenceResult) -> None:
    threshold = stats.max_grad_norm.cpu().reshape(-1)
    torch.testing.assert_close(
        threshold, expected.threshold, rtol=tolerances.NORM_RELATIVE, atol=0.0, equal_nan=True
    )
    norms = stats.sensitive_norms.cpu().reshape(expected.norms.shape[0], -1)
    units = expected.norms.shape[1]
    torch.testing.assert_close(
        norms[:, :units],
        expected.norms,
        rtol=tolerances.NORM_RELATIVE,
        atol=1e-300,
        equal_nan=True,
    )
    assert norms[:, units:].isnan().all()
    assert int(stats.sensitive_num_nonfinite) == expected.num_nonfinite


def exact_norm(tensors: Sequence[torch.Tensor], norm: str = "l2") -> float:
    """The norm of finite tensors in rational arithmetic, rounded once (and by the root, once)."""
    values = [Fraction(v) for t in tensors for v in t.detach().cpu().double().reshape(-1).tolist()]
    if norm == "l1":
        return float(sum(abs(v) for v in values))
    return root(sum((v * v for v in values), Fraction(0)))


def root(square: Fraction) -> float:
    """Square root of a rational to within 2^-60, rounded to float64."""
    if square == 0:
        return 0.0
    # Scale by a power of 4 so that the integer root has more than 60 bits.
    shift = max(0, 130 - (square.numerator.bit_length() - square.denominator.bit_length()))
    shift += shift % 2
    whole = math.isqrt((square.numerator << shift) // square.denominator)
    return float(Fraction(whole, 1 << (shift // 2)))
