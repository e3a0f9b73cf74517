"""docs/figures/dp_morph.png: what networks trained with and without DP-Morph predict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._dp_morph_run import Choice, Experiment
from benchmarks._dp_morph_words import CLASSES

__all__ = ["draw"]

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7")
_CHOICE = Choice("none", "automatic", 8.0, 0)
_HEADINGS = ("truth", "none", "fixed", "adaptive")


def _plane(volume: torch.Tensor, at: int | None) -> torch.Tensor:
    """A 2D image, or the slice of a 3D one along its first axis."""
    return volume if at is None else volume[at]


def _widest(label: torch.Tensor) -> int | None:
    """The slice with most foreground; None in 2D."""
    if label.dim() == 2:
        return None
    return int((label > 0).flatten(1).sum(1).argmax())


def draw(experiments: Mapping[str, Experiment], path: Path) -> None:
    """Train each variant once and draw one validation image of each task.

    Args:
      experiments: by task.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = len(experiments)
    figure, axes = pyplot.subplots(
        3 * rows, len(_HEADINGS), figsize=(10, 8.1 * rows), squeeze=False, layout="constrained"
    )
    for row, (task, experiment) in enumerate(experiments.items()):
        sample: Any = experiment.data.validation[0]
        image, label = sample["image"], sample["label"][0]
        at = _widest(label)
        maps = [(label, label)]
        for choice in experiment.alike(_CHOICE):
            trained = experiment.run(choice)
            with torch.no_grad():
                scores = trained.model(image[None])
                closed = trained.operation(scores)
            maps.append((scores.argmax(1)[0], closed.argmax(1)[0]))
        background = _plane(image[0], at).numpy()
        names = CLASSES[task]
        for column, (alone, closed) in enumerate(maps):
            plane = _plane(closed, at)
            first, mask, outline = axes[3 * row : 3 * row + 3, column]
            for axis, shown in ((first, _plane(alone, at)), (mask, plane)):
                axis.imshow(_coloured(shown, len(names)).numpy(), interpolation="nearest")
            outline.imshow(background, cmap="gray", interpolation="nearest")
            for number in range(1, len(names) + 1):
                inside = (plane == number).float().numpy()
                if inside.any():
                    outline.contour(inside, [0.5], colors=_COLOURS[number - 1], linewidths=1.2)
            first.set_title(_HEADINGS[column])
            for axis in (first, mask, outline):
                axis.set_xticks([])
                axis.set_yticks([])
        titles = (f"{task}: by itself", "after the closing", "its boundaries")
        for axis, title in zip(axes[3 * row :, 0], titles, strict=False):
            axis.set_ylabel(title)
        handles = [
            Line2D([], [], color=colour, label=name, linewidth=4)
            for colour, name in zip(_COLOURS, names, strict=False)
        ]
        axes[3 * row, -1].legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False
        )
    figure.suptitle(
        f"DP-Morph in the loss: ε = {_CHOICE.epsilon:g}, clipping {_CHOICE.rule}, one run each"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _coloured(plane: torch.Tensor, classes: int) -> torch.Tensor:
    """(H, W, 3): black where there is background."""
    from matplotlib.colors import to_rgb

    colours = [(0.0, 0.0, 0.0), *map(to_rgb, _COLOURS[:classes])]
    return torch.tensor(colours)[plane.long()]
