"""Whether two runs of the benchmarks agree within the spread that they report.

    python -m benchmarks agreement FOLDER [OTHER]    # OTHER: this device's saved results

Every figure that both runs' tables have is compared: how far it moved, relative to the mean of
both, and in how many rows by no more than the larger of the two runs' spreads. Spreads are of
dpfast's time within one run; where a table has none (memory, federated rounds), 2 % are allowed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._ops import OPS
from benchmarks._record import RESULTS, device_slug
from benchmarks._text import TextTable

__all__ = ["Agreement", "compare", "main"]

_FIGURE = re.compile(r"(-?\d+(?:\.\d+)?)(x| %| ms| s| MiB| MB| GB/s)?(?: \(missed\))?")
_SPREAD = "spread"
_WITHOUT_SPREAD = 0.02


@dataclass(frozen=True)
class Agreement:
    """A column of a table in two runs.

    Attributes:
      op: the benchmark.
      table: its title.
      column: the heading.
      moved: by how much each row's figure differs, relative to the mean of both.
      within: how many of them by no more than the spread.
    """

    op: str
    table: str
    column: str
    moved: Sequence[float]
    within: int


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Agreement]:
    """Two results of one op on one kind of device.

    Raises:
      ValueError: they are not of the same rows.
    """
    op = first["op"]
    if op != second["op"] or [_case(r) for r in first["rows"]] != [
        _case(r) for r in second["rows"]
    ]:
        raise ValueError(f"both results must be of the same op with the same rows: {op}")
    render = OPS[op].tables
    found = []
    for one, other in zip(render(dict(first)), render(dict(second)), strict=False):
        if one.title == other.title and len(one.rows) == len(other.rows):
            found += _compare_tables(op, one, other)
    return found


def _case(row: Mapping[str, Any]) -> object:
    return json.dumps(row["case"], sort_keys=True)


def _compare_tables(op: str, one: TextTable, other: TextTable) -> list[Agreement]:
    found = []
    for number, heading in enumerate(one.headings):
        if heading == _SPREAD or heading in one.left:
            continue
        moved, within = [], 0
        for row, same in zip(one.rows, other.rows, strict=True):
            if (difference := _moved(row[number], same[number])) is None:
                continue
            moved.append(difference)
            within += difference <= max(_spread(one, row), _spread(other, same))
        if any(moved):  # else it is no measurement
            found.append(Agreement(op, one.title, heading, moved, within))
    return found


def _moved(cell: str, other: str) -> float | None:
    """The relative difference of two cells; None unless both are figures."""
    matches = [_FIGURE.fullmatch(each) for each in (cell, other)]
    if matches[0] is None or matches[1] is None or matches[0][2] != matches[1][2]:
        return None
    a, b = (float(match[1]) for match in matches if match is not None)
    mean = (abs(a) + abs(b)) / 2
    return abs(a - b) / mean if mean else 0.0


def _spread(table: TextTable, row: Sequence[str]) -> float:
    if _SPREAD not in table.headings:
        return _WITHOUT_SPREAD
    match = _FIGURE.fullmatch(row[list(table.headings).index(_SPREAD)])
    return 0.0 if match is None else float(match[1]) / 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks agreement", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run's results: holds OP.json")
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        default=RESULTS / device_slug(torch.device("cpu")),
        help="of another's (default: this CPU's in benchmarks/results)",
    )
    arguments = parser.parse_args(argv)
    table = Table("op", "table", "column", "rows", "median change", "largest", "within the spread")
    compared = []
    for op in OPS:
        files = [folder / f"{op}.json" for folder in (arguments.folder, arguments.other)]
        if not all(file.exists() for file in files):
            continue
        compared.append(op)
        try:
            found = compare(*(json.loads(file.read_text()) for file in files))
        except ValueError as error:
            parser.error(str(error))
        for each in found:
            table.add_row(
                each.op,
                each.table,
                each.column,
                str(len(each.moved)),
                f"{100 * statistics.median(each.moved):.1f} %",
                f"{100 * max(each.moved):.1f} %",
                f"{each.within}",
            )
    if not compared:
        parser.error(f"no op has results in both {arguments.folder} and {arguments.other}")
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    print(f"compared: {', '.join(compared)}; a figure that did not move at all has no line")
    return 0
