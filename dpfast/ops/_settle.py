"""Finishes what deferred gradients leave open: norms over all parts, then sums of the deferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpfast import _native
from dpfast.ops._registration import check_kernels, native_settings, rank_units, rows_of
from dpfast.ops.deferred import DeferredGradient

__all__ = ["settle"]

Part = torch.Tensor | DeferredGradient


def settle(
    parts: Sequence[Part],
    square_norms: Sequence[torch.Tensor | None],
    num_rows: int,
    device: torch.device,
    settings: dict[str, Any],
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Turn deferred parts into clipped sums.

    Args:
      parts: in the order of the call; B >= 1.
      square_norms: (B,) of each part, where they are known.
      num_rows: B.
      device: of all parts.
      settings: of the op.

    Returns:
      The tensors of the call, (B, *shape) each, of which those marked as summed in the settings
      hold B times the same row; and the settings, norms included.
    """
    check_kernels(device)
    if settings["norms"] is None:
        norms = _norms(parts, square_norms, num_rows, device, settings)
        settings = {**settings, "norms": norms}
    weights = _row_weights(num_rows, device, settings)
    tensors = []
    for index, part in enumerate(parts):
        if isinstance(part, DeferredGradient):
            group = index if settings["num_groups"] > 1 else 0
            total = part.weighted_sum(weights[group])
            tensors.append(total.expand(num_rows, *total.shape))
        else:
            tensors.append(part)
    summed = [isinstance(part, DeferredGradient) for part in parts]
    return tensors, {**settings, "summed": summed}


def _stage(
    tensors: Sequence[torch.Tensor],
    num_rows: int,
    num_units: int,
    device: torch.device,
    settings: dict[str, Any],
    until: str,
) -> _native.Stats:
    rows = [rows_of(t, num_rows, t.numel() // num_rows) for t in tensors]
    table = _native.table_of(rows, [None] * len(rows), [False] * len(rows), num_rows)
    others = {**settings, "mechanism": "none", "noise_multiplier": 0.0}
    others.pop("summed", None)
    return _native.clip_and_noise(
        table, device, native_settings(num_units, device, **others), until
    )


def _norms(
    parts: Sequence[Part],
    square_norms: Sequence[torch.Tensor | None],
    num_rows: int,
    device: torch.device,
    settings: dict[str, Any],
) -> torch.Tensor:
    """(K, units) over all parts, or over each where the bounds are one per tensor."""
    euclidean = settings["norm"] == "l2"
    by_row = settings["privacy_unit_ids"] is None
    custom = settings["custom_weights"]
    units = num_rows if custom is None else custom.shape[0]
    groups = settings["num_groups"]
    totals = torch.zeros(groups, units, dtype=torch.float64, device=device)

    def add(first: int, tensors: list[torch.Tensor], num_groups: int) -> None:
        # The thresholds play no part in the norms.
        plain = {**settings, "num_groups": num_groups, "bounds": [1.0] * num_groups}
        plain |= {"bound_tensor": None, "group_noise_weights": []}
        found = _stage(tensors, num_rows, units, device, plain, "norms").norms
        totals[first : first + num_groups] += found.square() if euclidean else found

    unknown = []
    for index, (part, squares) in enumerate(zip(parts, square_norms, strict=True)):
        group = index if groups > 1 else 0
        if squares is not None and euclidean and by_row:
            totals[group] += squares
        elif isinstance(part, DeferredGradient):
            if euclidean and by_row:
                totals[group] += part.square_norms()
            else:
                add(group, [part.form()], 1)
        elif groups > 1:
            add(group, [part], 1)
        else:
            unknown.append(part)
    if unknown:
        add(0, unknown, 1)
    return totals.sqrt() if euclidean else totals


def _row_weights(num_rows: int, device: torch.device, settings: dict[str, Any]) -> torch.Tensor:
    """(K, B): what each row is multiplied by, float64."""
    ids = settings["privacy_unit_ids"]
    units = settings["norms"].shape[-1]
    weights = _stage([], num_rows, units, device, settings, "weights").weights
    assert weights is not None
    if ids is not None:
        order, starts, _ = rank_units(ids, units)
        places = torch.arange(num_rows, device=device)
        rank = torch.searchsorted(starts, places, right=True) - 1
        weights = weights[:, torch.empty_like(rank).scatter_(0, order, rank).clamp_(max=units - 1)]
    return weights
