"""What people see of a federated run: a bar over its rounds, a line for each, and the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dpfast.cli._progress import RunBar, spoken

__all__ = ["RoundsBar", "mean", "report_table"]


class RoundsBar(RunBar):
    """Shows a run: which site has answered, a progress bar over rounds, and a line for each."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "round")

    def named(self, method: str) -> RoundsBar:
        """The same for one of several runs."""
        self.say(f"[{method}]")
        return self

    def started(self, sites: Iterable[str], rounds_done: int, rounds: int) -> None:
        """See rounds.Observer."""
        self.say(f"sites: {', '.join(sites)}")
        if rounds_done:
            self.say(f"going on after round {rounds_done}")
        self.begin(rounds_done, rounds)

    def heard(self, round_number: int, site: str, status: str) -> None:
        """See rounds.Observer."""
        self.describe(f"round {round_number}: {site} {status}")

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """See rounds.Observer."""
        parts = [f"round {line['round']}: epsilon {spoken(line['epsilon'])}"]
        if line["scores"] is not None:
            parts.append(f"validation Dice {_dice(line['scores'])}")
            known = {name: each["scores"] for name, each in line["sites"].items() if each["scores"]}
            parts.append(", ".join(f"{name} {_dice(each)}" for name, each in known.items()))
        self.say("; ".join(parts))
        for name, site in line["sites"].items():
            if site["status"] != "trained" and site["reason"]:
                self.say(f"  {name}: {site['status']}, {site['reason']}")
        self.advance(line["round"])


def _dice(scores: Mapping[str, Any]) -> str:
    found = mean(scores["dice"])
    return "unknown" if found is None else f"{found:.3f}"


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
