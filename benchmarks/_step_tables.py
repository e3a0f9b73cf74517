"""The tables of the step benchmark, and what those of its memory share with them."""

from __future__ import annotations

from typing import Any

from benchmarks._networks import network_of
from benchmarks._step_contenders import BUDGET, DPFAST, ORDINARY
from benchmarks._step_task import Case
from benchmarks._text import NOT_MEASURED, TextTable, not_measured
from benchmarks.step import cases

__all__ = [
    "CASE_HEADINGS",
    "LABELS",
    "TEXT",
    "case_cells",
    "empty_rows",
    "failed_cell",
    "failure_tables",
    "tables",
    "time_target",
    "times_cell",
    "unmeasured",
]

_TIME_TARGETS = {"cpu": 1.05, "cuda": 1.15}
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
CASE_HEADINGS = ["network", "batch", "parameters"]

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

"dpfast, memory budget" is `per_sample_gradients(model, memory_budget=1.1)`. Target, for UNet 2D,
UNet 3D, SegResNet 3D and DynUNet 3D: at most 1.05 times the ordinary step's time on the CPU, at
most 1.15 times on CUDA.
"""


def time_target(case: Case, device_type: str) -> float | None:
    """The largest time over the ordinary step's; None where no target was set."""
    return _TIME_TARGETS[device_type] if network_of(case.network).has_target else None


def times_cell(value: float, *, most: float | None = None) -> str:
    """A multiple; marked where it is above what was wanted."""
    return f"{value:.2f}x" + (" (missed)" if most is not None and value > most else "")


def case_cells(case: Case, parameters: int | None) -> list[str]:
    """What every row begins with."""
    return [
        case.network,
        case.shape,
        NOT_MEASURED if parameters is None else f"{parameters / 1e6:.2f} M",
    ]


def failed_cell(reason: str) -> str:
    """The exception's type: the whole line is in the table of failures."""
    return f"failed: {reason.partition(':')[0]}"


def _time_cells(row: dict[str, Any], device_type: str) -> list[str]:
    case = Case.from_json(row["case"])
    ratios, failures = row["time_over_ordinary"], row["not_measured"]
    most = time_target(case, device_type)
    cells = case_cells(case, row["parameters"])
    cells.append(f"{1e3 * row['seconds'][ORDINARY]['median']:.1f} ms")
    for name in LABELS:
        if name in failures:
            cells.append(failed_cell(failures[name]))
        elif name not in ratios:
            cells.append(NOT_MEASURED)
        else:
            limit = most if name in (DPFAST, BUDGET) else None
            cells.append(times_cell(ratios[name]["median_of_rounds"], most=limit))
    return [*cells, f"{100 * row['seconds'][DPFAST]['spread']:.0f} %"]


def failure_tables(result: dict[str, Any]) -> list[TextTable]:
    """Who failed how on which networks; no table where nobody did."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["not_measured"].items():
            found.setdefault((LABELS[name], reason), []).append(row["case"]["network"])
    rows = [[peer, ", ".join(networks), how] for (peer, how), networks in found.items()]
    headings = ["failed", "on", "how"]
    return [TextTable("how peers fail", headings, rows, headings)] if rows else []


def _time_table(rows: list[list[str]]) -> TextTable:
    headings = [*CASE_HEADINGS, "ordinary step", *LABELS.values(), "spread"]
    return TextTable("time over the ordinary step", headings, rows, ("network",))


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    device_type = result["machine"]["device_type"]
    found = [_time_table([_time_cells(row, device_type) for row in result["rows"]])]
    return found + failure_tables(result)


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The same tables where nobody has measured."""
    return [_time_table(empty_rows(cases(device_type, quick=quick), _time_table([])))]


def empty_rows(chosen: list[Case], table: TextTable) -> list[list[str]]:
    """Rows of a table that nobody has measured."""
    rows = []
    for case in chosen:
        cells = [case.network, case.shape]
        rows.append([*cells, *[not_measured(None)] * (len(table.headings) - len(cells))])
    return rows
