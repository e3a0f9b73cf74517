"""The tables of the federated benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks._federated_cases import Case, cases, memory_cases
from benchmarks._text import NOT_MEASURED, TextTable

__all__ = ["MEMORY_GROWTH_TARGET", "OVERHEAD_TARGET", "TEXT", "tables", "unmeasured"]

OVERHEAD_TARGET = 0.02
# "Whatever the number of sites": their images and ledgers are there, too.
MEMORY_GROWTH_TARGET = 1.1
_LEFT = ("network",)

TEXT = """\
Sites in one process, phantoms of 64x64, MONAI's UNet, FedAvg, ADP-FL. "outside the sites" is what
messages, checks, averages, digests and the server's files take, over the time in which sites train;
evaluation is in neither. "a site beyond its steps" is what a site's rounds take beyond their
training steps, over those: making the model, the engine and the optimizer, ledger and checkpoint. A
row is the median of whole runs, "spread, points" the distance of their extremes.

Memory is the rounds' peak beyond what libraries and the sites with their data hold, of resident
memory in a fresh process with `MALLOC_MMAP_THRESHOLD_=65536`, over the network's weights: weights,
gradients, optimizer and activations of one site, the server's weights and their mean. "held before"
is what more sites hold more: phantoms stay in memory, images from files do not.

Targets: outside the sites at most 2 %; the same memory whatever the number of sites.
"""


def _mark(cell: str, missed: bool) -> str:
    return f"{cell} (missed)" if missed else cell


def _time_headings() -> list[str]:
    return [
        *("network", "sites", "local epochs", "s/round"),
        *("outside the sites", "spread, points", "a site beyond its steps"),
    ]


def _case_cells(case: Case) -> list[str]:
    return [case.network, str(case.sites), str(case.local_epochs)]


def _time_row(row: dict[str, Any]) -> list[str]:
    case = Case.from_json(row["case"])
    totals = sorted(each["total"] for each in row["seconds"])
    share = row["outside_over_training"]
    return [
        *_case_cells(case),
        f"{totals[len(totals) // 2] / case.rounds:.2f}",
        _mark(f"{100 * share:.2f} %", share > OVERHEAD_TARGET),
        f"{100 * row['spread']:.2f} %",
        f"{100 * row['site_over_steps']:.1f} %",
    ]


def _memory_headings() -> list[str]:
    return [
        *("network", "sites", "weights, MB", "held before, MB more"),
        *("peak / weights", "over the fewest sites"),
    ]


def _memory_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    for row in rows:
        case = Case.from_json(row["case"])
        growth = row["bytes"] / rows[0]["bytes"]
        found.append(
            [
                case.network,
                str(case.sites),
                f"{row['model'] / 1e6:.1f}",
                _held_more(row, rows[0]),
                f"{row['bytes'] / row['model']:.1f}x",
                _mark(f"{growth:.2f}x", growth > MEMORY_GROWTH_TARGET),
            ]
        )
    return found


def _held_more(row: dict[str, Any], first: dict[str, Any]) -> str:
    if "base_bytes" not in row:  # results of earlier kinds
        return NOT_MEASURED
    return f"{(row['base_bytes'] - first['base_bytes']) / 1e6:.1f}"


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    return [
        TextTable("time", _time_headings(), [_time_row(row) for row in result["rows"]], _LEFT),
        TextTable("peak memory", _memory_headings(), _memory_rows(result["memory"]), _LEFT),
    ]


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The tables where nobody has measured."""
    times = [[*_case_cells(case), *[NOT_MEASURED] * 4] for case in cases(quick=quick)]
    memory = [
        [case.network, str(case.sites), *[NOT_MEASURED] * 4] for case in memory_cases(quick=quick)
    ]
    return [
        TextTable("time", _time_headings(), times, _LEFT),
        TextTable("peak memory", _memory_headings(), memory, _LEFT),
    ]
