"""The native op as torch.library knows it: schema, kernels for CPU and CUDA, fake kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from dpfast import _native
from dpfast.ops.noise_source import default_state

__all__ = [
    "check_kernels",
    "clip_and_noise_op",
    "native_settings",
    "rank_units",
    "refuse_overlap",
    "rows_of",
    "run",
]

_SCHEMA = (
    "(Tensor[] grad_samples, Tensor(a!)[] out, Tensor(b!)? noise_state, *, "
    "float[] bounds, Tensor? bound_tensor, float? percentile, str clipping, float stability, "
    "Tensor? custom_weights, str norm, Tensor? norms, Tensor? privacy_unit_ids, "
    "bool average_rows, str mechanism, float noise_multiplier, float[] group_noise_weights, "
    "bool proportional_noise, int num_groups, float divisor, bool accumulate, bool[] summed=[]) "
    "-> (Tensor threshold, Tensor norms, Tensor num_nonfinite)"
)
# Seeded as random: two calls with equal inputs draw different noise and must not be merged.
torch.library.define(
    "dpfast::clip_and_noise_",
    _SCHEMA,
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _num_units(
    grad_samples: Sequence[torch.Tensor],
    custom_weights: torch.Tensor | None,
    norms: torch.Tensor | None,
) -> int:
    if custom_weights is not None:
        return custom_weights.shape[0]
    return grad_samples[0].shape[0] if norms is None else norms.shape[-1]


def _contiguous_float64(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.float64).contiguous()


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: a stride within the reach of the smaller ones."""
    reach = 0
    for stride, size in sorted(
        (s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    ):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def refuse_overlap(grad_samples: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Memory that is written must be read or written by nobody else.

    For layouts that are copied; of contiguous tensors the native call checks the same itself.
    """
    spans = [(*_extent(t), False) for t in grad_samples if t.numel()]
    spans += [(*_extent(t), True) for t in out if t.numel()]
    end, written_end = 0, 0  # furthest byte seen, and furthest written one
    shared = any(_overlaps_itself(t) for t in out if t.numel())
    for start, stop, written in sorted(spans):
        shared = shared or start < (end if written else written_end)
        end = max(end, stop)
        if written:
            written_end = max(written_end, stop)
    if shared:
        raise ValueError("clip_and_noise: out must not share memory with itself or the input")


def _odd(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels cannot take one of them as it is."""
    return any(not t.is_contiguous() or t.is_neg() for t in tensors)


def rows_of(grad: torch.Tensor, num_rows: int, numel: int) -> torch.Tensor:
    """(B, P) with contiguous columns; a copy only where they are not."""
    rows = grad.resolve_neg().reshape(num_rows, numel)
    return rows if numel <= 1 or rows.stride(1) == 1 else rows.contiguous()


def rank_units(
    ids: torch.Tensor, num_units: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows sorted by unit, the start of each unit among them, the number of units; no sync."""
    sorted_ids, order = torch.sort(ids, stable=True)
    is_first = torch.ones_like(sorted_ids)
    is_first[1:] = (sorted_ids[1:] != sorted_ids[:-1]).to(torch.int64)
    rank = torch.cumsum(is_first, 0) - 1
    slots = torch.arange(num_units + 1, device=ids.device)
    return order, torch.searchsorted(rank, slots), is_first.sum()


def native_settings(
    num_units: int,
    device: torch.device,
    *,
    bound_tensor: torch.Tensor | None,
    norms: torch.Tensor | None,
    custom_weights: torch.Tensor | None,
    privacy_unit_ids: torch.Tensor | None,
    mechanism: str,
    noise_multiplier: float,
    noise_state: torch.Tensor | None = None,
    **others: Any,
) -> _native.NativeSettings:
    """The op's settings as the kernels take them; a noise state where there is noise."""
    row_order = unit_start = unit_count = None
    if privacy_unit_ids is not None:
        row_order, unit_start, unit_count = rank_units(privacy_unit_ids, num_units)
    noisy = mechanism != "none" and noise_multiplier != 0.0
    if noisy and noise_state is None:
        noise_state = default_state(device)
    settings = {
        **others,
        "num_units": num_units,
        "mechanism": mechanism,
        "noise_multiplier": noise_multiplier,
        "single_precision_norms": norms is not None and norms.dtype != torch.float64,
        "row_order": row_order,
        "unit_start": unit_start,
        "unit_count": unit_count,
        "device_bounds": _contiguous_float64(bound_tensor),
        "given_norms": _contiguous_float64(norms),
        "custom_weights": _contiguous_float64(custom_weights),
        "noise_state": noise_state if noisy else None,
    }
    return cast("_native.NativeSettings", settings)


def check_kernels(device: torch.device) -> None:
    """Raises RuntimeError for CUDA tensors in a build without CUDA kernels."""
    if device.type == "cuda" and not _native.has_cuda_kernels():
        raise RuntimeError(
            "clip_and_noise: grad_samples are on CUDA, but this build of dpfast has no CUDA "
            "kernels; reinstall it with nvcc on PATH (DPFAST_CUDA=ON makes their absence an error)"
        )


def _run(
    grad_samples: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    noise_state: torch.Tensor | None,
    *,
    summed: Sequence[bool] = (),
    custom_weights: torch.Tensor | None,
    norms: torch.Tensor | None,
    table: _native.TensorTable | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = grad_samples[0].device
    check_kernels(device)
    num_rows = grad_samples[0].shape[0]
    results = out
    if table is None and not summed:
        table = _native.plain_tensors(list(grad_samples), list(out))
    if table is None:
        summed = summed or [False] * len(out)
        rows = grad_samples
        if _odd(grad_samples) or _odd(out):
            pairs = list(zip(grad_samples, summed, strict=True))
            refuse_overlap([grad for grad, is_sum in pairs if not is_sum], out)
            results = [o.resolve_neg().contiguous() for o in out]
            rows = [
                # A sum stands in its output, wherever that is finished.
                rows_of(o.expand_as(grad) if is_sum else grad, num_rows, o.numel())
                for (grad, is_sum), o in zip(pairs, results, strict=True)
            ]
        table = _native.table_of(rows, results, summed, num_rows)
    native = native_settings(
        _num_units(grad_samples, custom_weights, norms),
        device,
        custom_weights=custom_weights,
        norms=norms,
        noise_state=noise_state,
        **settings,
    )
    stats = _native.clip_and_noise(table, device, native)
    if results is not out:
        for target, result in zip(out, results, strict=True):
            if target is not result:
                target.copy_(result)
    # Autograd must know that what it may have saved has changed.
    torch.autograd.graph.increment_version(out)
    return stats[:3]


torch.library.impl("dpfast::clip_and_noise_", ("cpu", "cuda"))(_run)


def _fake(
    grad_samples: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    noise_state: torch.Tensor | None,
    *,
    custom_weights: torch.Tensor | None,
    norms: torch.Tensor | None,
    num_groups: int,
    **settings: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    units = _num_units(grad_samples, custom_weights, norms)
    first = grad_samples[0]
    return (
        first.new_empty((num_groups,), dtype=torch.float64),
        first.new_empty((num_groups, units), dtype=torch.float64),
        first.new_empty((), dtype=torch.int64),
    )


torch.library.register_fake("dpfast::clip_and_noise_", _fake)

clip_and_noise_op = torch.ops.dpfast.clip_and_noise_.default

_PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_modes_on_stack: Callable[[], int] | None
try:
    _modes_on_stack = torch._C._len_torch_dispatch_stack
    _transforms_on_stack = torch._C._functorch.peek_interpreter_stack
    _profiling = torch._C._autograd._profiler_enabled
except AttributeError:  # a PyTorch that cannot tell: the dispatcher sees every call
    _modes_on_stack = None


def _dispatcher_has_work(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a tracer, mode, transform, subclass or profiler must see the call as an op."""
    return (
        torch.compiler.is_compiling()
        or _modes_on_stack is None
        or _modes_on_stack() > 0
        or _transforms_on_stack() is not None
        or _profiling()
        or tensors[0].device.type not in ("cpu", "cuda")
        or not _PLAIN_TENSORS.issuperset(map(type, tensors))
    )


def run(
    grad_samples: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    noise_state: torch.Tensor | None,
    table: _native.TensorTable | None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op's result, past the dispatcher where it would only cost time.

    The dispatcher takes 20 us a call with the caches warm, and several times that after a backward
    pass has emptied them.
    """
    if _dispatcher_has_work([*grad_samples, *out]):
        return clip_and_noise_op(grad_samples, out, noise_state, **settings)  # type: ignore[no-any-return]
    return _run(grad_samples, out, noise_state, table=table, **settings)
