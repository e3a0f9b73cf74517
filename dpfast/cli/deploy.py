"""`dpfast server`, `dpfast site` and `dpfast certificates`: a federation over the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpfast.cli._rounds import RoundsBar, report_table
from dpfast.errors import PrivacyError

__all__ = ["certificates", "server", "site"]

_ERRORS = (ValueError, TypeError, ImportError, OSError, PrivacyError, RuntimeError)


def server(
    settings: Annotated[Path, typer.Argument(help="TOML file, as of `dpfast federate`.")],
    certificates: Annotated[Path, typer.Option(help="Folder of the server's; see certificates.")],
    host: Annotated[str, typer.Option(help="To listen at; 0.0.0.0: everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 18000,
    join: Annotated[float, typer.Option(help="Seconds that sites are waited for.")] = 600.0,
    reply: Annotated[float, typer.Option(help="Seconds that a reply is waited for.")] = 3600.0,
) -> None:
    """Train one model with sites on other machines.

    Started again with the same settings, an interrupted run goes on where it was.
    """
    console = Console()
    try:
        from dpfast.federated.deployment import serve

        with RoundsBar(console) as bar:
            report = serve(
                settings,
                bar,
                certificates=certificates,
                host=host,
                port=port,
                seconds_to_join=join,
                reply_seconds=reply,
            )
    except _ERRORS as error:
        print(f"dpfast server: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(report_table(report))


def site(
    settings: Annotated[Path, typer.Argument(help="TOML file of this site's own.")],
    name: Annotated[str, typer.Option(help="Of this site, as the server knows it.")],
    certificates: Annotated[Path, typer.Option(help="Folder of this site's; see certificates.")],
    server: Annotated[str, typer.Option(help="HOST:PORT.")],
    folder: Annotated[Path, typer.Option(help="Kept: the ledger of what was given away.")],
    join: Annotated[float, typer.Option(help="Seconds that a server is waited for.")] = 600.0,
) -> None:
    """Take part in a run with this site's data, until stopped with Ctrl-C.

    Nothing that the server sends is run, and no setting of the server's is listened to: data,
    privacy and budget are those of this site's own file.
    """
    try:
        from dpfast.federated.deployment import take_part

        take_part(
            settings,
            name,
            _say,
            certificates=certificates,
            server=server,
            folder=folder,
            seconds_to_join=join,
        )
    except KeyboardInterrupt:
        print(f"{name}: stopped")
    except _ERRORS as error:
        print(f"dpfast site: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _say(line: str) -> None:
    print(line, flush=True)


def certificates(
    folder: Annotated[Path, typer.Argument(help="New or empty.")],
    site: Annotated[list[str], typer.Option(help="A site's name; once for each.")],
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address of the server; once for each.")
    ] = None,
) -> None:
    """Make the certificates and keys of a trial: FOLDER/server and a folder for each site."""
    try:
        from dpfast.federated.certificates import make_certificates

        make_certificates(folder, site, host or ["localhost", "127.0.0.1"])
    except _ERRORS as error:
        print(f"dpfast certificates: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(folder)
