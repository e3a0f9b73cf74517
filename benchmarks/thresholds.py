"""Where private thresholds go: a known distribution of norms, and a real run; a plot of both.

    python -m benchmarks thresholds --data DIR/dsb2018_nuclei
    python -m benchmarks thresholds --report           # docs/figures/thresholds.png from the JSON

The plot shows the true percentile of each batch's norms beside the private threshold: that line is
not private, and is drawn of public data only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import dpfast
from benchmarks._record import RESULTS, ROOT, device_slug, environment, write_json
from dpfast.privacy.thresholds import Statistic, make_statistic

KINDS = {"private quantile": dpfast.PrivateQuantile, "noisy histogram": dpfast.NoisyHistogram}
PERCENTILES = (20.0, 50.0, 90.0)
SPREAD, SIMULATED_BATCH, SIMULATED_STEPS = 0.5, 64, 200
EPOCHS = 30


def simulated(kind: str, percentile: float, initial: float) -> dict[str, Any]:
    """The threshold over steps whose norms are exp(SPREAD * normal), noise multiplier 1."""
    statistic = make_statistic(KINDS[kind](percentile), initial, 1.0, SIMULATED_BATCH)
    assert statistic is not None
    noise = dpfast.NoiseSource()
    found = []
    for step in range(SIMULATED_STEPS):
        generator = torch.Generator().manual_seed(step)
        norms = (SPREAD * torch.randn(SIMULATED_BATCH, generator=generator).double()).exp()
        statistic.update(_noisy(statistic, norms, noise))
        found.append(float(statistic.bound))
    normal = float(torch.special.ndtri(torch.tensor(percentile / 100.0)))
    return {
        "kind": kind,
        "percentile": percentile,
        "threshold": found,
        "truth": math.exp(SPREAD * normal),
        "share": statistic.description(),
    }


def _noisy(statistic: Statistic, norms: torch.Tensor, noise: dpfast.NoiseSource) -> torch.Tensor:
    return dpfast.clip_and_noise(
        statistic.count(norms).new_zeros(0, statistic.size),
        max_grad_norm=statistic.sensitivity,
        noise_multiplier=statistic.noise / statistic.sensitivity,
        noise=noise,
        out=statistic.count(norms),
        accumulate=True,
    )


def real_run(kind: str, data: Path, epochs: int) -> dict[str, Any]:
    """A private U-Net on nuclei: the threshold after each step, and each batch's true median."""
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet

    from dpfast.segmentation import SegmentationTask, image_records, make_dataset

    task = SegmentationTask("nuclei", 2, 2, (96, 96), labels="foreground", dark_background=True)
    dataset = make_dataset(image_records(data), task)
    torch.manual_seed(0)
    model = UNet(2, 1, 2, (8, 16, 32), (2, 2), norm="instance")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = dpfast.per_sample_loss(DiceCELoss(to_onehot_y=True, softmax=True))
    engine = dpfast.PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=64),
        noise_multiplier=1.0,
        max_grad_norm=0.05,
        threshold=KINDS[kind](50.0),
    )
    assert engine._steps is not None
    statistic = engine._steps.statistic
    assert statistic is not None
    norms, count = [], statistic.count
    found: dict[str, list[float]] = {"threshold": [], "truth": [], "below": []}

    def noting(values: torch.Tensor) -> torch.Tensor:
        norms.append(values)
        return count(values)

    setattr(statistic, "count", noting)  # noqa: B010  for a look at what is not private
    for _ in range(epochs):
        for batch in loader:
            loss(model(batch["image"]), batch["label"]).sum().backward()
            before = float(statistic.bound)
            optimizer.step()
            seen = norms.pop()
            found["threshold"].append(float(statistic.bound))
            found["truth"].append(float(seen.median()))
            found["below"].append(float((seen <= before).double().mean()))
    late = found["below"][len(found["below"]) // 2 :]
    return {
        "kind": kind,
        "steps": engine.steps,
        "epsilon_at_1e-5": engine.get_epsilon(1e-5),
        "share": statistic.description(),
        "mean_share_below_threshold_in_second_half": sum(late) / len(late),
        **found,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    colours = dict(zip(PERCENTILES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axis, kind in zip(axes, KINDS, strict=False):
        for run in [each for each in result["simulated"] if each["kind"] == kind]:
            colour = colours[run["percentile"]]
            axis.semilogy(run["threshold"], color=colour, linewidth=1)
            axis.axhline(run["truth"], color=colour, linestyle="--", linewidth=1)
        axis.set_title(f"{kind}, known distribution", fontsize=10)
    for run, colour in zip(result["real"], ("tab:red", "tab:purple"), strict=True):
        axes[2].semilogy(run["threshold"], color=colour, linewidth=1.5, label=run["kind"])
    axes[2].semilogy(
        result["real"][0]["truth"], color="gray", linewidth=0.5, label="true median of each batch"
    )
    axes[2].set_title("nuclei, 50th percentile", fontsize=10)
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("step")
    axes[0].set_ylabel("threshold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks thresholds")
    parser.add_argument("--data", type=Path, help="folder of pictures and masks")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--report", action="store_true", help="draw the saved results alone")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu")
    path = RESULTS / device_slug(device) / "thresholds.json"
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data must be given")
        result = {
            **environment(device, None),
            "simulated": [
                simulated(kind, percentile, 0.05) for kind in KINDS for percentile in PERCENTILES
            ],
            "real": [real_run(kind, arguments.data, arguments.epochs) for kind in KINDS],
        }
        write_json(path, result)
    saved = json.loads(path.read_text())
    draw(saved, ROOT / "docs" / "figures" / "thresholds.png")
    for run in saved["real"]:
        print(
            f"{run['kind']}: {run['steps']} steps, threshold {run['threshold'][-1]:.3f}, batch "
            f"median {run['truth'][-1]:.3f}, {run['mean_share_below_threshold_in_second_half']:.1%}"
            f" of norms below it, gradient noise multiplier "
            f"{run['share']['gradient_noise_multiplier']:.4f} of 1"
        )
    return 0
