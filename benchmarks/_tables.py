"""The tables of the clip_and_noise benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks import clip_and_noise
from benchmarks._text import NOT_MEASURED, TextTable, not_measured
from benchmarks._workload import Case

__all__ = [
    "BANDWIDTH_TARGET",
    "NOISE_OVER_RANDN_TARGET",
    "TEXT",
    "bandwidth_target",
    "columns",
    "noise_cells",
    "noise_columns",
    "noise_share_target",
    "not_measured_cells",
    "row_cells",
    "tables",
    "unmeasured",
]

BANDWIDTH_TARGET = 0.85
# 1 ns where torch.randn takes 2.6: a ratio, since processors and their neighbours differ.
NOISE_OVER_RANDN_TARGET = 2.6

TEXT = """\
"share of bandwidth" is the time to move the row's bytes (the gradients twice, once with given
norms, and the output once) at the bandwidth measured right before and after, over dpfast's time:
read bandwidth on the CPU, copy bandwidth on CUDA. It can exceed 100 % where the gradients fit in a
cache. "noise share" is the part of the call that a call without noise saves. "x / dpfast" says how
many times longer x takes.

Targets, for float32 gradients larger than the caches (64 MiB and more): at least 85 % of the
bandwidth; noise at most 15 % of a CPU call at B = 16, at most 5 % at B >= 64 and on CUDA. A sample
of noise at least 2.6 times faster than one of torch.randn with AVX-512.
"""

_LARGER_THAN_CACHE = 64  # MiB


def _has_targets(case: Case) -> bool:
    """The targets are for float32 gradients larger than the caches."""
    return case.dtype == "float32" and case.mebibytes >= _LARGER_THAN_CACHE


def bandwidth_target(case: Case) -> float | None:
    """The least share of the bandwidth; None where no target was set."""
    return BANDWIDTH_TARGET if _has_targets(case) else None


def noise_share_target(case: Case, device_type: str) -> float | None:
    """The largest share of the call that noise may take; None where no target was set."""
    if case.given_norms or not _has_targets(case):
        return None
    return 0.15 if device_type == "cpu" and case.batch_size < 64 else 0.05


def columns(device_type: str) -> list[str]:
    """Headings of the table of rows."""
    shares = ["share of bandwidth", "noise share"]
    if device_type == "cuda":
        shares += ["share, CUDA graph", "noise share, CUDA graph"]
    peers = ["PyTorch ops / dpfast", "Opacus / dpfast"]
    return ["gradients", "tensors", "B", "variant", *shares, *peers, "spread"]


def _case_cells(case: Case) -> list[str]:
    size = f"{case.mebibytes} MiB" if case.mebibytes < 1024 else f"{case.mebibytes // 1024} GiB"
    return [size, str(case.num_tensors), str(case.batch_size), case.variant]


def not_measured_cells(case: Case, device_type: str, reason: str | None = None) -> list[str]:
    """A row without figures: nothing stands in for what nobody has measured."""
    cells = _case_cells(case)
    return [
        *cells,
        not_measured(reason),
        *[NOT_MEASURED] * (len(columns(device_type)) - len(cells) - 1),
    ]


def _percent(value: float, *, least: float | None = None, most: float | None = None) -> str:
    missed = (least is not None and value < least) or (most is not None and value > most)
    return f"{100 * value:.1f} %" + (" (missed)" if missed else "")


def row_cells(row: dict[str, Any], device_type: str) -> list[str]:
    """The figures of one row; "(missed)" marks a target that was not reached."""
    case = Case(**row["case"])
    if "skipped" in row:
        return not_measured_cells(case, device_type, row["skipped"])
    ratios = {name: values["median_of_rounds"] for name, values in row["ratios"].items()}
    least = bandwidth_target(case)
    most = noise_share_target(case, device_type)
    cells = _case_cells(case)
    for infix in ("", "_graph") if device_type == "cuda" else ("",):
        cells.append(_percent(ratios[f"share_of_bandwidth{infix}"], least=least))
        cells.append(_percent(ratios[f"noise_share{infix}"], most=most))
    for peer in ("pytorch", "opacus"):
        if peer in row["not_measured"]:
            cells.append(not_measured(row["not_measured"][peer]))
        else:
            cells.append(f"{ratios[f'{peer}_over_dpfast']:.2f}x")
    return [*cells, f"{100 * row['seconds']['dpfast']['spread']:.0f} %"]


def noise_columns() -> list[str]:
    """Headings of the table of noise alone."""
    return ["noise, one core", "ns a sample", "torch.randn, ns a sample", "torch.randn / dpfast"]


def noise_cells(row: dict[str, Any]) -> list[str]:
    """The figures of noise alone."""
    gain = row["torch_randn_over_dpfast"]["median_of_rounds"]
    return [
        row["mechanism"],
        f"{row['nanoseconds_per_sample']['median']:.2f}",
        f"{row['torch_randn_nanoseconds_per_sample']['median']:.2f}",
        f"{gain:.2f}x" + (" (missed)" if gain < NOISE_OVER_RANDN_TARGET else ""),
    ]


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    device_type = result["machine"]["device_type"]
    rows = [row_cells(row, device_type) for row in result["rows"]]
    found = [TextTable("clip_and_noise", columns(device_type), rows, ("variant",))]
    if result["noise"]:
        noise = [noise_cells(row) for row in result["noise"]]
        found.append(TextTable("noise alone", noise_columns(), noise))
    return found


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The table of rows where nobody has measured."""
    chosen = clip_and_noise.cases(device_type, quick=quick)
    rows = [not_measured_cells(case, device_type) for case in chosen]
    return [TextTable("clip_and_noise", columns(device_type), rows, ("variant",))]
