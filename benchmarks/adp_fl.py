"""What federated privacy costs in Dice: real data, methods side by side, several epsilons, seeds.

    python -m benchmarks adp_fl --data DIR          # DIR/dsb2018_nuclei, DIR/msd_hippocampus
    python -m benchmarks adp_fl --report            # docs/adp_fl.md from the saved results

Each run is `dpfast federate` with the settings of `examples/federated_*.toml`, another method,
target and other initial weights. Noise and sampling come from the operating system, so that two
runs of one seed differ too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _adp_fl_report
from benchmarks._adp_fl_report import EPSILONS, FIXED
from benchmarks._record import RESULTS, ROOT, device_slug, environment, write_json
from benchmarks.utility import set_value

TASKS = {"nuclei": "dsb2018_nuclei", "hippocampus": "msd_hippocampus"}
SEEDS = (0, 1, 2)
_EVALUATE_EVERY = 5

Key = tuple[str, float | None, int]


class _Silent:
    """An observer of a run that says nothing."""

    def started(self, sites: Iterable[str], rounds_done: int, rounds: int) -> None:
        return

    def heard(self, round_number: int, site: str, status: str) -> None:
        return

    def finished_round(self, line: Mapping[str, Any]) -> None:
        return


def settings_text(
    task: str,
    data: Path,
    method: str,
    epsilon: float | None,
    seed: int,
    folder: Path,
    rounds: int | None,
) -> str:
    """The example's settings with a method, a target, other initial weights and another folder."""
    text = (ROOT / "examples" / f"federated_{task}.toml").read_text()
    text = set_value(text, "path", json.dumps(str(data / TASKS[task])))
    text = set_value(text, "folder", json.dumps(str(folder)))
    text = text.replace("[model]\n", f"[model]\nweights_seed = {seed}\n")
    text = text.replace("[federation]\n", f"[federation]\nevaluate_every = {_EVALUATE_EVERY}\n")
    if rounds is not None:
        text = set_value(text, "rounds", str(rounds))
    start, end = text.index("[privacy]"), text.index("[output]")
    privacy = text[start:end]
    if method == "non_private":
        batch = next(line for line in privacy.splitlines() if line.startswith("expected_batch"))
        privacy = f"[privacy]\nprivate = false\n{batch}\n\n"
    else:
        privacy = set_value(privacy, "target_epsilon", str(epsilon))
        if method in FIXED:
            privacy = set_value(privacy, "max_grad_norm", str(FIXED[method]))
            privacy = set_value(privacy, "threshold", '{ kind = "fixed" }')
    return text[:start] + privacy + text[end:]


def one_run(task: str, data: Path, key: Key, work: Path, rounds: int | None) -> dict[str, Any]:
    """Train; return scores of every site and what was spent."""
    from dpfast.federated.training import federate

    method, epsilon, seed = key
    name = f"{task}-{method}-{epsilon or 'inf'}-{seed}"
    file, folder = work / f"{name}.toml", work / name
    file.write_text(settings_text(task, data, method, epsilon, seed, folder, rounds))
    report = federate(file, _Silent())
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    result = {
        "task": task,
        "method": method,
        "target_epsilon": epsilon,
        "seed": seed,
        "rounds": report["run"]["rounds"],
        "unit": report["privacy"]["privacy_unit"],
        "epsilon": report["privacy"]["epsilon"],
        "delta": report["privacy"]["delta"],
        "class_names": report["task"]["class_names"],
        "training_units": {name: each["training_units"] for name, each in report["sites"].items()},
        "sites": report["results"]["sites"],
        "scores": report["results"]["scores"],
        "curve": [
            [line["round"], line["scores"]["dice"]] for line in lines if line["scores"] is not None
        ],
        "thresholds": {
            site: [line["sites"][site]["max_grad_norm"] for line in lines]
            for site in report["sites"]
        },
        "seconds": sum(line["seconds"] for line in lines),
    }
    print(f"{name}: Dice {_adp_fl_report.dice(result):.3f}, {result['seconds']:.0f} s", flush=True)
    return result


def planned_runs() -> list[Key]:
    """Every run of a task; the comparison that the paper makes comes first."""
    found: list[Key] = [("non_private", None, seed) for seed in SEEDS]
    for methods in (("adp_fl", "dp_fl_1"), ("dp_fl_small",)):
        found += [(m, e, s) for s, e, m in itertools.product(SEEDS, EPSILONS, methods)]
    return found


def _saved_runs(file: Path) -> dict[Key, dict[str, Any]]:
    """Earlier runs by what they were, each with the commit that it was made with."""
    if not file.exists():
        return {}
    saved = json.loads(file.read_text())
    return {
        (run["method"], run["target_epsilon"], run["seed"]): {"commit": saved["commit"], **run}
        for run in saved["runs"]
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks adp_fl", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, help="other than the settings say")
    parser.add_argument("--report", action="store_true", help="write docs/adp_fl.md alone")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data must be given")
        device = torch.device("cpu")
        about = environment(device, None)
        folder = RESULTS / device_slug(device)
        for task in arguments.task or TASKS:
            file = folder / f"adp_fl-{task}.json"
            runs = _saved_runs(file)
            with tempfile.TemporaryDirectory() as work:
                for key in [each for each in planned_runs() if each not in runs]:
                    run = one_run(task, arguments.data, key, Path(work), arguments.rounds)
                    runs[key] = {**run, "commit": about["commit"]}
                    write_json(file, {**about, "runs": list(runs.values())})
    saved = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/adp_fl-*.json"))]
    (ROOT / "docs" / "adp_fl.md").write_text(_adp_fl_report.render(saved))
    return 0
