"""The tables of the memory benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks._networks import network_of
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY
from benchmarks._step_tables import (
    CASE_HEADINGS,
    LABELS,
    case_cells,
    empty_rows,
    failed_cell,
    failure_tables,
    times_cell,
)
from benchmarks._step_task import Case
from benchmarks._text import NOT_MEASURED, TextTable, not_measured
from benchmarks.memory import batch_cases, cases

__all__ = ["LARGEST_BATCH_TARGET", "TEXT", "memory_target", "tables", "unmeasured"]

LARGEST_BATCH_TARGET = 0.9
_TARGETS = {"cpu": 1.10, "cuda": 1.15}

TEXT = """\
Peak memory of the steps that `step` times, over the ordinary step's, with the same checks before.
On the CPU it is the peak of resident memory (VmHWM) over three steps in a fresh process minus what
that held before (libraries, network, batch, and what a step on one sample leaves behind). The
process sets `MALLOC_MMAP_THRESHOLD_=65536`, so that freed tensors go back to the system: what glibc
keeps of them otherwise differs by 15 % from process to process. On CUDA it is PyTorch's peak of
allocated memory minus what was allocated before. The peers are measured on the networks with
targets.

Target, for UNet 2D, UNet 3D, SegResNet 3D and DynUNet 3D: at most 1.10 times the ordinary step's
memory on the CPU, at most 1.15 times on CUDA. In the table on the largest batch, "largest batch" is
the ordinary step's peak memory over that of dpfast with `memory_budget=1.15`, at 8 times the batch
above: the part of the ordinary step's largest batch that fits in the same memory; the target is 0.9
at least. Its times are medians of three steps.
"""


def memory_target(case: Case, device_type: str) -> float | None:
    """The largest memory over the ordinary step's; None where no target was set."""
    return _TARGETS[device_type] if network_of(case.network).has_target else None


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def _memory_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case = Case.from_json(row["case"])
    failures, most = row["not_measured"], memory_target(case, device_type)
    cells = case_cells(case, row["parameters"])
    cells.append(_mebibytes(row["memory"][ORDINARY]["bytes"]))
    for name in LABELS:
        if name in failures:
            cells.append(failed_cell(failures[name]))
        elif name not in row["memory_over_ordinary"]:
            cells.append(NOT_MEASURED)
        else:
            limit = most if name in (DPFAST, BUDGET) else None
            cells.append(times_cell(row["memory_over_ordinary"][name], most=limit))
    return cells


def _batch_cells(row: dict[str, Any]) -> list[str]:
    case = Case.from_json(row["case"])
    cells = case_cells(case, row["parameters"])
    cells.append(_mebibytes(row["memory"][ORDINARY]["bytes"]))
    if BUDGET not in row["memory_over_ordinary"]:
        return [*cells, *[not_measured(row["not_measured"].get(BUDGET))] * 3]
    memory = row["memory_over_ordinary"][BUDGET]
    share = 1 / memory
    missed = " (missed)" if share < LARGEST_BATCH_TARGET else ""
    time = row["seconds"][BUDGET]["median"] / row["seconds"][ORDINARY]["median"]
    return [*cells, times_cell(memory), f"{share:.2f}{missed}", times_cell(time)]


def _memory_table(rows: list[list[str]]) -> TextTable:
    headings = [*CASE_HEADINGS, "ordinary step, peak memory", *LABELS.values()]
    return TextTable("peak memory over the ordinary step", headings, rows, ("network",))


def _batch_table(rows: list[list[str]]) -> TextTable:
    headings = [*CASE_HEADINGS, "ordinary step, peak memory"]
    headings += ["memory / ordinary", "largest batch", "time / ordinary"]
    return TextTable("largest batch: dpfast with a memory budget", headings, rows, ("network",))


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    device_type = result["machine"]["device_type"]
    found = [_memory_table([_memory_cells(row, device_type) for row in result["rows"]])]
    if result["batches"]:
        found.append(_batch_table([_batch_cells(row) for row in result["batches"]]))
    return found + failure_tables(result)


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The same tables where nobody has measured."""
    found = [_memory_table(empty_rows(cases(device_type, quick=quick), _memory_table([])))]
    if larger := batch_cases(device_type, quick=quick):
        found.append(_batch_table(empty_rows(larger, _batch_table([]))))
    return found
