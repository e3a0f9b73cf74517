"""Finished runs as the report needs them: read, and those that only differ by chance together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfast.federated.settings import FederatedSettings, load_federated_settings

__all__ = ["METHODS", "Group", "Run", "Spread", "group_runs", "load_run"]

METHODS = {
    "non_private": "non-private",
    "dp_fl": "DP-FL, fixed threshold",
    "adp_fl": "ADP-FL, private threshold",
    "adp_fl_paper": "ADP-FL as published",
    "dp_fedavg": "DP-FedAvg, whole sites",
}
# Runs that differ by these alone are repetitions.
_CHANCE = (("model", "weights_seed"), ("federation", "seed"), ("sites", "seed"), ("data", "seed"))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over repetitions; NaN where there is nothing."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Of values that are known."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            return cls(math.nan, math.nan, 0)
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
        return cls(float(np.mean(known)), deviation, len(known))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      path: its folder.
      settings: as given.
      text: of its settings file.
      report: report.json.
      rounds: the lines of rounds.jsonl.
      examples: arrays "sites", and "image_N", "truth_N", "prediction_N" for each of them.
    """

    path: Path
    settings: FederatedSettings
    text: str
    report: dict[str, Any]
    rounds: list[dict[str, Any]]
    examples: dict[str, NDArray[Any]]

    @property
    def site_names(self) -> list[str]:
        """Of all sites."""
        return list(self.report["sites"])

    @property
    def class_names(self) -> list[str]:
        """Of the foreground."""
        return list(self.report["task"]["class_names"])

    def score(self, name: str, *, site: str | None = None, number: int | None = None) -> float:
        """A final score; the mean over classes, or of class `number` from 0; NaN: nothing known."""
        results = self.report["results"]
        scores = results["scores"] if site is None else results["sites"].get(site)
        return _mean(scores, name, number)

    def curve(self, name: str) -> dict[int, float]:
        """A score, the mean over classes and sites, by round."""
        return {line["round"]: _mean(line["scores"], name, None) for line in self.rounds}

    def of_sites(self, name: str) -> dict[str, dict[int, float]]:
        """What the sites said in each round: "epsilon" or "max_grad_norm"; by site and round."""
        found: dict[str, dict[int, float]] = {site: {} for site in self.site_names}
        for line in self.rounds:
            for site, said in line["sites"].items():
                value = said.get(name)
                if isinstance(value, (int, float)):
                    found[site][line["round"]] = float(value)
        return found

    def misses(self) -> list[tuple[int, str, str, str]]:
        """Round, site, status and reason wherever a site's update was not used."""
        return [
            (line["round"], site, said["status"], said["reason"] or "")
            for line in self.rounds
            for site, said in line["sites"].items()
            if said["status"] not in ("trained", "not asked")
        ]


@dataclass(frozen=True)
class Group:
    """Repetitions: runs whose settings are the same but for seeds and folders.

    Attributes:
      label: what sets it apart from the page's other groups.
      runs: at least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """One that stands for all in what they share."""
        return self.runs[0]

    def score(self, name: str, *, site: str | None = None, number: int | None = None) -> Spread:
        """A final score over repetitions; see `Run.score`."""
        return Spread.of(run.score(name, site=site, number=number) for run in self.runs)

    def site_range(self, name: str) -> tuple[Spread, Spread]:
        """Its lowest and its highest site, over repetitions."""
        lowest, highest = [], []
        for run in self.runs:
            values = [run.score(name, site=site) for site in run.site_names]
            known = [value for value in values if not math.isnan(value)]
            if known:
                lowest.append(min(known))
                highest.append(max(known))
        return Spread.of(lowest), Spread.of(highest)


def load_run(path: Path) -> Run:
    """Read the folder of a finished federated run.

    Raises:
      ValueError: a file is missing or is not what it should be.
    """
    names = ("settings.toml", "report.json", "rounds.jsonl", "examples.npz")
    for name in names:
        if not (path / name).is_file():
            raise ValueError(
                f"load_run: {path} must be the folder of a finished federated run, got no {name}"
            )
    settings, report, rounds, examples = (path / name for name in names)
    try:
        with np.load(examples, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files}
        lines = rounds.read_text(encoding="utf-8").splitlines()
        return Run(
            path,
            load_federated_settings(settings),
            settings.read_text(encoding="utf-8"),
            json.loads(report.read_text(encoding="utf-8")),
            [json.loads(line) for line in lines],
            held,
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"load_run: {path} must hold a readable run, got {error}") from error


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put repetitions together, in the order of their first ones.

    Raises:
      ValueError: no run, or a folder given twice.
    """
    if not runs:
        raise ValueError("group_runs: runs must hold a run, got none")
    places = [run.path.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise ValueError("group_runs: runs must be different folders, got one twice")
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(_key(run.settings), []).append(run)
    parts = [_parts(each[0]) for each in together.values()]
    shared = {name for name in parts[0] if len({part[name] for part in parts}) == 1}
    labels: list[str] = []
    for part in parts:
        shown = [value for name, value in part.items() if name == "method" or name not in shared]
        label = ", ".join(value for value in shown if value)
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return [
        Group(label, tuple(each)) for label, each in zip(labels, together.values(), strict=True)
    ]


def _key(settings: FederatedSettings) -> str:
    tables = settings.model_dump(mode="json", exclude={"output"})
    for table, name in _CHANCE:
        tables[table].pop(name, None)
    return json.dumps(tables, sort_keys=True)


def _parts(run: Run) -> dict[str, str]:
    settings, about = run.settings, run.report["run"]
    privacy = settings.privacy
    target = privacy.target_epsilon
    noise = privacy.noise_multiplier
    return {
        "task": run.report["task"]["name"],
        "method": METHODS[about["method"]],
        "epsilon": f"ε = {target:g}" if target else f"noise {noise:g}" if noise else "",
        "clipping": about["clipping"] or "",
        "morphology": "" if about["morphology"] == "none" else f"{about['morphology']} DP-Morph",
        "strategy": about["strategy"],
        "rounds": f"{about['rounds']} rounds",
        "sites": f"{len(run.site_names)} sites",
    }


def _mean(scores: dict[str, list[float | None]] | None, name: str, number: int | None) -> float:
    if scores is None:
        return math.nan
    values = scores[name] if number is None else [scores[name][number]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
