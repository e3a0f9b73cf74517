"""`dpfast federate`: private training of one model at several sites, from one settings file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dpfast.errors import PrivacyError

__all__ = ["federate"]


def federate(
    settings: Annotated[
        Path | None, typer.Argument(help="TOML file; see examples/federated_*.toml.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Phantoms at three sites, by several methods; no data.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the demonstration's runs.")] = Path(
        "runs/federated_demo"
    ),
) -> None:
    """Train one segmentation model at several sites, each patient protected, as SETTINGS says.

    Started again with the same settings, an interrupted run goes on where it was.
    """
    if (settings is None) != demo:
        raise typer.BadParameter("give either SETTINGS or --demo")
    console = Console()
    try:
        # Here, since the packages of the extra may be missing.
        from dpfast.federated.demo import demonstrate
        from dpfast.federated.training import federate as run

        with _Bar(console) as bar:
            if settings is None:
                table = _comparison(demonstrate(output, bar.named))
            else:
                table = _table(run(settings, bar))
    except (ValueError, TypeError, ImportError, OSError, PrivacyError, RuntimeError) as error:
        print(f"dpfast federate: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(table)


class _Bar:
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

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def named(self, method: str) -> _Bar:
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
        dice = None if line["scores"] is None else _mean(line["scores"]["dice"])
        shown = "" if dice is None else f", validation Dice {dice:.3f}"
        self._say(f"round {line['round']}: epsilon {_shown(line['epsilon'])}{shown}")
        for name, site in line["sites"].items():
            if site["status"] != "trained" and site["reason"]:
                self._say(f"  {name}: {site['status']}, {site['reason']}")
        self._progress.update(self._task, completed=line["round"])

    def _say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(report: Mapping[str, Any]) -> Table:
    privacy, sites = report["privacy"], report["results"]["sites"]
    table = Table(show_header=False)
    table.add_row("method", report["run"]["method"])
    table.add_row("validation Dice", _shown(_mean(report["results"]["scores"]["dice"])))
    for name, scores in sites.items():
        if scores is not None:
            table.add_row(f"  at {name}", _shown(_mean(scores["dice"])))
    for name in ("epsilon", "delta", "privacy_unit", "guarantee"):
        table.add_row(name.replace("_", " "), _shown(privacy[name]))
    if privacy["reasons"]:
        table.add_row("because", "; ".join(privacy["reasons"]))
    table.add_row("not covered", privacy["not_covered"])
    return table


def _comparison(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("method", "validation Dice", "lowest and highest site", "epsilon", "guarantee")
    for method, report in reports.items():
        results, privacy = report["results"], report["privacy"]
        sites = [_mean(each["dice"]) for each in results["sites"].values() if each is not None]
        known = [each for each in sites if each is not None]
        table.add_row(
            method,
            _shown(_mean(results["scores"]["dice"])),
            f"{_shown(min(known))} to {_shown(max(known))}" if known else "none",
            _shown(privacy["epsilon"]),
            privacy["guarantee"],
        )
    return table


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
