"""Finishes what deferred gradients leave open: norms over all parts, then sums of the deferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpfast import _native
from dpfast.ops._registration import (
    check_kernels,
    native_settings,
    rank_units,
    refuse_overlap,
    rows_of,
)
from dpfast.ops.deferred import DeferredGradient

__all__ = ["settle"]

Part = torch.Tensor | DeferredGradient


def settle(
    parts: Sequence[Part],
    square_norms: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor] | None,
    num_rows: int,
    device: torch.device,
    settings: dict[str, Any],
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    """Write the clipped sums of deferred parts to their outputs, still without noise.

    Args:
      parts: in the order of the call; B >= 1.
      square_norms: (B,) of each part, where they are known.
      out: of the call; what it holds is added to where the settings say so. None: new ones.
      num_rows: B.
      device: of all.
      settings: of the op.

    Returns:
      The tensors of the call, (B, *shape) each, of which those marked as summed in the settings
      are their output B times; the outputs; and the settings, norms included.
    """
    check_kernels(device)
    for part in parts:  # before anything is written
        if isinstance(part, DeferredGradient):
            part.check()
    deferred = [isinstance(part, DeferredGradient) for part in parts]
    if out is not None:
        refuse_overlap([part for part in parts if isinstance(part, torch.Tensor)], out)
    if settings["norms"] is None and (
        any(deferred) or _worth_reading_once(parts, square_norms, settings)
    ):
        norms = _norms(parts, square_norms, num_rows, device, settings)
        settings = {**settings, "norms": norms}
    weights = _row_weights(num_rows, device, settings) if any(deferred) else None
    tensors, results = [], []
    for index, part in enumerate(parts):
        target = None if out is None else out[index]
        if isinstance(part, DeferredGradient):
            assert weights is not None
            group = index if settings["num_groups"] > 1 else 0
            accumulate = settings["accumulate"]
            target = part.weighted_sum(weights[group], target, accumulate=accumulate)
            tensors.append(target.expand(num_rows, *target.shape))
        else:
            dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
            target = part.new_empty(part.shape[1:], dtype=dtype) if target is None else target
            tensors.append(part)
        results.append(target)
    return tensors, results, {**settings, "summed": deferred if any(deferred) else []}


def _worth_reading_once(
    parts: Sequence[Part], square_norms: Sequence[torch.Tensor | None], settings: dict[str, Any]
) -> bool:
    """Whether most of what would be read for the norms has known ones."""
    if not _by_sample(settings) or settings["num_groups"] > 1:
        return False
    known = sum(p.shape.numel() for p, s in zip(parts, square_norms, strict=True) if s is not None)
    return 2 * known > sum(part.shape.numel() for part in parts)


def _by_sample(settings: dict[str, Any]) -> bool:
    """Whether norms of samples are of use."""
    return settings["norm"] == "l2" and settings["privacy_unit_ids"] is None


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
    euclidean, by_sample = settings["norm"] == "l2", _by_sample(settings)
    custom = settings["custom_weights"]
    units = num_rows if custom is None else custom.shape[0]
    groups = settings["num_groups"]
    totals = torch.zeros(groups, units, dtype=torch.float64, device=device)

    def add(group: int, tensors: list[torch.Tensor]) -> None:
        # The thresholds play no part in the norms.
        plain = {**settings, "num_groups": 1, "bounds": [1.0], "bound_tensor": None}
        found = _stage(tensors, num_rows, units, device, plain, "norms").norms[0]
        totals[group] += found.square() if euclidean else found

    unknown, known = [], []
    for index, (part, squares) in enumerate(zip(parts, square_norms, strict=True)):
        group = index if groups > 1 else 0
        if by_sample and squares is None and isinstance(part, DeferredGradient):
            squares = part.square_norms()
        if by_sample and squares is not None:
            if groups > 1:
                totals[group] = squares
            else:
                known.append(squares)
        elif isinstance(part, DeferredGradient):
            add(group, [part.form()])
        elif groups > 1:
            add(group, [part])
        else:
            unknown.append(part)
    if known:
        totals[0] += torch.stack(known).sum(0)
    if unknown:
        add(0, unknown)
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
