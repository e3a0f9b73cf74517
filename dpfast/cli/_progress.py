"""What people see of a federated run: a bar over its rounds, and a line for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["RoundsBar", "mean", "report_table", "spoken"]


class RoundsBar:
    """Shows a run: a progress bar over its rounds, and a line for each."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> RoundsBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def named(self, method: str) -> RoundsBar:
        """The same for one of several runs."""
        self._say(f"[{method}]")
        return self

    def started(self, sites: Iterable[str], rounds_done: int, rounds: int) -> None:
        """See rounds.Observer."""
        self._say(f"sites: {', '.join(sites)}")
        if rounds_done:
            self._say(f"going on after round {rounds_done}")
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("training", total=rounds, completed=rounds_done)

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """See rounds.Observer."""
        dice = None if line["scores"] is None else mean(line["scores"]["dice"])
        dice_said = "" if dice is None else f", validation Dice {dice:.3f}"
        self._say(f"round {line['round']}: epsilon {spoken(line['epsilon'])}{dice_said}")
        for name, site in line["sites"].items():
            if site["status"] != "trained" and site["reason"]:
                self._say(f"  {name}: {site['status']}, {site['reason']}")
        self._progress.update(self._task, completed=line["round"])

    def _say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def report_table(report: Mapping[str, Any]) -> Table:
    """What a finished run came to."""
    privacy, sites = report["privacy"], report["results"]["sites"]
    table = Table(show_header=False)
    table.add_row("method", report["run"]["method"])
    table.add_row("validation Dice", spoken(mean(report["results"]["scores"]["dice"])))
    for name, scores in sites.items():
        if scores is not None:
            table.add_row(f"  at {name}", spoken(mean(scores["dice"])))
    for name in ("epsilon", "delta", "privacy_unit", "guarantee"):
        table.add_row(name.replace("_", " "), spoken(privacy[name]))
    if privacy["reasons"]:
        table.add_row("because", "; ".join(privacy["reasons"]))
    table.add_row("not covered", privacy["not_covered"])
    return table


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is known; None: nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spoken(value: Any) -> str:
    """Three digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
