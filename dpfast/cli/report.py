"""`dpfast report`: one page about finished federated runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option(help="The page, replaced if it is there.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page: curves, scores by site and class, epsilon, boundaries.

    Runs that differ by seeds alone are shown as mean and spread. The pictures are of validation
    images: whoever gets the page sees them.
    """
    try:
        # Here, since the packages of the extra may be missing.
        from dpfast.federated.report import write_report

        write_report(runs, output)
    except (ValueError, ImportError, OSError) as error:
        print(f"dpfast report: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(output)
