"""The tables of the morphology benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks._morphology_cases import Case, cases, memory_cases
from benchmarks._morphology_contenders import DPFAST
from benchmarks._text import NOT_MEASURED, TextTable, not_measured

__all__ = [
    "BACKWARD_TARGET",
    "BANDWIDTH_TARGET",
    "MEMORY_GROWTH_TARGET",
    "MEMORY_TARGET",
    "TEXT",
    "backward_target",
    "kornia_target",
    "opencv_target",
    "quoted_ratios",
    "tables",
    "unmeasured",
]

BACKWARD_TARGET = 4.0
BANDWIDTH_TARGET = 0.60
MEMORY_TARGET = 3.0
# "Independent of the size", with room for how repeatable a peak is.
MEMORY_GROWTH_TARGET = 1.05
_OPENCV_TARGET = 1.0
_KORNIA_TARGETS = {"cpu": {3: 50.0, 15: 500.0}}
_KORNIA_TARGET_ON_CUDA = 10.0

TEXT = """\
"ms" is dpfast's time on the machine named. "share of bandwidth" is the time to move input and
output once at the bandwidth measured right before and after, over dpfast's time without a gradient:
read bandwidth on the CPU, copy bandwidth on CUDA. It can exceed 100 % where they fit in a cache.
"x / dpfast" says how many times longer x takes, in the same run and on as many threads; result
alone in the first table, result and gradient in the second.

Everything is checked before it is timed, and exactly: results against the definition, gradients
against where each of the input's distinct values went. In bfloat16, which has ties, dpfast's
gradient is compared with its own in float32, and max-pool's is not measured.

OpenCV is `cv2.morphologyEx` on one plane after the other, into given memory, or with the planes
shared out among as many threads; the faster of the two counts. The others allocate their results,
which glibc is told to keep when they are freed: new pages, of which every first touch costs, would
fall on whoever comes at the wrong time. "max-pool" is
`-max_pool(-max_pool(x))` over the whole element, "max-pool by axis" takes one axis after the other.
kornia is slow on the CPU and measured at few sizes there. SciPy is `grey_closing` on one image
after the other, on one thread, with the border "nearest", for it has no geodesic one; it is
compared with dpfast with that border. Where a call takes a second or more (max-pool on large
elements, kornia, SciPy) there are three rounds, in turn with dpfast.

Memory is the peak of a forward and backward pass of a closing beyond its input and the incoming
gradient, over the size of the input: on the CPU of resident memory in a fresh process with
`MALLOC_MMAP_THRESHOLD_=65536`, on CUDA PyTorch's.

Targets, for closings with boxes in float32: on the CPU as fast as OpenCV at least; result and
gradient at most 4 times the result alone, and 50 times faster than kornia's at size 3, 500 times at
15; on CUDA at least 60 % of the bandwidth, and 10 times faster than kornia. Memory at most 3 times
the input and independent of the size.
"""

_PEERS = {
    "opencv": "OpenCV",
    "max_pool": "max-pool",
    "max_pool_by_axis": "max-pool by axis",
    "kornia": "kornia",
    "scipy": "SciPy",
}
_BACKWARD_PEERS = ("max_pool", "max_pool_by_axis", "kornia")
_CASE_HEADINGS = ["input", "operation", "size", "threads"]
_LEFT = ("input", "operation", "contender", "rows", "failure")


def _has_targets(case: Case) -> bool:
    return (
        case.operation == "closing"
        and case.element == "box"
        and case.dtype == "float32"
        and len(case.sizes) == 1
    )


def opencv_target(case: Case) -> float | None:
    """The least time of OpenCV over dpfast's; None where no target was set."""
    return _OPENCV_TARGET if _has_targets(case) else None


def backward_target(case: Case, device_type: str) -> float | None:
    """The most that result and gradient may take over the result alone; None where none was set."""
    return BACKWARD_TARGET if device_type == "cpu" and _has_targets(case) else None


def kornia_target(case: Case, device_type: str) -> float | None:
    """The least time of kornia's result and gradient over dpfast's; None where there is none."""
    if not _has_targets(case):
        return None
    if device_type == "cuda":
        return _KORNIA_TARGET_ON_CUDA
    return _KORNIA_TARGETS["cpu"].get(case.sizes[0])


def _mark(text: str, value: float, *, least: float | None = None, most: float | None = None) -> str:
    missed = (least is not None and value < least) or (most is not None and value > most)
    return text + (" (missed)" if missed else "")


def _times(value: float, *, least: float | None = None, most: float | None = None) -> str:
    return _mark(f"{value:.2f}x", value, least=least, most=most)


def _case_cells(case: Case, threads: int | None, device_type: str) -> list[str]:
    if device_type == "cuda":
        shown = "-"
    elif threads is None:
        shown = "1" if case.one_thread else "all"
    else:
        shown = str(threads)
    return [case.input, case.operation_in_words, case.size_in_words, shown]


def _forward_headings() -> list[str]:
    peers = [f"{label} / dpfast" for label in _PEERS.values()]
    return [*_CASE_HEADINGS, "ms", "share of bandwidth", *peers, "spread"]


def _backward_headings() -> list[str]:
    peers = [f"{_PEERS[name]} / dpfast" for name in _BACKWARD_PEERS]
    return [*_CASE_HEADINGS, "ms", "over result alone", *peers, "spread"]


def quoted_ratios(row: dict[str, Any]) -> dict[str, float]:
    """The quoted ratios; OpenCV's is that of its faster way."""
    found = {name: float(value["median_of_rounds"]) for name, value in row["ratios"].items()}
    pool = found.get("opencv_pool_over_dpfast")
    if pool is not None:
        found["opencv_over_dpfast"] = min(pool, found.get("opencv_over_dpfast", pool))
    return found


def _peer_cell(row: dict[str, Any], name: str, key: str, least: float | None = None) -> str:
    ratios = quoted_ratios(row)
    if key in ratios:
        return _times(ratios[key], least=least)
    if name in row["failed"]:
        # The exception's type: the whole line is in the table of failures.
        return f"failed: {row['failed'][name].partition(':')[0]}"
    return not_measured(row["not_measured"].get(name))


def _own_cells(row: dict[str, Any], device_type: str, contender: str) -> list[str]:
    cells = _case_cells(Case.from_json(row["case"]), row["threads"], device_type)
    return [*cells, f"{1e3 * row['seconds'][contender]['median']:.3g}"]


def _forward_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case, share = Case.from_json(row["case"]), quoted_ratios(row)["share_of_bandwidth"]
    wanted = BANDWIDTH_TARGET if device_type == "cuda" and _has_targets(case) else None
    cells = _own_cells(row, device_type, DPFAST)
    cells.append(_mark(f"{100 * share:.1f} %", share, least=wanted))
    for name in _PEERS:
        least = opencv_target(case) if name == "opencv" else None
        cells.append(_peer_cell(row, name, f"{name}_over_dpfast", least))
    return [*cells, f"{100 * row['seconds'][DPFAST]['spread']:.0f} %"]


def _backward_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case, contender = Case.from_json(row["case"]), f"{DPFAST}_backward"
    most = backward_target(case, device_type)
    cells = _own_cells(row, device_type, contender)
    cells.append(_times(quoted_ratios(row)["backward_over_forward"], most=most))
    for name in _BACKWARD_PEERS:
        least = kornia_target(case, device_type) if name == "kornia" else None
        cells.append(_peer_cell(row, name, f"{name}_backward_over_dpfast", least))
    return [*cells, f"{100 * row['seconds'][contender]['spread']:.0f} %"]


def _memory_table(rows: list[list[str]]) -> TextTable:
    headings = ["input", "size", "contender", "peak / input", "over the smallest size"]
    return TextTable("peak memory, forward and backward", headings, rows, _LEFT)


def _memory_case_cells(contender: str, case: Case) -> list[str]:
    return [case.input, case.size_in_words, contender]


def _memory_rows(result: dict[str, Any]) -> list[list[str]]:
    found = []
    smallest: dict[tuple[str, str], float] = {}
    for row in result["memory"]:
        contender, case = row["contender"], Case.from_json(row["case"])
        cells = _memory_case_cells(contender, case)
        if "failed" in row:
            found.append([*cells, f"failed: {row['failed']}", NOT_MEASURED])
            continue
        memory = row["memory_over_input"]
        growth = memory / smallest.setdefault((contender, case.input), memory)
        ours = contender == DPFAST
        cells.append(_times(memory, most=MEMORY_TARGET if ours else None))
        cells.append(_times(growth, most=MEMORY_GROWTH_TARGET if ours else None))
        found.append(cells)
    return found


def _failures(result: dict[str, Any]) -> list[list[str]]:
    """Who failed how on which rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["failed"].items():
            rows = found.setdefault((name, reason), [])
            rows.append(Case.from_json(row["case"]).label)
    return [[name, "; ".join(rows), reason] for (name, reason), rows in found.items()]


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    kind = result["machine"]["device_type"]
    forward = [_forward_cells(row, kind) for row in result["rows"]]
    backward = [_backward_cells(row, kind) for row in result["rows"]]
    found = [
        TextTable("result alone", _forward_headings(), forward, _LEFT),
        TextTable("result and gradient", _backward_headings(), backward, _LEFT),
        _memory_table(_memory_rows(result)),
    ]
    if failures := _failures(result):
        found.append(TextTable("failures", ["contender", "rows", "failure"], failures, _LEFT))
    return found


def _blank(headings: list[str], cells: list[str]) -> list[str]:
    return [*cells, *[NOT_MEASURED] * (len(headings) - len(cells))]


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The tables where nobody has measured."""
    chosen = [_case_cells(case, None, device_type) for case in cases(device_type, quick=quick)]
    found = [
        TextTable(title, headings, [_blank(headings, cells) for cells in chosen], _LEFT)
        for title, headings in (
            ("result alone", _forward_headings()),
            ("result and gradient", _backward_headings()),
        )
    ]
    held = [
        [*_memory_case_cells(each.contender, each.case), NOT_MEASURED, NOT_MEASURED]
        for each in memory_cases(quick=quick)
    ]
    return [*found, _memory_table(held)]
