"""The one call that clips every unit's gradient, sums and adds noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch

from dpfast import _native, _validate
from dpfast.ops import _arguments as args
from dpfast.ops import _registration
from dpfast.ops._settle import settle
from dpfast.ops.deferred import DeferredGradient, GradientStore
from dpfast.ops.noise_source import NoiseSource

__all__ = ["ClipStats", "Guarantee", "clip_and_noise"]

Grads = TypeVar("Grads", torch.Tensor, Sequence[torch.Tensor], Mapping[Any, torch.Tensor])


@dataclass(frozen=True)
class Guarantee:
    """What one call's output guarantees, as far as the call itself can know.

    Attributes:
      holds: whether the noisy output is a Gaussian or Laplace mechanism with `noise_multiplier`.
      noise_multiplier: noise scale over sensitivity (std for Gaussian, b for Laplace).
      sensitivity_norm: "l2" or "l1", the norm in which one unit moves the sum by at most the bound.
      reasons: why it does not hold, or on what the caller's part it depends.
    """

    holds: bool
    mechanism: str
    noise_multiplier: float
    sensitivity_norm: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ClipStats:
    """What a call saw. Everything named sensitive is private data: do not publish or log it.

    Attributes:
      max_grad_norm: threshold used, float64, shape () or (K,) for group-wise clipping.
      sensitive_norms: norm of each unit before clipping, float64, shape (units,) or (K, units).
        With privacy_unit_ids, units stand in ascending order of their id and the slots beyond
        the number of units hold NaN.
      sensitive_num_nonfinite: int64, shape (): units dropped because of NaN or Inf.
      guarantee: what the output guarantees.
    """

    max_grad_norm: torch.Tensor
    sensitive_norms: torch.Tensor
    sensitive_num_nonfinite: torch.Tensor
    guarantee: Guarantee


def _guarantee(
    rule: str,
    mechanism: str,
    norm: str,
    noise_multiplier: float,
    percentile: float | None,
    secure: bool,
    given_norms: bool,
    accumulate: bool,
    deferred: bool,
) -> Guarantee:
    broken = []
    if percentile is not None:
        broken.append("percentile: the threshold is taken from private data without noise")
    if rule == "none":
        broken.append("clipping none: the sensitivity is unbounded")
    if mechanism == "none" or noise_multiplier == 0.0:
        broken.append("no noise was added")
    if not secure:
        broken.append("the noise is seeded: who knows the seed can remove it")
    conditions = []
    if rule == "custom":
        conditions.append("each weight must depend on its own unit alone")
    if given_norms:
        conditions.append("norms must be those of these gradients")
    if accumulate:
        conditions.append("what out held must be noiseless sums under the same bound")
    if deferred:
        conditions.append("sums of gradients that were not formed are rounded in float32")
    if mechanism == "laplace" and norm == "l2":
        conditions.append("Laplace after an L2 clip: account as zCDP or GDP, not as pure epsilon")
    conditions.append("real arithmetic: the floating-point noise is not exact")
    return Guarantee(
        holds=not broken,
        mechanism=mechanism,
        noise_multiplier=noise_multiplier,
        sensitivity_norm=norm,
        reasons=tuple(broken or conditions),
    )


def _rebuild(like: Any, keys: list[Any] | None, results: list[torch.Tensor]) -> Any:
    if isinstance(like, torch.Tensor):
        return results[0]
    if keys is not None:
        return dict(zip(keys, results, strict=True))
    if isinstance(like, tuple):
        return type(like)(*results) if hasattr(like, "_fields") else tuple(results)
    return results


def _parts(
    grad_samples: Any,
) -> dict[str, torch.Tensor | DeferredGradient] | None:
    """What a store holds."""
    return grad_samples.parts() if isinstance(grad_samples, GradientStore) else None


def _stand_ins(parts: Mapping[str, torch.Tensor | DeferredGradient]) -> dict[str, torch.Tensor]:
    return {
        name: part.stand_in() if isinstance(part, DeferredGradient) else part
        for name, part in parts.items()
    }


@overload
def clip_and_noise(
    grad_samples: Grads,
    *,
    max_grad_norm: Any,
    noise_multiplier: float,
    clipping: str | torch.Tensor = ...,
    stability_constant: float | None = ...,
    percentile: float | None = ...,
    mechanism: str = ...,
    norm: str | None = ...,
    privacy_unit_ids: torch.Tensor | None = ...,
    unit_reduction: str = ...,
    norms: torch.Tensor | None = ...,
    group_noise_weights: Any = ...,
    expected_batch_size: float | None = ...,
    out: Grads | None = ...,
    accumulate: bool = ...,
    noise: NoiseSource | None = ...,
    return_stats: Literal[False] = ...,
) -> Grads: ...
@overload
def clip_and_noise(
    grad_samples: Grads,
    *,
    max_grad_norm: Any,
    noise_multiplier: float,
    clipping: str | torch.Tensor = ...,
    stability_constant: float | None = ...,
    percentile: float | None = ...,
    mechanism: str = ...,
    norm: str | None = ...,
    privacy_unit_ids: torch.Tensor | None = ...,
    unit_reduction: str = ...,
    norms: torch.Tensor | None = ...,
    group_noise_weights: Any = ...,
    expected_batch_size: float | None = ...,
    out: Grads | None = ...,
    accumulate: bool = ...,
    noise: NoiseSource | None = ...,
    return_stats: Literal[True],
) -> tuple[Grads, ClipStats]: ...


def clip_and_noise(
    grad_samples: Any,
    *,
    max_grad_norm: Any,
    noise_multiplier: float,
    clipping: Any = "flat",
    stability_constant: float | None = None,
    percentile: float | None = None,
    mechanism: str = "gaussian",
    norm: str | None = None,
    privacy_unit_ids: torch.Tensor | None = None,
    unit_reduction: str = "mean",
    norms: torch.Tensor | None = None,
    group_noise_weights: Any = "equal",
    expected_batch_size: float | None = None,
    out: Any = None,
    accumulate: bool = False,
    noise: NoiseSource | None = None,
    return_stats: bool = False,
) -> Any:
    """Clip every privacy unit's gradient, sum over the batch and add noise, in one native call.

    Args:
      grad_samples: per-sample gradients, a tensor or a sequence or mapping of tensors of shape
        (B, *param_shape), on CPU or CUDA; float64, float32, bfloat16 or float16. Tensors whose
        columns are not contiguous are copied first. Gradients do not flow through this call.
        What `per_sample_gradients` yields is taken as it is, gradients not formed included.
      max_grad_norm: bound C on every unit's norm over all tensors, 1e-30 <= C <= 1e30, in gradient
        units: a number, or a 0-d tensor on the gradients' device (never read on the host). One
        number per tensor (same structure), or a tensor (K,), clips each tensor to its own bound.
        A bound must not depend on private data. On CUDA an unusable bound in a tensor gives NaN.
      noise_multiplier: noise scale on the sum over its sensitivity, >= 0: standard deviation for
        Gaussian noise, b for Laplace noise (density exp(-|x| / b) / 2b).
      clipping: weight of a unit of norm n:
        "flat": min(1, C / n) (Abadi et al. 2016);
        "automatic": C / (n + gamma), AUTO-S (Bu et al. 2022);
        "auto_v": C / n, AUTO-V, 0 for n = 0;
        "normalized": 1 / (n + r), NSGD (Yang et al. 2022); its bound is 1, so max_grad_norm is 1;
        "psac": C / (n + r / (n + r)), DP-PSAC (Xia et al. 2022);
        "none": 1, no bound and no guarantee;
        a tensor (units,): own weights, each cut to C / n. Each must depend on its unit alone.
      stability_constant: gamma (default 0.01) or r (0.01 for normalized, 0.1 for psac).
      percentile: take C as this percentile (0-100, linear between ranks) of the batch's finite
        unit norms, as in ADP-FL (arXiv:2604.06518). No guarantee: the threshold is private data.
        Needs max_grad_norm=None and return_stats=True. If no norm is finite the output is NaN.
      mechanism: "gaussian", "laplace" or "none".
      norm: "l2" or "l1", the norm that is clipped; by default what the mechanism needs: "l1" for
        Laplace, else "l2". Laplace after an L2 clip has no pure epsilon of 1 / noise_multiplier.
      privacy_unit_ids: int64 (B,): rows with one id are one unit (a patient). Their gradients are
        averaged or summed, then clipped once. All rows of a unit must be in one call.
      unit_reduction: "mean" or "sum" over a unit's rows.
      norms: the units' norms where they are already known, float32 or float64, shape (units,) or
        (K, units): the gradients are then read once. They must be those of these gradients
        (relative error < 2^-21 in float32, < 2^-29 in float64) after unit_reduction.
      group_noise_weights: for one bound per tensor, gamma_k of std_k = z gamma_k sqrt(sum_j
        (C_j / gamma_j)^2): "equal" (1), "proportional" (C_k), or one number per tensor. Laplace
        after an L1 clip has b_k = z gamma_k sum_j C_j / gamma_j.
      expected_batch_size: divides the noisy sum; public, > 0. None: no division.
      out: where to write, same structure, float32 (float64 for float64 gradients).
      accumulate: add to what `out` holds. For gradient accumulation over physical batches, sum
        with mechanism="none", noise_multiplier=0.0, accumulate=True, and let the last call
        add the noise and divide. It may have B = 0.
      noise: the NoiseSource; None: this process's own, keyed by the operating system.
      return_stats: also return ClipStats.

    Returns:
      The noisy clipped sum (or mean) in the structure of grad_samples, float32 (float64 for
      float64 gradients), shape (*param_shape,); with return_stats a pair with ClipStats.

    Raises:
      TypeError: wrong type or dtype. ValueError: wrong value, shape, structure, device, or shared
        memory. RuntimeError: CUDA failed, or CUDA gradients without CUDA kernels.
        Nothing is written to `out` in any of these cases.

    Guarantees:
      Adding or removing one unit moves the sum before noise by at most max_grad_norm in `norm`
      (over all groups: sqrt(sum C_k^2)), rounding of norms and weights included; the sum itself
      is taken in float64 and rounded once to the output's dtype. Of gradients that
      `per_sample_gradients` did not form the sum is taken in the parameter's dtype: its rounding,
      some 1e-7 of the terms, is not part of the bound, and the guarantee says so.
      A unit with NaN or Inf contributes exactly zero. B = 0 gives noise alone. One seed gives the
      same bits for any number of threads. No host synchronisation on CUDA.

    References:
      Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; He et al. 2022, arXiv:2212.01539 (groups).
    """
    parts = _parts(grad_samples)
    tensors, keys = _validate.structure(
        args.NAME, "grad_samples", grad_samples if parts is None else _stand_ins(parts)
    )
    accumulate = _validate.flag(args.NAME, "accumulate", accumulate)
    given = args.out_in_order(out, keys)
    # A stand-in may have the layout of an ordinary tensor.
    deferred = parts is not None and any(isinstance(p, DeferredGradient) for p in parts.values())
    table = None if given is None or deferred else _native.plain_tensors(tensors, given)
    num_rows = _validate.batch_of(args.NAME, tensors) if table is None else table.num_rows
    device, count = tensors[0].device, len(tensors)
    return_stats = _validate.flag(args.NAME, "return_stats", return_stats)
    rule, stability = args.check_clipping(clipping, stability_constant)
    percentile = args.check_percentile(percentile, rule, num_rows, accumulate, return_stats)
    bounds = args.check_bounds(max_grad_norm, percentile, rule, keys, count, device)
    mechanism, norm, multiplier = args.check_mechanism(mechanism, norm, noise_multiplier)
    weights = args.check_noise_weights(group_noise_weights, bounds, keys, count)
    reduction = _validate.choice(args.NAME, "unit_reduction", unit_reduction, ("mean", "sum"))
    divisor = args.check_divisor(expected_batch_size)
    if noise is not None and not isinstance(noise, NoiseSource):
        raise TypeError(f"{args.NAME}: noise must be a NoiseSource, got {type(noise).__name__}")
    args.check_unit_ids(privacy_unit_ids, num_rows, device)
    units = args.check_units(clipping, norms, bounds, privacy_unit_ids, num_rows, device)
    results = given if given and table else None
    if results is None and (parts is None or out is not None or accumulate):
        results = args.check_out(out, tensors, keys, accumulate)

    settings: dict[str, Any] = {
        "bounds": bounds.values,
        "bound_tensor": bounds.tensor,
        "percentile": percentile,
        "clipping": rule,
        "stability": stability,
        "custom_weights": units.weights,
        "norm": norm,
        "norms": units.norms,
        "privacy_unit_ids": privacy_unit_ids,
        "average_rows": privacy_unit_ids is not None and reduction == "mean",
        "mechanism": mechanism,
        "noise_multiplier": multiplier,
        "group_noise_weights": weights.values,
        "proportional_noise": weights.proportional,
        "num_groups": bounds.num_groups,
        "divisor": divisor,
        "accumulate": accumulate,
        "summed": [],
    }
    tensors = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    if parts is not None:
        known = [grad_samples.square_norms(name) for name in parts]
        tensors, results, settings = settle(
            list(parts.values()), known, results, num_rows, device, settings
        )
    assert results is not None
    threshold, unit_norms, nonfinite = _registration.run(
        tensors, results, None if noise is None else noise.state_on(device), table, **settings
    )
    result = _rebuild(grad_samples, keys, results) if out is None else out
    if not return_stats:
        return result
    grouped = bounds.num_groups > 1
    secure = noise is None or noise.secure
    return result, ClipStats(
        max_grad_norm=threshold if grouped else threshold[0],
        sensitive_norms=unit_norms if grouped else unit_norms[0],
        sensitive_num_nonfinite=nonfinite,
        guarantee=_guarantee(
            rule,
            mechanism,
            norm,
            multiplier,
            percentile,
            secure,
            given_norms=norms is not None,
            accumulate=accumulate,
            deferred=deferred,
        ),
    )
