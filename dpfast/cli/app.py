"""The command `dpfast`."""

from __future__ import annotations

import typer

from dpfast.cli.budget import budget
from dpfast.cli.deploy import certificates, server, site
from dpfast.cli.doctor import doctor
from dpfast.cli.federate import federate
from dpfast.cli.predict import predict
from dpfast.cli.report import report
from dpfast.cli.train import train

__all__ = ["main"]

app = typer.Typer(
    help="Fast per-sample differential privacy for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(budget)
app.command()(certificates)
app.command()(doctor)
app.command()(federate)
app.command()(predict)
app.command()(report)
app.command()(server)
app.command()(site)
app.command()(train)


def main() -> None:
    """Entry point of the console script."""
    app()
