"""What DP-Morph does to overlap and boundaries: real data, clipping rules, epsilons, seeds.

    python -m benchmarks dp_morph --data DIR      # DIR/msd_hippocampus, DIR/covid_cxr_multiclass
    python -m benchmarks dp_morph --report        # docs/dp_morph.md from the saved results
    python -m benchmarks dp_morph --data DIR --figure     # docs/figures/dp_morph.png

Data, network, optimizer, batch size and unit are those of `examples/`; noise and sampling come from
the operating system. Results are saved after each run, and runs that are there already are not made
again, so that it may be stopped at any time. Seeds follow one another, so that what is there is
balanced.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._dp_morph_report import render
from benchmarks._dp_morph_run import Choice, Experiment
from benchmarks._record import RESULTS, ROOT, device_slug, environment, write_json

# Settings, data set, epochs, threshold: about the median norm in the first epochs, without which
# the flat rule would add noise for gradients that there are not.
TASKS = {
    "hippocampus": ("hippocampus.toml", "msd_hippocampus", 20, 0.3),
    "covid": ("covid_chest_x_rays.toml", "covid_cxr_multiclass", 40, 1.0),
}
VARIANTS = ("none", "fixed", "adaptive")
RULES = ("flat", "automatic", "normalized", "psac")
EPSILONS = (3.0, 8.0)
SEEDS = (0, 1, 2, 3, 4)


def _experiment(task: str, data: Path) -> Experiment:
    settings, folder, epochs, max_grad_norm = TASKS[task]
    return Experiment(ROOT / "examples" / settings, data / folder, epochs, max_grad_norm)


def _key(run: Mapping[str, Any]) -> Choice:
    return Choice(run["variant"], run["rule"], run["epsilon"], run["seed"])


def _saved(file: Path) -> dict[Choice, dict[str, Any]]:
    """Earlier runs, each with the commit that it was made with."""
    if not file.exists():
        return {}
    saved = json.loads(file.read_text())
    return {_key(run): {"commit": saved["commit"], **run} for run in saved["runs"]}


def _measure(task: str, arguments: argparse.Namespace) -> None:
    about = environment(torch.device("cpu"), None)
    file = RESULTS / device_slug(torch.device("cpu")) / f"dp_morph-{task}.json"
    runs = _saved(file)
    experiment = _experiment(task, arguments.data)
    for seed, epsilon, rule, variant in itertools.product(SEEDS, EPSILONS, RULES, VARIANTS):
        choice = Choice(variant, rule, epsilon, seed)
        wanted = all(
            getattr(arguments, name) in (None, getattr(choice, name))
            for name in ("variant", "rule", "epsilon", "seed")
        )
        if not wanted or choice in runs:
            continue
        record = experiment.run(choice).record
        runs[choice] = {**record, "commit": about["commit"]}
        write_json(file, {**about, "task": task, "runs": list(runs.values())})
        dice = ", ".join("-" if d is None else f"{d:.3f}" for d in record["scores"]["dice"])
        print(f"{task} {variant} {rule} {epsilon:g} {seed}: Dice {dice}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dp_morph", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="default: all")
    parser.add_argument("--variant", choices=VARIANTS, help="this one alone")
    parser.add_argument("--rule", choices=RULES, help="this clipping rule alone")
    parser.add_argument("--epsilon", type=float, choices=EPSILONS, help="this target alone")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="this seed alone")
    parser.add_argument("--figure", action="store_true", help="draw docs/figures/dp_morph.png")
    parser.add_argument("--report", action="store_true", help="write docs/dp_morph.md alone")
    arguments = parser.parse_args(argv)
    if arguments.data is None and not arguments.report:
        parser.error("--data must be given")
    figure = ROOT / "docs" / "figures" / "dp_morph.png"
    if arguments.figure:
        from benchmarks._dp_morph_figure import draw

        experiments = {task: _experiment(task, arguments.data) for task in TASKS}
        draw(experiments, figure)
        return 0
    if not arguments.report:
        for task in arguments.task or TASKS:
            _measure(task, arguments)
    saved = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/dp_morph-*.json"))]
    (ROOT / "docs" / "dp_morph.md").write_text(render(saved, figure=figure.exists()))
    return 0
