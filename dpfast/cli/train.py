"""`dpfast train`: private training of a segmentation model from one settings file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpfast.cli._progress import RunBar, spoken
from dpfast.errors import PrivacyError

__all__ = ["train"]


def train(
    settings: Annotated[Path, typer.Argument(help="TOML file; see examples/*.toml.")],
) -> None:
    """Train a segmentation model with differential privacy, as SETTINGS says.

    Started again with the same settings, an interrupted run goes on where it was.
    """
    console = Console()
    try:
        # Here, since the packages of the extra may be missing.
        from dpfast.segmentation import training

        with _Bar(console) as bar:
            report = training.train(settings, bar)
    except (ValueError, TypeError, ImportError, OSError, PrivacyError) as error:
        print(f"dpfast train: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(_table(report))


class _Bar(RunBar):
    """Shows a run: a progress bar, and a line for each epoch."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "step")

    def started(self, data: Mapping[str, Any], steps: int, total_steps: int) -> None:
        """See training.Observer."""
        self.say(
            f"{data['name']}: {data['training_units']} {data['unit']}s for training and "
            f"{data['validation_units']} for validation, {data['classes']} classes"
        )
        if steps:
            self.say(f"going on after step {steps}")
        self.begin(steps, total_steps)

    def stepped(self, steps: int) -> None:
        """See training.Observer."""
        self.advance(steps)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """See training.Observer."""
        self.say(
            f"epoch {metrics['epoch']}: epsilon {spoken(metrics['epsilon'])}, "
            f"validation Dice {metrics['validation_dice']:.3f}"
        )


def _table(report: Mapping[str, Any]) -> Table:
    privacy, results = report["privacy"], report["results"]
    lines = {
        "validation Dice": f"{results['validation_dice']:.3f}",
        "epsilon": spoken(privacy["epsilon"]),
        **{name: spoken(privacy[name]) for name in ("delta", "privacy_unit") if name in privacy},
        "guarantee": privacy["guarantee"],
        **({"because": "; ".join(privacy["reasons"])} if "reasons" in privacy else {}),
        "not covered": privacy["not_covered"],
    }
    table = Table(show_header=False)
    for name, value in lines.items():
        table.add_row(name.replace("_", " "), value)
    return table
