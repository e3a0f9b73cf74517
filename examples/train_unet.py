"""Train a small MONAI U-Net with differential privacy, beside the same run without.

    python examples/train_unet.py                                  # phantom images
    python examples/train_unet.py --data DIR/dsb2018_nuclei        # 2D microscopy
    python examples/train_unet.py --data DIR/msd_hippocampus --dims 3

dpfast.per_sample_gradients keeps the samples of a backward pass apart,
dpfast.clip_and_noise clips them and adds the noise to their sum, batches are Poisson
samples, and dp-accounting turns the steps taken into epsilon.

What is protected: the training records. One record (an image in 2D, a subject in 3D)
is the privacy unit, neighbouring data sets differ by adding or removing one, and the
number of training records counts as public. What is not: the validation records,
whose Dice is printed as it is, and everything about the non-private run, which exists
only for comparison. Training losses are never shown. Trying settings out on the private
records costs privacy that this program does not count; its defaults were chosen on
phantoms and public data.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

import torch
from _data import SegmentationData, load_folder, make_phantoms
from _privacy import ACCOUNTANT, ADJACENCY, PrivacyGoal, calibrate_noise, epsilon_spent
from _training import (
    ClippingRule,
    Mechanism,
    Outcome,
    Plan,
    build_unet,
    mean_foreground_dice,
    train,
    validation_dice,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import dpfast

PROGRAM = "train_unet"
CHANNELS = (8, 16, 32)
PUBLIC_SEED = 0  # initial weights and phantoms, which depend on no private record


@dataclass(frozen=True)
class Row:
    """One line of the final comparison; an epsilon of None is infinite."""

    model: str
    dice: float
    epsilon: float | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and return the process's exit status."""
    options = parse_arguments(arguments)
    try:
        check_options(options)
        data = (
            load_folder(options.data, options.dims)
            if options.data is not None
            else make_phantoms(options.phantoms, options.dims, PUBLIC_SEED)
        )
        check_against_data(options, data)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    run(options, data, Console())
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # a cut-short privacy option must not pass for another
        description=(
            "Train a small U-Net with differential privacy and compare it with the same "
            "run without. Epsilon covers the training records only: the validation Dice is "
            "printed as it is, so validation patients are not protected."
        ),
    )
    add = parser.add_argument
    add("--data", type=Path, help="data set folder; without it, phantoms are drawn")
    add("--dims", type=int, choices=(2, 3), default=2, help="images or volumes")
    add("--phantoms", type=int, default=800, help="number of phantoms without --data")
    add("--target-epsilon", type=float, default=8.0, help="epsilon of the whole private run")
    add("--target-delta", type=float, default=1e-5, help="delta, below 1/n")
    add("--epochs", type=int, default=60, help="1/sample_rate steps each")
    add("--expected-batch-size", type=int, default=64, help="mean size of a Poisson batch")
    add("--physical-batch-size", type=int, default=16, help="per-sample gradients held at once")
    add("--clipping", choices=get_args(ClippingRule), default="automatic", help="clipping rule")
    add("--max-grad-norm", type=float, default=1.0, help="bound on one record's gradient")
    add("--learning-rate", type=float, default=2e-2, help="Adam's, private run")
    add("--non-private-learning-rate", type=float, default=1e-2, help="Adam's, other run")
    add("--averaging", type=float, default=0.95, help="decay of the average of the weights")
    add("--seed", type=int, help="reproducible sampling and noise: the run is NOT private")
    add("--skip-non-private", action="store_true", help="train the private model only")
    add("--output", type=Path, help="file for the private weights, with a .json beside it")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError where an option breaks its rule."""
    for name in ("phantoms", "epochs", "expected_batch_size", "physical_batch_size"):
        _require(options, name, lambda value: value >= 1, ">= 1")
    for name in ("target_epsilon", "max_grad_norm", "learning_rate", "non_private_learning_rate"):
        _require(options, name, lambda value: 0 < value < math.inf, "finite and > 0")
    _require(options, "target_delta", lambda value: 0 < value < 1, "in (0, 1)")
    _require(options, "averaging", lambda value: 0 <= value < 1, "in [0, 1)")
    if options.seed is not None:
        _require(options, "seed", lambda value: 0 <= value < 2**63, "in [0, 2**63)")
    if options.output is not None:
        _require(options, "output", lambda path: path.parent.is_dir(), "in an existing folder")
        _require(options, "output", lambda path: path.suffix not in ("", ".json"), "FILE.pt")


def check_against_data(options: argparse.Namespace, data: SegmentationData) -> None:
    """Raise ValueError where an option does not fit the number of training records."""
    count = data.num_records
    _require(options, "target_delta", lambda value: value < 1 / count, f"< 1/n = 1/{count}")
    # Accounted as Poisson sampling, which needs a chance of being left out.
    _require(options, "expected_batch_size", lambda value: value < count, f"< n = {count}")


def _require(
    options: argparse.Namespace, name: str, accept: Callable[[Any], bool], rule: str
) -> None:
    value = getattr(options, name)
    if not accept(value):
        raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value}")


def run(options: argparse.Namespace, data: SegmentationData, console: Console) -> None:
    """Train both models, then report and save."""
    sample_rate = options.expected_batch_size / data.num_records
    steps_per_epoch = max(1, round(1 / sample_rate))
    plan = Plan(
        steps=options.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        sample_rate=sample_rate,
        expected_batch_size=options.expected_batch_size,
        physical_batch_size=options.physical_batch_size,
        averaging=options.averaging,
    )
    goal = PrivacyGoal(options.target_epsilon, options.target_delta)
    console.print(
        f"{data.name}: {data.num_records} training and {len(data.validation_images)} "
        f"validation records, {data.num_classes} classes"
    )
    if options.seed is not None:
        console.print("[bold red]NOT PRIVATE[/]: --seed makes the sampling and noise reproducible")
    noise_multiplier = calibrate_noise(goal, plan.sample_rate, plan.steps)
    mechanism = Mechanism(
        clipping=options.clipping,
        max_grad_norm=options.max_grad_norm,
        noise_multiplier=noise_multiplier,
        noise=dpfast.NoiseSource() if options.seed is None else dpfast.NoiseSource(options.seed),
    )

    def fresh_model() -> torch.nn.Module:
        seed = PUBLIC_SEED if options.seed is None else options.seed
        return build_unet(options.dims, data.num_classes, CHANNELS, seed)

    model = fresh_model()
    nothing = torch.zeros_like(data.validation_labels)
    empty_dice = mean_foreground_dice(nothing, data.validation_labels, data.num_classes)
    rows = [
        Row("all background", empty_dice, 0.0, 0.0),
        Row("untrained", validation_dice(model, data), 0.0, 0.0),
    ]
    outcome = train_with_progress("private", model, data, plan, options, mechanism, console)
    epsilon = epsilon_spent(noise_multiplier, sample_rate, outcome.steps, goal.target_delta)
    report = privacy_report(options, data, plan, noise_multiplier, outcome.steps, epsilon)
    rows.append(Row("private", outcome.dice, report["epsilon"], outcome.seconds))
    if not options.skip_non_private:
        plain = train_with_progress(
            "non-private", fresh_model(), data, plan, options, None, console
        )
        rows.append(Row("non-private", plain.dice, None, plain.seconds))
    console.print(results_table(rows))
    for name, value in report.items():
        shown = "infinite" if value is None else value
        console.print(f"{name.replace('_', ' ')}: {shown}", highlight=False)
    if options.output is not None:
        save(options, model, {"data": data.name, "privacy": report, "results": rows})
        console.print(f"saved {options.output} and {options.output.with_suffix('.json')}")


def train_with_progress(
    name: str,
    model: torch.nn.Module,
    data: SegmentationData,
    plan: Plan,
    options: argparse.Namespace,
    mechanism: Mechanism | None,
    console: Console,
) -> Outcome:
    """Train under a progress bar, printing the validation Dice after every epoch."""
    # Who was sampled must stay as secret as the noise, hence the operating system's generator.
    rng = random.SystemRandom() if options.seed is None else random.Random(options.seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=plan.steps)

        def on_step(steps: int, dice: float | None) -> None:
            progress.update(task, completed=steps)
            if dice is not None:
                epoch = math.ceil(steps / plan.steps_per_epoch)
                progress.console.print(
                    f"{name}: epoch {epoch}/{options.epochs}, validation Dice {dice:.3f}",
                    highlight=False,
                )

        rate = options.non_private_learning_rate if mechanism is None else options.learning_rate
        return train(model, data, plan, rate, mechanism, rng, on_step)


def results_table(rows: Sequence[Row]) -> Table:
    """Lay the models out side by side."""
    table = Table(title="mean foreground Dice on the validation records")
    table.add_column("model")
    for heading in ("Dice", "epsilon", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        epsilon = "infinite" if row.epsilon is None else f"{row.epsilon:.3g}"
        table.add_row(row.model, f"{row.dice:.3f}", epsilon, f"{row.seconds:.0f}")
    return table


def privacy_report(
    options: argparse.Namespace,
    data: SegmentationData,
    plan: Plan,
    noise_multiplier: float,
    steps: int,
    epsilon: float,
) -> dict[str, Any]:
    """Say what the private run guarantees, to whom, and through which settings."""
    seeded = options.seed is not None
    return {
        "guarantee": "none: --seed makes the sampling and noise reproducible"
        if seeded
        else "(epsilon, delta), for noise in real arithmetic",
        "epsilon": None if seeded else epsilon,
        **({"epsilon_if_not_seeded": epsilon} if seeded else {}),
        "delta": options.target_delta,
        "accountant": ACCOUNTANT,
        "privacy_unit": data.privacy_unit,
        "neighbouring_relation": ADJACENCY,
        "not_covered": "the validation records and the non-private run",
        "noise_multiplier": noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": steps,
        "clipping": options.clipping,
        "max_grad_norm": options.max_grad_norm,
    }


def save(options: argparse.Namespace, model: torch.nn.Module, summary: dict[str, Any]) -> None:
    """Write the private weights and, beside them, the settings and results as JSON."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        # Whoever knows the seed can subtract the noise.
        if name != "seed"
    }
    results = {
        row.model: {"dice": row.dice, "epsilon": row.epsilon, "seconds": row.seconds}
        for row in summary["results"]
    }
    text = json.dumps({**summary, "results": results, "settings": settings}, indent=2)
    write_atomically(options.output, lambda file: torch.save(model.state_dict(), file))
    write_atomically(
        options.output.with_suffix(".json"), lambda file: file.write(text.encode() + b"\n")
    )


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its final place and move it there when it is whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


if __name__ == "__main__":
    sys.exit(main())
