"""The tables of the step benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks._networks import network_of
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY
from benchmarks._step_task import Case
from benchmarks._text import NOT_MEASURED, TextTable, not_measured
from benchmarks.step import batch_cases, cases

__all__ = [
    "LABELS",
    "LARGEST_BATCH_TARGET",
    "TEXT",
    "memory_target",
    "tables",
    "time_target",
    "unmeasured",
]

LARGEST_BATCH_TARGET = 0.9
_TIME_TARGETS = {"cpu": 1.05, "cuda": 1.15}
_MEMORY_TARGETS = {"cpu": 1.10, "cuda": 1.15}
LABELS = {
    DPFAST: "dpfast",
    BUDGET: "dpfast, memory budget",
    "torch_func": "torch.func",
    "opake": "opake",
    "opacus_hooks": "Opacus hooks",
    "opacus_functorch": "Opacus functorch",
    "opacus_ghost": "Opacus ghost",
    "fastdp": "fastDP",
}
_CASE_HEADINGS = ["network", "batch", "parameters"]

TEXT = """\
A step is zero_grad, forward, MONAI's Dice and cross-entropy loss (softmax, two classes), backward
and plain SGD; a private one clips every sample's gradient to the median of their norms and adds
noise of multiplier 1. All figures are ratios over the ordinary step in the same run. Its loss is
MONAI's own mean over the batch, of which it is checked that the mean of the per-sample losses is
the same. Every network has random weights and images; BatchNorm is replaced for all contenders
(`dpfast.replace_batchnorm`), dropout and stochastic depth are off, parameters that take no part are
frozen. The two UNets have the channels 16, 32, 64, 128 and two residual units, which makes 0.40
million parameters in 2D and 1.19 million in 3D.

Checked before: each contender's noiseless step against ordinary autograd on one sample after the
other, in float64 on two samples and in float32 on the batch that is timed, and the noise's moments.
"torch.func" is `vmap(grad(...))` with clipping and noise in PyTorch's ops; Opacus' ghost clipping
gets dpfast's per-sample loss, since it would clip something else with MONAI's. fastDP clips in its
default mode by its "Abadi" rule; it comes from its repository alone
(github.com/awslabs/fast-differential-privacy). jax-privacy takes no part: it differentiates JAX's
functions, not PyTorch's networks.

Memory on the CPU is the peak of resident memory (VmHWM) over three steps in a fresh process minus
what it held before (libraries, network, batch, and what a step on one sample leaves behind). The
process sets `MALLOC_MMAP_THRESHOLD_=65536`, so that freed tensors go back to the system: what glibc
keeps of them otherwise differs by 15 % from process to process. On CUDA it is PyTorch's peak of
allocated memory minus what was allocated before. The peers' memory is measured on the networks with
targets.

"dpfast, memory budget" is `per_sample_gradients(model, memory_budget=1.1)`. Targets, for UNet 2D,
UNet 3D, SegResNet 3D and DynUNet 3D: at most 1.05 times the time and 1.10 times the memory on the
CPU, at most 1.15 times either on CUDA. In the table on the largest batch, "largest batch" is the
ordinary step's peak memory over that of dpfast with `memory_budget=1.15`, at 8 times the batch
above: the part of the ordinary step's largest batch that fits in the same memory; the target is 0.9
at least. Its times are medians of three steps.
"""


def time_target(case: Case, device_type: str) -> float | None:
    """The largest time over the ordinary step's; None where no target was set."""
    return _TIME_TARGETS[device_type] if network_of(case.network).has_target else None


def memory_target(case: Case, device_type: str) -> float | None:
    """The largest memory over the ordinary step's; None where no target was set."""
    return _MEMORY_TARGETS[device_type] if network_of(case.network).has_target else None


def _times(value: float, *, most: float | None = None) -> str:
    return f"{value:.2f}x" + (" (missed)" if most is not None and value > most else "")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def _case_cells(case: Case, parameters: int | None) -> list[str]:
    return [
        case.network,
        case.shape,
        NOT_MEASURED if parameters is None else f"{parameters / 1e6:.2f} M",
    ]


def _failed(reason: str) -> str:
    """The exception's type: the whole line is in the table of failures."""
    return f"failed: {reason.partition(':')[0]}"


def _time_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case = Case.from_json(row["case"])
    ratios, failures = row["time_over_ordinary"], row["not_measured"]
    most = time_target(case, device_type)
    cells = _case_cells(case, row["parameters"])
    cells.append(f"{1e3 * row['seconds'][ORDINARY]['median']:.1f} ms")
    for name in LABELS:
        if name in failures:
            cells.append(_failed(failures[name]))
        elif name not in ratios:
            cells.append(NOT_MEASURED)
        else:
            limit = most if name in (DPFAST, BUDGET) else None
            cells.append(_times(ratios[name]["median_of_rounds"], most=limit))
    return [*cells, f"{100 * row['seconds'][DPFAST]['spread']:.0f} %"]


def _memory_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case = Case.from_json(row["case"])
    failures = {**row["not_measured"], **row["memory_not_measured"]}
    most = memory_target(case, device_type)
    cells = _case_cells(case, row["parameters"])
    cells.append(_mebibytes(row["memory"][ORDINARY]["bytes"]))
    for name in LABELS:
        if name in failures:
            cells.append(_failed(failures[name]))
        elif name not in row["memory_over_ordinary"]:
            cells.append(NOT_MEASURED)
        else:
            limit = most if name in (DPFAST, BUDGET) else None
            cells.append(_times(row["memory_over_ordinary"][name], most=limit))
    return cells


def _batch_cells(row: dict[str, Any]) -> list[str]:
    case = Case.from_json(row["case"])
    cells = _case_cells(case, row["parameters"])
    cells.append(_mebibytes(row["memory"][ORDINARY]["bytes"]))
    if BUDGET not in row["memory_over_ordinary"]:
        return [*cells, *[not_measured(row["not_measured"].get(BUDGET))] * 3]
    memory = row["memory_over_ordinary"][BUDGET]
    share = 1 / memory
    missed = " (missed)" if share < LARGEST_BATCH_TARGET else ""
    time = row["seconds"][BUDGET]["median"] / row["seconds"][ORDINARY]["median"]
    return [*cells, _times(memory), f"{share:.2f}{missed}", _times(time)]


def _failures(result: dict[str, Any]) -> list[list[str]]:
    """Who failed how on which networks."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for key, prefix in (("not_measured", ""), ("memory_not_measured", "memory: ")):
            for name, reason in row[key].items():
                networks = found.setdefault((LABELS[name], prefix + reason), [])
                networks.append(row["case"]["network"])
    return [[peer, ", ".join(networks), how] for (peer, how), networks in found.items()]


def _time_table(rows: list[list[str]]) -> TextTable:
    headings = [*_CASE_HEADINGS, "ordinary step", *LABELS.values(), "spread"]
    return TextTable("time over the ordinary step", headings, rows, ("network",))


def _memory_table(rows: list[list[str]]) -> TextTable:
    headings = [*_CASE_HEADINGS, "ordinary step, peak memory", *LABELS.values()]
    return TextTable("peak memory over the ordinary step", headings, rows, ("network",))


def _batch_table(rows: list[list[str]]) -> TextTable:
    headings = [*_CASE_HEADINGS, "ordinary step, peak memory"]
    headings += ["memory / ordinary", "largest batch", "time / ordinary"]
    return TextTable("largest batch: dpfast with a memory budget", headings, rows, ("network",))


def _failure_table(rows: list[list[str]]) -> TextTable:
    headings = ["failed", "on", "how"]
    return TextTable("how peers fail", headings, rows, headings)


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    device_type = result["machine"]["device_type"]
    found = [
        _time_table([_time_cells(row, device_type) for row in result["rows"]]),
        _memory_table([_memory_cells(row, device_type) for row in result["rows"]]),
    ]
    if result["batches"]:
        found.append(_batch_table([_batch_cells(row) for row in result["batches"]]))
    if failures := _failures(result):
        found.append(_failure_table(failures))
    return found


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The same tables where nobody has measured."""
    found = []
    for build in (_time_table, _memory_table):
        found.append(build(_empty_rows(cases(device_type, quick=quick), build([]))))
    if larger := batch_cases(device_type, quick=quick):
        found.append(_batch_table(_empty_rows(larger, _batch_table([]))))
    return found


def _empty_rows(chosen: list[Case], table: TextTable) -> list[list[str]]:
    rows = []
    for case in chosen:
        cells = [case.network, case.shape]
        rows.append([*cells, *[not_measured(None)] * (len(table.headings) - len(cells))])
    return rows
