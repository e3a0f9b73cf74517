"""README's table of a private step, from the saved results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._networks import network_of
from benchmarks._step_contenders import DPFAST
from benchmarks._step_tables import LABELS
from benchmarks._text import NOT_MEASURED

__all__ = ["BEGIN", "END", "replace_table"]

BEGIN = "<!-- Written by `python -m benchmarks report`. -->"
END = "<!-- End of what is written. -->"
_PEERS = (DPFAST, "torch_func", "opacus_hooks")


def _cells(row: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    """A network's name, then time and memory of every contender."""
    times, memories = row["time_over_ordinary"], memory["memory_over_ordinary"]
    cells = [row["case"]["network"]]
    for found in (
        {name: times[name]["median_of_rounds"] for name in _PEERS if name in times},
        {name: memories[name] for name in _PEERS if name in memories},
    ):
        for name in _PEERS:
            if name in found:
                cells.append(f"{found[name]:.2f}x")
            else:
                failed = name in {**row["not_measured"], **memory["not_measured"]}
                cells.append("fails" if failed else NOT_MEASURED)
    return cells


def _table(steps: Mapping[str, Any], memories: Mapping[str, Any]) -> list[str]:
    headings = [""]
    for what in ("time", "memory"):
        headings += [f"{what}: {LABELS[_PEERS[0]]}", *(LABELS[name] for name in _PEERS[1:])]
    by_network = {row["case"]["network"]: row for row in memories["rows"]}
    rows = [
        _cells(row, by_network[row["case"]["network"]])
        for row in steps["rows"]
        if network_of(row["case"]["network"]).has_target
    ]
    return ["| " + " | ".join(each) + " |" for each in (headings, ["---"] * len(headings), *rows)]


def replace_table(
    readme: str, steps: Sequence[Mapping[str, Any]], memories: Sequence[Mapping[str, Any]]
) -> str:
    """README with its table made anew.

    Args:
      readme: holds BEGIN and END, a line each.
      steps: of the step benchmark; the first one on a CPU is shown.
      memories: of the memory benchmark; that of the same device is shown.

    Raises:
      ValueError: no such lines, or no such results.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    devices = {each["machine"]["device_slug"]: each for each in memories}
    shown = [
        (each, devices[each["machine"]["device_slug"]])
        for each in steps
        if each["machine"]["device_type"] == "cpu" and each["machine"]["device_slug"] in devices
    ]
    if not begin or not end or not shown:
        raise ValueError(f"README must hold {BEGIN!r} and {END!r}, and a CPU be measured")
    lines = [BEGIN, "", *_table(*shown[0]), "", END]
    return before + "\n".join(lines) + after
