"""What privacy costs in Dice: real data, several epsilons and seeds, the ledger of each run.

    python -m benchmarks utility --data DIR          # DIR/dsb2018_nuclei, DIR/msd_hippocampus
    python -m benchmarks utility --report            # docs/utility.md from the saved results

Each run is `dpfast train` with the settings of `examples/`, another target and other initial
weights. Its noise and its sampling come from the operating system, so that two runs of one seed
differ too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import RESULTS, ROOT, device_slug, environment, write_json

TASKS = {"nuclei": "dsb2018_nuclei", "hippocampus": "msd_hippocampus"}
EPSILONS = (1.0, 3.0, 8.0, None)  # None: no privacy
SEEDS = (0, 1, 2)


class _Silent:
    """An observer of a run that prints a line when it ends an epoch by tens."""

    def started(self, data: Mapping[str, Any], steps: int, total_steps: int) -> None:
        self._total = total_steps

    def stepped(self, steps: int) -> None:
        return

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        if metrics["epoch"] % 20 == 0:
            print(f"  step {metrics['step']}/{self._total}: {metrics['validation_dice']:.3f}")


def settings_text(
    task: str, data: Path, epsilon: float | None, seed: int, folder: Path, epochs: int | None
) -> str:
    """The example's settings with another target, other initial weights and another folder."""
    text = (ROOT / "examples" / f"{task}.toml").read_text()
    text = set_value(text, "path", json.dumps(str(data / TASKS[task])))
    text = set_value(text, "folder", json.dumps(str(folder)))
    text = text.replace("[model]\n", f"[model]\nweights_seed = {seed}\n")
    if epochs is not None:
        text = set_value(text, "epochs", str(epochs))
    if epsilon is not None:
        return set_value(text, "target_epsilon", str(epsilon))
    kept = [
        line
        for line in text[text.index("[privacy]") : text.index("[output]")].splitlines()
        if line.startswith(("expected_batch_size", "physical_batch_size"))
    ]
    table = "\n".join(["[privacy]", "private = false", *kept, "", ""])
    return text[: text.index("[privacy]")] + table + text[text.index("[output]") :]


def set_value(text: str, name: str, value: str) -> str:
    """Settings with another value of one name."""
    changed, count = re.subn(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value}", text)
    if count != 1:
        raise ValueError(f"utility: the settings must have one {name}, got {count}")
    return changed


def one_run(
    task: str, data: Path, epsilon: float | None, seed: int, work: Path, epochs: int | None
) -> dict[str, Any]:
    """Train; return Dice and what the ledger says."""
    from dpfast.privacy.ledger import PrivacyLedger
    from dpfast.segmentation.settings import load_settings
    from dpfast.segmentation.training import train

    name = f"{task}-{epsilon or 'inf'}-{seed}"
    file, folder = work / f"{name}.toml", work / name
    file.write_text(settings_text(task, data, epsilon, seed, folder, epochs))
    print(name, flush=True)
    report = train(file, _Silent())
    result = {
        "task": task,
        "target_epsilon": epsilon,
        "seed": seed,
        "validation_dice": report["results"]["validation_dice"],
        "steps": report["results"]["steps"],
        "epochs": load_settings(file).training.epochs,
        "unit": report["data"]["unit"],
        "training_units": report["data"]["training_units"],
        "validation_units": report["data"]["validation_units"],
        "ledger": None,
    }
    if epsilon is not None:
        ledger = PrivacyLedger.read(folder / "ledger.jsonl")
        plan = ledger.plans[0]
        spent = ledger.report(plan["target_delta"])
        (mechanism,) = spent.pop("mechanisms")
        result["ledger"] = {
            **spent,
            "lines": sum(1 for _ in (folder / "ledger.jsonl").open()),
            "releases": mechanism["steps"],
            "noise_multiplier": plan["noise_multiplier"],
            "sample_rate": mechanism["description"]["sample_rate"],
            "num_units": mechanism["description"]["num_units"],
        }
    print(f"  Dice {result['validation_dice']:.3f}", flush=True)
    return result


def _saved_runs(file: Path) -> dict[tuple[float | None, int], dict[str, Any]]:
    """Earlier runs by target and seed, each with the commit that it was made with."""
    if not file.exists():
        return {}
    saved = json.loads(file.read_text())
    return {
        (run["target_epsilon"], run["seed"]): {"commit": saved["commit"], **run}
        for run in saved["runs"]
    }


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """docs/utility.md."""
    lines = [_PREAMBLE]
    for result in results:
        commits = sorted({_commit(run["commit"]) for run in result["runs"]})
        versions = result["versions"]
        lines.append(
            f"{result['machine']['device']}; {result['date'][:10]}; commit "
            f"{' and '.join(commits)}; PyTorch {versions['torch']}, MONAI {versions['monai']}.\n"
        )
        for task in TASKS:
            lines += _table([run for run in result["runs"] if run["task"] == task], task)
    return "\n".join(lines)


def _commit(commit: Mapping[str, Any]) -> str:
    return f"{(commit['hash'] or '?')[:12]}{', with local changes' if commit['dirty'] else ''}"


def _table(runs: Sequence[Mapping[str, Any]], task: str) -> list[str]:
    if not runs:
        return []
    first = next((run for run in runs if run["ledger"]), runs[0])
    lines = [
        f"## {task}: {first['training_units']} units for training, {first['validation_units']} for "
        f"validation; the unit is one {first['unit']}; {first['epochs']} epochs\n",
        "| ε (target) | Dice, mean of seeds | lowest to highest | ε by the ledger | δ | releases | "
        "noise multiplier | sample rate |",
        "|" + " --- |" * 8,
    ]
    for epsilon in EPSILONS:
        chosen = [run for run in runs if run["target_epsilon"] == epsilon]
        if not chosen:
            continue
        dice = [run["validation_dice"] for run in chosen]
        ledgers = [run["ledger"] for run in chosen if run["ledger"]]
        cells = ["∞" if epsilon is None else f"{epsilon:g}", f"{statistics.mean(dice):.3f}"]
        cells.append(f"{min(dice):.3f} to {max(dice):.3f} ({len(dice)} seeds)")
        if ledgers:
            spent = ", ".join(f"{each['epsilon']:.4f}" for each in ledgers)
            same = ledgers[0]
            cells += [
                spent,
                f"{same['delta']:g}",
                ", ".join(str(each["releases"]) for each in ledgers),
                f"{same['noise_multiplier']:.4f}",
                f"{same['sample_rate']:.4f}",
            ]
        else:
            cells += ["∞: not private", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


_PREAMBLE = """\
# Dice at several epsilons

Generated by `python -m benchmarks utility` from `benchmarks/results/`. Do not edit.

Mean foreground Dice on held-out patients of a small U-Net (`examples/nuclei.toml`,
`examples/hippocampus.toml`), three sets of initial weights, one run each. Epsilon is about adding
or removing one unit; it covers the training records, not the validation ones, and each run by
itself. The settings were not tuned for these data. ∞ is the same network and optimizer without
clipping, noise or ledger, in shuffled batches.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks utility", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="default: all")
    parser.add_argument("--epochs", type=int, help="other than the settings say")
    parser.add_argument("--epsilon", type=float, help="this target alone; inf: not private")
    parser.add_argument("--report", action="store_true", help="write docs/utility.md alone")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data must be given")
        device = torch.device("cpu")
        about = environment(device, None)
        folder = RESULTS / device_slug(device)
        chosen = [e for e in EPSILONS if arguments.epsilon in (None, e or math.inf)]
        for task in arguments.task or TASKS:
            file = folder / f"utility-{task}.json"
            runs = _saved_runs(file)
            with tempfile.TemporaryDirectory() as work:
                for seed, epsilon in itertools.product(SEEDS, chosen):
                    run = one_run(task, arguments.data, epsilon, seed, Path(work), arguments.epochs)
                    runs[epsilon, seed] = {**run, "commit": about["commit"]}
                    write_json(file, {**about, "runs": list(runs.values())})
    saved = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/utility-*.json"))]
    (ROOT / "docs" / "utility.md").write_text(render(saved))
    return 0
