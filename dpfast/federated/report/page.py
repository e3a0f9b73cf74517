"""`write_report`: runs side by side on one page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpfast.federated.report import figures
from dpfast.federated.report.runs import METHODS, Group, Run, Spread, group_runs, load_run
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.run_folder import write_atomically

__all__ = ["write_report"]

_SCORES = (("dice", "Dice"), ("hausdorff95", "95 % Hausdorff distance, pixels"))
_AXES = {"dice": "Dice", "hausdorff95": "pixels"}


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Write one HTML page about finished runs: figures, tables and pictures are all in it.

    Runs whose settings differ by seeds alone are repetitions, shown as mean and spread.

    Args:
      paths: run folders of `dpfast federate`.
      output: the page, replaced if it is there.

    Raises:
      ValueError: a folder without a finished run. ImportError: matplotlib or Jinja2 is missing.
    """
    with needs_extra("dpfast report", extra="federated"):
        from jinja2 import Environment, StrictUndefined
    groups = group_runs([load_run(path) for path in paths])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["spread"] = _spoken_spread
    environment.filters["number"] = _spoken
    template = files("dpfast.federated.report").joinpath("page.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(**_content(groups))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(page.encode("utf-8")))


def _content(groups: Sequence[Group]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(run.report["task"]["name"] for g in groups for run in g.runs))
    return {
        "title": ", ".join(tasks),
        "num_runs": sum(len(group.runs) for group in groups),
        "comparison": [_line(group) for group in groups],
        "convergence": [
            (label, figures.convergence(groups, name, _AXES[name])) for name, label in _SCORES
        ],
        "groups": [_details(group) for group in groups],
        "versions": groups[0].first.report["versions"],
    }


def _line(group: Group) -> dict[str, Any]:
    """A row of the comparison table."""
    privacy = group.first.report["privacy"]
    lowest, highest = group.site_range("dice")
    return {
        "label": group.label,
        "runs": len(group.runs),
        "dice": group.score("dice"),
        "hausdorff95": group.score("hausdorff95"),
        "lowest": lowest,
        "highest": highest,
        "epsilon": _largest_epsilon(group),
        "delta": privacy["delta"],
        "unit": privacy["privacy_unit"],
        "guarantee": privacy["guarantee"] != "none",
    }


def _largest_epsilon(group: Group) -> float:
    """Of repetitions, which are all published."""
    spent = [run.report["privacy"]["epsilon"] for run in group.runs]
    return max(math.inf if isinstance(each, str) else float(each) for each in spent)


def _details(group: Group) -> dict[str, Any]:
    """A group's own part of the page."""
    run = group.first
    privacy = run.report["privacy"]
    return {
        "label": group.label,
        "method": METHODS[run.report["run"]["method"]],
        "classes": run.class_names,
        "tables": [(label, _table(group, name)) for name, label in _SCORES],
        "curves": _curves(run),
        "examples": [
            (str(site), figures.boundaries(run, number))
            for number, site in enumerate(run.examples["sites"])
        ],
        "colours": [
            (name, figures.class_colour(number)) for number, name in enumerate(run.class_names)
        ],
        "reasons": privacy["reasons"],
        "not_covered": privacy["not_covered"].rstrip("."),
        "over_sites": privacy["over_sites"],
        "misses": [(each.path.name, *miss) for each in group.runs for miss in each.misses()],
        "settings": run.text,
    }


def _table(group: Group, score: str) -> list[tuple[str, list[Spread]]]:
    """A row for each site, then all sites; a column for each class, then their mean."""
    rows: list[tuple[str, list[Spread]]] = []
    classes: list[int | None] = [*range(len(group.first.class_names)), None]
    for name, site in [*((each, each) for each in group.first.site_names), ("all sites", None)]:
        rows.append((name, [group.score(score, site=site, number=number) for number in classes]))
    return rows


def _curves(run: Run) -> list[tuple[str, str]]:
    """Figures of what the sites said over rounds, those that have something to show."""
    wanted = (("epsilon", "ε spent"), ("max_grad_norm", "clipping threshold"))
    drawn = [(label, figures.per_site(run.of_sites(name), label)) for name, label in wanted]
    return [(label, uri) for label, uri in drawn if uri]


def _spoken_spread(spread: Spread) -> str:
    if spread.count == 0:
        return "none"
    if spread.count == 1:
        return _spoken(spread.mean)
    digits = _digits(spread.mean)
    return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"


def _spoken(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    """Behind the point: scores have three, distances and epsilons two."""
    return 3 if abs(value) < 2.0 else 2
