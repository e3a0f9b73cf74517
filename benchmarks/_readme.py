"""README's table of a private step, from the saved results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._step_contenders import DPFAST
from benchmarks._step_tables import LABELS
from benchmarks._text import NOT_MEASURED

__all__ = ["BEGIN", "END", "replace_table"]

BEGIN = "<!-- Written by `python -m benchmarks report`. -->"
END = "<!-- End of what is written. -->"
_PEERS = (DPFAST, "torch_func", "opacus_hooks")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A network's name, then time and memory of every contender."""
    times, memories = row["time_over_ordinary"], row["memory_over_ordinary"]
    cells = [row["case"]["network"]]
    for found in (
        {name: times[name]["median_of_rounds"] for name in _PEERS if name in times},
        {name: memories[name] for name in _PEERS if name in memories},
    ):
        for name in _PEERS:
            if name in found:
                cells.append(f"{found[name]:.2f}x")
            else:
                cells.append("fails" if name in row["not_measured"] else NOT_MEASURED)
    return cells


def _table(result: Mapping[str, Any]) -> list[str]:
    headings = [""]
    for what in ("time", "memory"):
        headings += [f"{what}: {LABELS[_PEERS[0]]}", *(LABELS[name] for name in _PEERS[1:])]
    # Those whose peers' memory was measured are those with targets.
    rows = [_cells(row) for row in result["rows"] if "torch_func" in row["memory_over_ordinary"]]
    return ["| " + " | ".join(each) + " |" for each in (headings, ["---"] * len(headings), *rows)]


def replace_table(readme: str, results: Sequence[Mapping[str, Any]]) -> str:
    """README with its table made anew.

    Args:
      readme: holds BEGIN and END, a line each.
      results: of the step benchmark; the first one on a CPU is shown.

    Raises:
      ValueError: no such lines, or no such result.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    shown = [each for each in results if each["machine"]["device_type"] == "cpu"]
    if not begin or not end or not shown:
        raise ValueError(f"README must hold {BEGIN!r} and {END!r}, and a CPU be measured")
    lines = [BEGIN, "", *_table(shown[0]), "", END]
    return before + "\n".join(lines) + after
