"""How `dpfast budget` shows what it found: tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dpfast.privacy.budget import Budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "new_figure", "print_ledger", "print_run"]

_NAME = "budget"
_PARTS_OF_PLOT = 12
_FORMATS = (".png", ".svg")
_CEILING = Context(prec=4, rounding=ROUND_CEILING)
_WHOM = {
    "sample": "one sample added or removed ({}); a patient with several samples has a larger "
    "epsilon: see --privacy-unit patient",
    "patient": "one patient, with all of its samples, added or removed ({})",
}
_SAMPLERS = {
    "poisson": "poisson: each unit is in a step with chance {:.6g}",
    "shuffled_unamplified": "shuffled_unamplified: each unit is in one random step of every epoch; "
    "no amplification is counted",
}
_CONDITIONS = "if batches are drawn and noise is added as stated; {}"


def print_run(report: Mapping[str, Any]) -> None:
    """Print a `Budget.report()`."""
    console = Console(markup=False)  # a ledger holds text of others
    if "ledger" in report:
        _print_ledger(console, report["ledger"], "in the ledger")
    table = Table(show_header=False, title="dpfast budget")
    for name, value in _run_rows(report):
        is_answer = name == report["solved_for"].replace("_", " ")
        table.add_row(name, value, style="bold" if is_answer else None)
    console.print(table)
    curve = Table("of the run", "steps", f"epsilon at delta {report['delta']:g}")
    for point in report["curve"]:
        share = f"{100 * point['steps'] / report['steps']:.0f} %"
        curve.add_row(share, str(point["steps"]), epsilon_text(point["epsilon"]))
    console.print(curve)


def print_ledger(report: Mapping[str, Any]) -> None:
    """Print a `PrivacyLedger.report()` that has a delta_rule."""
    _print_ledger(Console(markup=False), report, "dpfast budget: what the ledger holds")


def epsilon_text(value: float | None) -> str:
    """Four digits, rounded up; the infinite one is None."""
    if value is None:
        return "infinite"
    return f"{_CEILING.create_decimal_from_float(value):f}"


def _run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    unit, epochs = report["privacy_unit"], report["steps"] / report["steps_per_epoch"]
    size, units = report["expected_batch_size"], report["num_units"]
    rows = [
        ("protects", _WHOM[unit].format(report["adjacency"])),
        ("epsilon", _epsilon_row(report)),
        ("delta", f"{report['delta']:g} ({report['delta_rule']})"),
        ("accountant", report["accountant"]),
        ("sampler", _SAMPLERS[report["sampling"]].format(report["sample_rate"])),
    ]
    if size is not None:
        rows.append(("expected batch size", f"{size:g} of {units} {unit}s"))
    if report["max_batch_size"] is not None:
        rows.append(("max batch size", f"{report['max_batch_size']}; units beyond it are dropped"))
    rows += [
        ("steps", f"{report['steps']} = {epochs:.4g} epochs of {report['steps_per_epoch']}"),
        ("noise multiplier", f"{report['noise_multiplier']:g}, {_mechanism(report)}"),
    ]
    rows += _threshold_rows(report["threshold"]) + _noise_rows(report)
    if report["pure_epsilon_of_a_step"] is not None:
        rows.append(
            ("pure epsilon", f"{report['pure_epsilon_of_a_step']:.4g} per release, without delta")
        )
    if report["release_noise"]:
        multipliers = ", ".join(f"{noise:g}" for noise in report["release_noise"])
        rows.append(("other releases", f"Gaussian, noise multiplier {multipliers}"))
    conditions = _CONDITIONS.format(report["arithmetic"])
    return [*rows, ("guarantee", f"{report['guarantee']}, {conditions}")]


def _epsilon_row(report: Mapping[str, Any]) -> str:
    text = epsilon_text(report["epsilon"])
    if "ledger" in report:
        text += f" with the ledger's {epsilon_text(report['ledger']['epsilon'])}"
    if report["target_epsilon"] is not None:
        text += f" (target {report['target_epsilon']:g})"
    return text


def _mechanism(report: Mapping[str, Any]) -> str:
    text = f"{report['mechanism']} noise after an {report['norm'].upper()} clip"
    if report["mechanism"] == "laplace" and report["norm"] == "l2":
        text += ", accounted by its Gaussian-DP bound"
    return text


def _threshold_rows(threshold: Mapping[str, float] | None) -> list[tuple[str, str]]:
    if threshold is None:
        return []
    name = next(iter(threshold))
    share = 100.0 * threshold["gradient_share"]
    return [
        (
            "adaptive threshold",
            f"{name.replace('_', ' ')} {threshold[name]:g}; the gradient's own noise multiplier is "
            f"{threshold['gradient_noise_multiplier']:.5g}: {share:.4g} % of the budget is the "
            f"gradient's, {100.0 - share:.4g} % the threshold's",
        )
    ]


def _noise_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    noise = report["noise"]
    if noise is None:
        return []
    scale = "std" if report["mechanism"] == "gaussian" else "b"
    bounds = noise["max_grad_norm"]
    means = noise["scale_on_mean"] or [None] * len(bounds)
    rows = []
    for k, (bound, total, mean) in enumerate(
        zip(bounds, noise["scale_on_sum"], means, strict=True), start=1
    ):
        name = f"noise of group {k}" if len(bounds) > 1 else "noise"
        text = f"{scale} {total:.5g} on the sum of gradients clipped to {bound:g}"
        rows.append((name, text if mean is None else f"{text}, {mean:.5g} on their mean"))
    if len(bounds) > 1:
        rows.append(("sensitivity", f"{noise['sensitivity']:.5g} over all groups"))
    return rows


def _print_ledger(console: Console, report: Mapping[str, Any], title: str) -> None:
    table = Table(show_header=False, title=title)
    unit = report["privacy_unit"]
    whom = _WHOM.get(unit, f"one {unit} added or removed ({{}})") if unit else "nothing yet ({})"
    table.add_row("protects", whom.format(report["adjacency"]))
    table.add_row("epsilon", epsilon_text(report["epsilon"]), style="bold")
    rule = f" ({report['delta_rule']})" if "delta_rule" in report else ""
    table.add_row("delta", f"{report['delta']:g}{rule}")
    table.add_row("accountant", report["accountant"])
    for reason in report.get("reasons", ()):
        table.add_row("no guarantee", reason)
    if "conditional_epsilon" in report:
        table.add_row(
            "conditional epsilon",
            f"{epsilon_text(report['conditional_epsilon'])}, if that had not been so",
        )
    table.add_row("ledger", report["run"])
    console.print(table)
    releases = Table("release", "sampler", "event", "steps", "counted")
    for each in report["mechanisms"]:
        description = each["description"]
        releases.add_row(
            str(description.get("release", "-")),
            str(description.get("sampling", "-")),
            event_text(each["conditional_event"] or each["event"]),
            str(each["steps"]),
            str(each["spends"]),
        )
    console.print(releases)


def event_text(event: Mapping[str, Any]) -> str:
    """An event's JSON on one line."""
    values = [
        event_text(value) if isinstance(value, Mapping) else f"{value:.6g}"
        for name, value in event.items()
        if isinstance(value, (Mapping, int, float))
    ]
    name = event["type"].removesuffix("DpEvent")
    return f"{name}({', '.join(values)})" if values else name


def new_figure(path: Path) -> Figure:
    """An empty figure for that file.

    Raises:
      ValueError: not a file of a known kind in an existing folder. RuntimeError: no matplotlib.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{_NAME}: plot must be a {' or '.join(_FORMATS)} file, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{_NAME}: plot must be in an existing folder, got {path}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f'{_NAME}: plot needs matplotlib: pip install "dpfast[plot]"') from error
    return Figure(figsize=(6.4, 4.4), layout="constrained")


def draw(figure: Figure, found: Budget, path: Path) -> None:
    """Draw epsilon over the steps and save it.

    Raises:
      ValueError: there is nothing to draw, epsilon is infinite.
    """
    if math.isinf(found.epsilon_after(0)):
        raise ValueError(f"{_NAME}: plot must be left out where epsilon is infinite, got {path}")
    total = found.run.num_steps
    # Closer together where the curve is steep: it grows about as the square root.
    shares = ((part / _PARTS_OF_PLOT) ** 2 for part in range(_PARTS_OF_PLOT + 1))
    counts = list(dict.fromkeys(math.ceil(total * share) for share in shares))
    axes = figure.subplots()
    axes.plot(counts, [found.epsilon_after(steps) for steps in counts], marker="o")
    if found.target_epsilon is not None:
        axes.axhline(found.target_epsilon, linestyle="--", color="gray")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("private steps")
    axes.set_ylabel(f"epsilon at delta {found.delta:g}")
    axes.set_title(
        f"one {found.run.privacy_unit} added or removed, {found.run.sampling} sampling, "
        f"{found.accountant.upper()}",
        fontsize="medium",
    )
    figure.savefig(path)
