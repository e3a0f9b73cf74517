"""The tables of the scaling benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks import scaling
from benchmarks._text import NOT_MEASURED, TextTable
from benchmarks.scaling import CONTENDERS, Case

__all__ = ["EFFICIENCY_TARGET", "TEXT", "tables", "unmeasured"]

EFFICIENCY_TARGET = 0.95
_LABELS = {"dpfast": "dpfast's private step", "ordinary": "ordinary step, DDP"}
_HEADINGS = (
    *("network", "a process's batch", "step", "one process, samples/s", "two apart"),
    *("two together", "together over apart", "spread"),
)
_LEFT = ("network", "step")

TEXT = """\
Weak scaling: two processes with a batch each of the same (expected) size, against one. "two apart"
trains two models that know nothing of each other, and shows what the machine takes for itself:
memory, caches and clock are shared. "two together" trains one model. Both are samples a second over
twice those of one process alone, medians over rounds in which all take turns; "spread" is the
interquartile range of "two together" over its median. On the CPU each process has half the cores
and they talk by gloo. The private step is `PrivacyEngine`'s, with Poisson batches and a ledger on
the disk. Checked in every turn: both processes have the same weights, bit for bit.

Target: two together at least 0.95.
"""


def _case_cells(case: Case) -> list[str]:
    return [case.network, f"{case.batch_size}x1x{'x'.join(map(str, case.size))}"]


def _row(case: Case, contender: str, found: dict[str, Any]) -> list[str]:
    efficiency = found["efficiency"]
    together = efficiency["together"]["median"]
    missed = contender == "dpfast" and together < EFFICIENCY_TARGET
    return [
        *_case_cells(case),
        _LABELS[contender],
        f"{found['samples_per_second']['alone']['median']:.1f}",
        f"{efficiency['apart']['median']:.2f}",
        f"{together:.2f}{' (missed)' if missed else ''}",
        f"{found['together_over_apart']:.2f}",
        f"{100 * efficiency['together']['spread']:.0f} %",
    ]


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    rows = [
        _row(Case.from_json(row["case"]), contender, row["contenders"][contender])
        for row in result["rows"]
        for contender in CONTENDERS
    ]
    if not rows:
        return unmeasured(result["machine"]["device_type"], quick=result["quick"])
    return [TextTable("weak scaling", _HEADINGS, rows, _LEFT)]


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The table where nobody has measured."""
    rows = [
        [*_case_cells(case), _LABELS[contender], *[NOT_MEASURED] * 5]
        for case in scaling.cases(device_type, quick=quick)
        for contender in CONTENDERS
    ]
    return [TextTable("weak scaling", _HEADINGS, rows, _LEFT)]
