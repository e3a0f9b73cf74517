"""clip_and_noise as the specification says it: one unit after the other, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["ReferenceResult", "clip_and_noise"]

_STABILITY = {"automatic": 0.01, "normalized": 0.01, "psac": 0.1}


class ReferenceResult(NamedTuple):
    """What the twin computed.

    Attributes:
      out: float64, shape (*param_shape,), one per tensor.
      threshold: float64, shape (G,), G = 1 or the number of tensors.
      norms: float64, shape (G, units), units in ascending order of their id.
      num_nonfinite: units dropped because of a NaN or infinite norm.
      weights: float64, shape (G, units): what each unit's gradient was multiplied by.
      noise_scales: noise scale of each group before the division.
    """

    out: list[torch.Tensor]
    threshold: torch.Tensor
    norms: torch.Tensor
    num_nonfinite: int
    weights: torch.Tensor
    noise_scales: list[float]


def _weight(rule: str, n: float, bound: float, stability: float, custom: float) -> float:
    """DP_SPEC section 1: phi(n), with n * phi(n) <= bound."""
    if rule == "none":
        return 1.0
    if rule == "flat":
        return 1.0 if n <= bound else bound / n
    if rule == "automatic":
        return bound / (n + stability)
    if rule == "auto_v":
        return 0.0 if n == 0.0 else bound / n
    if rule == "normalized":
        return 1.0 / (n + stability)
    if rule == "psac":
        return bound / (n + stability / (n + stability))
    if rule == "custom":
        if not math.isfinite(custom):
            return 0.0
        ceiling = math.inf if n == 0.0 else bound / n
        return math.copysign(min(abs(custom), ceiling), custom)
    raise ValueError(f"clip_and_noise: clipping must be a known rule, got {rule!r}")


def _norm(unit: Sequence[torch.Tensor], norm: str) -> float:
    """Norm of one unit's gradient over the given tensors."""
    if norm == "l1":
        return float(sum(float(g.abs().sum()) for g in unit))
    return math.sqrt(sum(float((g * g).sum()) for g in unit))


def _percentile(values: list[float], percentile: float) -> float:
    """Linear between ranks: position percentile / 100 * (m - 1) of the sorted values."""
    values = sorted(values)
    position = percentile / 100.0 * (len(values) - 1)
    low = min(int(position), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def _units(
    grads: list[torch.Tensor], privacy_unit_ids: torch.Tensor | None, unit_reduction: str
) -> list[list[torch.Tensor]]:
    """Each unit's gradient, one float64 tensor (P_k,) per parameter."""
    num_rows = grads[0].shape[0]
    if privacy_unit_ids is None:
        return [[g[b] for g in grads] for b in range(num_rows)]
    ids = privacy_unit_ids.tolist()
    units = []
    for unit in sorted(set(ids)):
        rows = [b for b in range(num_rows) if ids[b] == unit]
        total = [sum((g[b] for b in rows[1:]), g[rows[0]]) for g in grads]
        units.append([t / len(rows) for t in total] if unit_reduction == "mean" else total)
    return units


def _noise_scales(
    bounds: list[float], noise_multiplier: float, weights: str | Sequence[float], l1: bool
) -> list[float]:
    """He et al. 2022: z gamma_k sqrt(sum (C_j / gamma_j)^2); the plain sum for Laplace after L1."""
    if len(bounds) == 1:
        return [noise_multiplier * bounds[0]]
    if isinstance(weights, str):
        gamma = list(bounds) if weights == "proportional" else [1.0] * len(bounds)
    else:
        gamma = list(weights)
    terms = [c / g for c, g in zip(bounds, gamma, strict=True)]
    total = sum(terms) if l1 else math.sqrt(sum(t * t for t in terms))
    return [noise_multiplier * g * total for g in gamma]


def clip_and_noise(
    grad_samples: Sequence[torch.Tensor],
    *,
    max_grad_norm: float | Sequence[float] | None,
    noise_multiplier: float = 0.0,
    clipping: str | torch.Tensor = "flat",
    stability_constant: float | None = None,
    percentile: float | None = None,
    mechanism: str = "gaussian",
    norm: str | None = None,
    privacy_unit_ids: torch.Tensor | None = None,
    unit_reduction: str = "mean",
    norms: torch.Tensor | None = None,
    group_noise_weights: str | Sequence[float] = "equal",
    expected_batch_size: float | None = None,
    start: Sequence[torch.Tensor] | None = None,
    noise: Sequence[torch.Tensor] | None = None,
) -> ReferenceResult:
    """Clip every privacy unit's gradient, sum over the batch and add the given noise.

    The same meaning as ``dpfast.clip_and_noise``, without its safety margin for rounding, for
    norms between 1e-150 and 1e150 (squares neither overflow nor underflow), 0, NaN and Inf.

    Args:
      grad_samples: any floating dtype, shape (B, *param_shape), one per parameter.
      max_grad_norm: one bound over all tensors, or one per tensor; None with a percentile.
      noise_multiplier: noise scale over the sensitivity.
      clipping: a rule's name, or own weights, shape (units,), each cut to C / n.
      stability_constant: gamma or r of the rules that have one.
      percentile: take the bound as this percentile of the finite norms.
      mechanism: "gaussian", "laplace" or "none".
      norm: "l2" or "l1"; None: l1 for Laplace, else l2.
      privacy_unit_ids: int64, shape (B,): rows with one id are one unit.
      unit_reduction: "mean" or "sum" over a unit's rows.
      norms: given norms, shape (units,) or (G, units).
      group_noise_weights: "equal", "proportional" or one number per tensor.
      expected_batch_size: divides the noisy sum.
      start: what the sum starts from (accumulation), shape (*param_shape,) each.
      noise: standard noise, one tensor per parameter; needed if the noise multiplier is not 0.

    Returns:
      A ReferenceResult. Without any finite norm a percentile gives NaN everywhere.

    Raises:
      ValueError: an unknown rule, or noise is asked for and not given.

    References:
      DP_SPEC sections 1 to 3; Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    shapes = [g.shape[1:] for g in grad_samples]
    rows = int(grad_samples[0].shape[0])
    grads = [
        g.detach().cpu().double().reshape(rows, s.numel())
        for g, s in zip(grad_samples, shapes, strict=True)
    ]
    units = _units(grads, None if privacy_unit_ids is None else privacy_unit_ids.cpu(),
                   unit_reduction)  # fmt: skip
    norm = norm or ("l1" if mechanism == "laplace" else "l2")
    grouped = isinstance(max_grad_norm, Sequence)
    num_groups = len(grads) if grouped else 1
    members = [[k] for k in range(len(grads))] if num_groups > 1 else [list(range(len(grads)))]
    if norms is None:
        all_norms = [[_norm([u[k] for k in group], norm) for u in units] for group in members]
    else:
        all_norms = norms.detach().cpu().double().reshape(num_groups, len(units)).tolist()
    finite = [all(math.isfinite(of_group[u]) for of_group in all_norms) for u in range(len(units))]

    if percentile is not None:
        known = [n for n, ok in zip(all_norms[0], finite, strict=True) if ok]
        bounds = [_percentile(known, percentile) if known else math.nan]
    elif isinstance(max_grad_norm, Sequence):
        bounds = [float(c) for c in max_grad_norm]
    elif max_grad_norm is not None:
        bounds = [float(max_grad_norm)]
    else:
        raise ValueError("clip_and_noise: max_grad_norm must be given unless percentile is")

    rule = "custom" if isinstance(clipping, torch.Tensor) else clipping
    custom = (
        clipping.detach().cpu().double().tolist()
        if isinstance(clipping, torch.Tensor)
        else [0.0] * len(units)
    )
    stability = _STABILITY.get(rule, 1.0) if stability_constant is None else stability_constant
    weights = [
        [
            _weight(rule, all_norms[g][u], bounds[g], stability, custom[u]) if finite[u] else 0.0
            for u in range(len(units))
        ]
        for g in range(num_groups)
    ]
    scales = [0.0] * num_groups
    if mechanism != "none" and noise_multiplier != 0.0:
        if noise is None:
            raise ValueError("clip_and_noise: noise must be given with a noise_multiplier")
        l1 = mechanism == "laplace" and norm == "l1"
        scales = _noise_scales(bounds, noise_multiplier, group_noise_weights, l1)

    out = []
    for k, shape in enumerate(shapes):
        group = k if num_groups > 1 else 0
        total = torch.zeros(shape.numel(), dtype=torch.float64)
        if start is not None:
            total += start[k].detach().cpu().double().reshape(-1)
        for u, unit in enumerate(units):
            if finite[u]:  # a dropped unit may hold NaN, and NaN times 0 is NaN
                total += weights[group][u] * unit[k]
        if noise is not None and scales[group] != 0.0:
            total += scales[group] * noise[k].double().reshape(-1)
        if math.isnan(bounds[0]):
            total.fill_(math.nan)
        out.append((total / (expected_batch_size or 1.0)).reshape(shape))
    return ReferenceResult(
        out=out,
        threshold=torch.tensor(bounds, dtype=torch.float64),
        norms=torch.tensor(all_norms, dtype=torch.float64).reshape(num_groups, len(units)),
        num_nonfinite=finite.count(False),
        weights=torch.tensor(weights, dtype=torch.float64).reshape(num_groups, len(units)),
        noise_scales=scales,
    )
