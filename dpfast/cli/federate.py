"""`dpfast federate`: private training of one model at several sites, from one settings file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpfast.cli._progress import spoken
from dpfast.cli._rounds import RoundsBar, mean, report_table
from dpfast.errors import PrivacyError

__all__ = ["federate"]


def federate(
    settings: Annotated[
        Path | None, typer.Argument(help="TOML file; see examples/federated_*.toml.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Phantoms at three sites, by several methods; no data.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            help="in_process: one site after the other; flower: Flower's simulation, on Ray."
        ),
    ] = "in_process",
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

        with RoundsBar(console) as bar:
            if settings is None:
                table = _comparison(demonstrate(output, bar.named))
            else:
                table = report_table(run(settings, bar, engine=engine))
    except (ValueError, TypeError, ImportError, OSError, PrivacyError, RuntimeError) as error:
        print(f"dpfast federate: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(table)
    if demo:
        print(output / "report.html")


def _comparison(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("method", "validation Dice", "lowest and highest site", "epsilon", "guarantee")
    for method, report in reports.items():
        results, privacy = report["results"], report["privacy"]
        sites = [mean(each["dice"]) for each in results["sites"].values() if each is not None]
        known = [each for each in sites if each is not None]
        table.add_row(
            method,
            spoken(mean(results["scores"]["dice"])),
            f"{spoken(min(known))} to {spoken(max(known))}" if known else "none",
            spoken(privacy["epsilon"]),
            privacy["guarantee"],
        )
    return table
