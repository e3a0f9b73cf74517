"""The arguments of clip_and_noise: checked, and in the form that the native op takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpfast import _validate

__all__ = [
    "NAME",
    "Bounds",
    "check_bounds",
    "check_clipping",
    "check_divisor",
    "check_mechanism",
    "check_noise_weights",
    "check_out",
    "check_percentile",
    "check_unit_ids",
    "check_units",
    "out_in_order",
]

NAME = "clip_and_noise"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_RULES = ("flat", "automatic", "auto_v", "normalized", "psac", "none")
# gamma of AUTO-S (Bu et al. 2022 use 0.01 throughout), r of NSGD and of DP-PSAC.
_DEFAULT_STABILITY = {"automatic": 0.01, "normalized": 0.01, "psac": 0.1}


class Bounds(NamedTuple):
    """The thresholds: host numbers or a device tensor, neither with a percentile."""

    values: list[float]
    tensor: torch.Tensor | None
    num_groups: int


class NoiseWeights(NamedTuple):
    """gamma_k per group: numbers, the bounds themselves, or 1 where neither."""

    values: list[float]
    proportional: bool


def _per_tensor(name: str, value: Any, keys: list[Any] | None, count: int) -> list[Any]:
    """The values of a sequence or mapping that has one entry per gradient tensor."""
    if isinstance(value, Mapping):
        if keys is None or set(value.keys()) != set(keys):
            raise ValueError(f"{NAME}: {name} must have the keys of grad_samples")
        return [value[key] for key in keys]
    if keys is not None:
        raise TypeError(
            f"{NAME}: {name} must be a mapping like grad_samples, got {type(value).__name__}"
        )
    if len(value) != count:
        raise ValueError(f"{NAME}: {name} must have {count} entries, got {len(value)}")
    return list(value)


def _is_collection(value: Any) -> bool:
    return isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes))


def _bound(value: Any) -> float:
    return _validate.number(
        NAME, "max_grad_norm", value, minimum=_validate.MIN_BOUND, maximum=_validate.MAX_BOUND
    )


def check_bounds(
    max_grad_norm: Any,
    percentile: float | None,
    clipping: str,
    keys: list[Any] | None,
    count: int,
    device: torch.device,
) -> Bounds:
    """Thresholds from max_grad_norm, or none with a percentile."""
    if percentile is not None:
        if max_grad_norm is not None:
            raise ValueError(f"{NAME}: max_grad_norm must be None with percentile, which sets it")
        return Bounds([], None, 1)
    if max_grad_norm is None:
        raise ValueError(f"{NAME}: max_grad_norm must be given unless percentile is")
    if isinstance(max_grad_norm, torch.Tensor):
        if clipping == "normalized":
            raise ValueError(f"{NAME}: max_grad_norm must be the number 1 with normalized")
        shape = (count,) if max_grad_norm.dim() == 1 else ()
        tensor = _validate.tensor_like(
            NAME, "max_grad_norm", max_grad_norm, dtypes=_FLOATS, shape=shape, device=device
        )
        return Bounds([], tensor.detach().reshape(-1), count if shape else 1)
    if _is_collection(max_grad_norm):
        values = [_bound(v) for v in _per_tensor("max_grad_norm", max_grad_norm, keys, count)]
    else:
        values = [_bound(max_grad_norm)]
    if clipping == "normalized" and any(value != 1.0 for value in values):
        raise ValueError(
            f"{NAME}: max_grad_norm must be 1 with normalized, whose sensitivity is 1 (use "
            f"automatic for another bound), got {values}"
        )
    return Bounds(values, None, len(values))


def check_noise_weights(
    weights: Any, bounds: Bounds, keys: list[Any] | None, count: int
) -> NoiseWeights:
    """How group-wise noise is shared among the groups."""
    one_bound = bounds.num_groups == 1 and count > 1
    if isinstance(weights, str):
        chosen = _validate.choice(NAME, "group_noise_weights", weights, ("equal", "proportional"))
        if one_bound and chosen == "proportional":
            raise ValueError(f"{NAME}: group_noise_weights needs one max_grad_norm per tensor")
        return NoiseWeights([], chosen == "proportional")
    if not _is_collection(weights):
        raise TypeError(
            f"{NAME}: group_noise_weights must be equal, proportional or one number per tensor, "
            f"got {type(weights).__name__}"
        )
    if one_bound:
        raise ValueError(f"{NAME}: group_noise_weights needs one max_grad_norm per tensor")
    values = [
        _validate.number(NAME, "group_noise_weights", v, minimum=1e-30, maximum=1e30)
        for v in _per_tensor("group_noise_weights", weights, keys, count)
    ]
    return NoiseWeights(values, False)


def check_clipping(clipping: Any, stability: Any) -> tuple[str, float]:
    """The rule's name ("custom" for a weight tensor) and its constant."""
    rule = (
        "custom"
        if isinstance(clipping, torch.Tensor)
        else _validate.choice(NAME, "clipping", clipping, _RULES)
    )
    if stability is None:
        return rule, _DEFAULT_STABILITY.get(rule, 1.0)
    if rule not in _DEFAULT_STABILITY:
        raise ValueError(
            f"{NAME}: stability_constant belongs to automatic, normalized and psac, not to {rule}"
        )
    constant = _validate.number(NAME, "stability_constant", stability, minimum=1e-30, maximum=1e30)
    return rule, constant


def check_percentile(
    percentile: Any, rule: str, num_rows: int, accumulate: bool, return_stats: bool
) -> float | None:
    """The percentile, where nothing forbids one."""
    if percentile is None:
        return None
    value = _validate.number(NAME, "percentile", percentile, minimum=0.0, maximum=100.0)
    if rule in ("none", "normalized", "custom"):
        raise ValueError(f"{NAME}: percentile must not be given with clipping {rule}")
    if accumulate:
        raise ValueError(
            f"{NAME}: percentile must not be given with accumulate: each physical batch would take "
            "its own threshold"
        )
    if num_rows == 0:
        raise ValueError(f"{NAME}: percentile needs at least one sample, got B = 0")
    if not return_stats:
        raise ValueError(
            f"{NAME}: percentile publishes a threshold that depends on private data; pass "
            "return_stats=True, whose guarantee says so"
        )
    return value


def check_mechanism(mechanism: Any, norm: Any, noise_multiplier: Any) -> tuple[str, str, float]:
    """Mechanism, clipped norm (by default the mechanism's own) and multiplier."""
    mechanism = _validate.choice(NAME, "mechanism", mechanism, ("gaussian", "laplace", "none"))
    multiplier = _validate.number(
        NAME, "noise_multiplier", noise_multiplier, minimum=0.0, maximum=1e30
    )
    if mechanism == "none" and multiplier != 0.0:
        raise ValueError(
            f"{NAME}: noise_multiplier must be 0 with mechanism none, got {multiplier}"
        )
    if norm is None:
        norm = "l1" if mechanism == "laplace" else "l2"
    return mechanism, _validate.choice(NAME, "norm", norm, ("l2", "l1")), multiplier


def out_in_order(out: Any, keys: list[Any] | None) -> list[Any] | None:
    """What `out` holds in the order of grad_samples; None where its structure is another."""
    if isinstance(out, Mapping):
        return None if keys is None or set(out) != set(keys) else [out[key] for key in keys]
    if keys is not None:
        return None
    if isinstance(out, torch.Tensor):
        return [out]
    return list(out) if _is_collection(out) else None


def check_out(
    out: Any, tensors: list[torch.Tensor], keys: list[Any] | None, accumulate: bool
) -> list[torch.Tensor]:
    """Where the results go: the given tensors in order, or new ones."""
    device = tensors[0].device
    shapes = [t.shape[1:] for t in tensors]
    dtypes = [torch.float64 if t.dtype == torch.float64 else torch.float32 for t in tensors]
    if out is None:
        if accumulate:
            raise ValueError(f"{NAME}: out must be given with accumulate, to hold the sums")
        return [torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]
    _validate.structure(NAME, "out", out)
    results = out_in_order(out, keys)
    if results is None or len(results) != len(tensors):
        raise ValueError(f"{NAME}: out must have the structure of grad_samples")
    for index, (result, shape, dtype) in enumerate(zip(results, shapes, dtypes, strict=True)):
        if (
            result.dtype == dtype
            and result.layout is torch.strided
            and result.shape == shape
            and result.device == device
            and not result.requires_grad
        ):
            continue
        name = f"out[{index}]"
        _validate.tensor_like(NAME, name, result, dtypes=(dtype,), shape=shape, device=device)
        raise ValueError(f"{NAME}: {name} must not require grad")
    return results


class Units(NamedTuple):
    """Own weights (units,) and given norms (K, units)."""

    weights: torch.Tensor | None
    norms: torch.Tensor | None


def check_units(
    clipping: Any,
    norms: Any,
    bounds: Bounds,
    privacy_unit_ids: torch.Tensor | None,
    num_rows: int,
    device: torch.device,
) -> Units:
    """Own weights and given norms: they agree on the number of units."""
    weights = clipping if isinstance(clipping, torch.Tensor) else None
    units = num_rows
    if privacy_unit_ids is not None:
        # How many distinct ids there are is known to the kernels alone; it checks that they fit.
        for given in (weights, norms):
            if isinstance(given, torch.Tensor) and given.dim() > 0:
                units = min(num_rows, given.shape[-1])
                break
    if weights is not None:
        _validate.tensor_like(
            NAME, "clipping", weights, dtypes=_FLOATS, shape=(units,), device=device
        )
        weights = weights.detach()
    if norms is not None:
        shape = (units,) if bounds.num_groups == 1 else (bounds.num_groups, units)
        _validate.tensor_like(
            NAME, "norms", norms, dtypes=(torch.float64, torch.float32), shape=shape, device=device
        )
        norms = norms.detach().reshape(bounds.num_groups, units)
    return Units(weights, norms)


def check_divisor(expected_batch_size: Any) -> float:
    """What divides the noisy sum: the public expected batch size, or 1."""
    if expected_batch_size is None:
        return 1.0
    return _validate.number(
        NAME, "expected_batch_size", expected_batch_size, minimum=1e-30, maximum=1e30
    )


def check_unit_ids(ids: Any, num_rows: int, device: torch.device) -> None:
    """One int64 id per row."""
    if ids is not None:
        _validate.tensor_like(
            NAME,
            "privacy_unit_ids",
            ids,
            dtypes=(torch.int64,),
            shape=(num_rows,),
            device=device,
        )
