"""`dpfast budget`: epsilon of a private run, the setting that a target leaves open, a ledger."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dpfast.cli import _budget_view as view
from dpfast.privacy import PrivacyLedger
from dpfast.privacy.budget import Budget, PlannedRun, choose_delta, known_units, solve

__all__ = ["budget"]

# What says how to look at a ledger; any other option asks about a run.
_OF_A_LEDGER = ("ledger", "delta", "accountant", "num_units", "as_json")
_RUN, _BESIDE, _OUT = "The run", "Noise and releases in detail", "Ledger and output"


def budget(
    context: typer.Context,
    target_epsilon: Annotated[
        float | None,
        typer.Option(help="Find the noise, duration or batch size that keeps within it."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Below 1 / num-units. Default: 1 / (10 num-units).")
    ] = None,
    num_units: Annotated[
        int | None,
        typer.Option(help="Samples or patients in the data set.", rich_help_panel=_RUN),
    ] = None,
    expected_batch_size: Annotated[
        int | None,
        typer.Option(help="Mean number of units in a step.", rich_help_panel=_RUN),
    ] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(help="In its place: a unit's chance to be in a step.", rich_help_panel=_RUN),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data set.", rich_help_panel=_RUN)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="In their place: private steps.", rich_help_panel=_RUN)
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Noise of a step over its sensitivity.", rich_help_panel=_RUN),
    ] = None,
    privacy_unit: Annotated[
        str | None,
        typer.Option(
            help="sample (default) or patient: what num-units counts.", rich_help_panel=_RUN
        ),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(help="poisson or shuffled_unamplified.", rich_help_panel=_RUN),
    ] = "poisson",
    max_batch_size: Annotated[
        int | None,
        typer.Option(help="Drop units beyond this many from a step.", rich_help_panel=_RUN),
    ] = None,
    mechanism: Annotated[
        str, typer.Option(help="gaussian or laplace.", rich_help_panel=_RUN)
    ] = "gaussian",
    norm: Annotated[
        str | None,
        typer.Option(
            help="Norm that is clipped, l1 or l2. Default: l1 for laplace, else l2.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    accountant: Annotated[str, typer.Option(help="pld or rdp.", rich_help_panel=_RUN)] = "pld",
    count_noise: Annotated[
        float | None,
        typer.Option(
            help="Private quantile threshold: std of its count's noise.", rich_help_panel=_BESIDE
        ),
    ] = None,
    histogram_noise: Annotated[
        float | None,
        typer.Option(
            help="Noisy histogram threshold: std of each bin's noise.", rich_help_panel=_BESIDE
        ),
    ] = None,
    max_grad_norm: Annotated[
        str | None,
        typer.Option(
            help="Show the noise in gradient units: C, or C1,C2,... for group-wise clipping.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    group_noise_weights: Annotated[
        str,
        typer.Option(
            help="equal, proportional, or G1,G2,... for as many bounds.", rich_help_panel=_BESIDE
        ),
    ] = "equal",
    release_noise: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise multiplier of another Gaussian release, such as morphology statistics; "
            "may be repeated.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    dimension: Annotated[
        int | None,
        typer.Option(
            help="Trained parameters, for laplace after an l2 clip.", rich_help_panel=_BESIDE
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="Show what was spent, alone or with a further run; the file is only read.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw epsilon over the steps: FILE.png or FILE.svg.", rich_help_panel=_OUT
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUT)
    ] = False,
) -> None:
    """What a private run costs, or the setting that a target epsilon leaves open.

    Give noise, duration and batch size for their epsilon; two of the three and --target-epsilon
    for the third. --ledger alone shows what was spent so far.
    """
    # The RDP accountant logs each order that it leaves out of its bound, hundreds of lines.
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = dict(context.params)
    try:
        figure = view.new_figure(plot) if plot is not None else None
        before = None if ledger is None else PrivacyLedger.read(ledger)
        if before is not None and _given(context) <= set(_OF_A_LEDGER):
            _show_ledger(before, options)
            return
        with Console(stderr=True).status("accounting"):
            found = _solve(options, before)
            report = found.report()
            if plot is not None and figure is not None:
                view.draw(figure, found, plot)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        _fail(str(error).removeprefix("budget: "), error)
    except MemoryError as error:
        _fail(
            "out of memory: epsilon is too large to be computed; more noise or fewer steps", error
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        view.print_run(report)


def _fail(message: str, error: BaseException) -> NoReturn:
    typer.echo(f"dpfast budget: {message}", err=True)
    raise typer.Exit(code=2) from error


def _given(context: typer.Context) -> set[str]:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _show_ledger(ledger: PrivacyLedger, options: dict[str, Any]) -> None:
    delta, rule = choose_delta(options["delta"], options["num_units"], ledger)
    report = {**ledger.report(delta, accountant=options["accountant"]), "delta_rule": rule}
    if options["as_json"]:
        typer.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        view.print_ledger(report)


def _solve(options: dict[str, Any], ledger: PrivacyLedger | None) -> Budget:
    weights, units = options["group_noise_weights"], options["num_units"]
    unit = None if ledger is None else ledger.privacy_unit
    run = PlannedRun(
        **{
            name: options[name]
            for name in (
                "noise_multiplier", "steps", "epochs", "expected_batch_size", "sample_rate",
                "mechanism", "norm", "sampling", "max_batch_size", "count_noise",
                "histogram_noise", "dimension",
            )
        },
        num_units=known_units(ledger) if units is None else units,
        privacy_unit=options["privacy_unit"] or unit or "sample",
        release_noise=options["release_noise"] or (),
        max_grad_norm=_numbers("max_grad_norm", options["max_grad_norm"]),
        group_noise_weights=(
            weights if weights.isalpha() else _numbers("group_noise_weights", weights)
        ),
    )  # fmt: skip
    return solve(
        run,
        target_epsilon=options["target_epsilon"],
        delta=options["delta"],
        accountant=options["accountant"],
        ledger=ledger,
    )


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}") from None
