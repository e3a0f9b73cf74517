"""Train a small MONAI U-Net with differential privacy, beside the same run without.

    python examples/train_unet.py                                  # phantom images
    python examples/train_unet.py --data DIR/dsb2018_nuclei        # 2D microscopy
    python examples/train_unet.py --data DIR/msd_hippocampus --dims 3

What is protected: the training records. One record (an image in 2D, a volume in 3D) is the privacy
unit, and the number of training records counts as public. What is not: the validation records,
whose Dice is printed as it is, and the non-private run, which exists for comparison. Training
losses are never shown. Trying settings out on private records costs privacy that this program does
not count; its defaults were chosen on phantoms and public data.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

import dpfast
from dpfast import segmentation as seg

Row = tuple[str, float, float | str, float]  # model, Dice, epsilon, seconds


def load(path: Path | None, dims: int, phantoms: int) -> tuple[seg.SegmentationTask, list[Any]]:
    """What is to be learnt, and the records to learn it from."""
    if path is None:
        return seg.phantom_task(dims), list(seg.phantom_records(phantoms, dims))
    if dims == 2:
        task = seg.SegmentationTask(
            path.name, 2, 2, (96, 96), labels="foreground", dark_background=True
        )
        return task, list(seg.image_records(path))
    task = seg.SegmentationTask(path.name, 3, 3, (32, 48, 32), fit="crop_or_pad")
    return task, list(seg.nifti_records(path))


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Mapping[str, Any]],
    epochs: int,
    private: bool,
) -> torch.nn.Module:
    """The training loop; returns the model with averaged weights."""
    criterion = dpfast.per_sample_loss(
        DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    )
    # Computed from weights that are released anyway, the average costs no privacy.
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.95))  # type: ignore[no-untyped-call]
    for _ in track(range(epochs), "private" if private else "non-private", transient=True):
        for batch in loader:
            optimizer.zero_grad()
            losses = criterion(model(batch["image"]), batch["label"])  # (B,); B may be 0
            (losses.sum() if private else losses.mean()).backward()
            optimizer.step()
            average.update_parameters(model)
    averaged: torch.nn.Module = average.module
    return averaged


def run(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Train with and without privacy; return the comparison and what is guaranteed."""
    task, records = load(options.data, options.dims, options.phantoms)
    training, validation = seg.split_by_patient(records)
    dataset = seg.make_dataset(training, task)
    held_out = DataLoader(seg.make_dataset(validation, task), batch_size=32)

    def dice(model: torch.nn.Module) -> float:
        return seg.validation_dice(model, held_out, task.num_classes)

    # Instance normalisation does not mix the samples of a batch, as BatchNorm would.
    torch.manual_seed(0)  # the initial weights are public
    channels = (8, 16, 32)
    untrained = UNet(task.spatial_dims, 1, task.num_classes, channels, (2, 2), norm="instance")
    rows: list[Row] = [("untrained", dice(untrained), 0.0, 0.0)]

    model = copy.deepcopy(untrained)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    engine = dpfast.PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=options.batch_size),
        target_epsilon=options.target_epsilon,
        target_delta=options.target_delta,
        epochs=options.epochs,
        max_grad_norm=1.0,
        clipping="automatic",
    )
    start = time.perf_counter()
    averaged = train(model, optimizer, loader, options.epochs, private=True)
    seconds = time.perf_counter() - start
    rows.append(("private", dice(averaged), engine.get_epsilon(options.target_delta), seconds))

    model = copy.deepcopy(untrained)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    shuffled = DataLoader(dataset, batch_size=options.batch_size, shuffle=True)
    start = time.perf_counter()
    averaged = train(model, optimizer, shuffled, options.epochs, private=False)
    rows.append(("non-private", dice(averaged), "infinite", time.perf_counter() - start))
    return rows, engine.report(options.target_delta)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    # No abbreviations: a privacy option cut short must not pass for another.
    parser = argparse.ArgumentParser(prog="train_unet", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, help="data set folder; without it, phantoms are drawn")
    add("--dims", type=int, choices=(2, 3), default=2, help="images or volumes")
    add("--phantoms", type=int, default=800, help="number of phantoms without --data")
    add("--target-epsilon", type=float, default=8.0, help="epsilon of the whole private run")
    add("--target-delta", type=float, default=1e-5, help="delta, below 1/n")
    add("--epochs", type=int, default=60, help="passes over the training records, on average")
    add("--batch-size", type=int, default=64, help="mean size of a Poisson batch")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and return the process's exit status."""
    try:
        rows, report = run(parse_arguments(arguments))
    except (ValueError, dpfast.PrivacyError) as error:
        print(f"train_unet: {error}", file=sys.stderr)
        return 2
    table = Table("model", "Dice", "epsilon", "seconds", title="mean foreground Dice, held out")
    for model, dice, epsilon, seconds in rows:
        shown = epsilon if isinstance(epsilon, str) else f"{epsilon:.3g}"
        table.add_row(model, f"{dice:.3f}", shown, f"{seconds:.0f}")
    console = Console()
    console.print(table)
    for name in ("guarantee", "delta", "protects", "adjacency", "accountant", "steps"):
        console.print(f"{name}: {report[name]}", highlight=False)
    console.print("not covered: the validation records and the non-private run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
