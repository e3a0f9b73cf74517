"""The report's figures, each as a data URI that a page can hold in itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfast.federated.report.runs import Group, Run
from dpfast.segmentation._extras import needs_extra

__all__ = ["boundaries", "class_colour", "convergence", "per_site"]

# Readable for people who see colours differently (Okabe and Ito 2008): for lines on white, and for
# outlines on gray images.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#7F7F7F", "#000000"),
)
_OUTLINES = (*_COLOURS[:6], "#F0E442", "#FFFFFF")
_LOG_FROM = 3.0  # as soon as the largest value is so many times the smallest
# Narrow, so that a phone shows it without making the letters small.
_SIZE = (4.4, 3.0)
_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dpfast",
    "font.family": "sans-serif",
}


def convergence(groups: Sequence[Group], score: str, label: str) -> str:
    """A score over rounds, a line for each group and a band from the lowest to the highest seed."""
    figure, axes = _figure()
    for index, group in enumerate(groups):
        curves = [run.curve(score) for run in group.runs]
        rounds = [number for number in curves[0] if not math.isnan(curves[0][number])]
        values = np.array([[curve.get(number, math.nan) for number in rounds] for curve in curves])
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(rounds, _nanmean(values), color=colour, label=group.label, linewidth=1.6)
        if len(curves) > 1 and rounds:
            axes.fill_between(
                rounds,
                np.nanmin(values, axis=0),
                np.nanmax(values, axis=0),
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    _whole_rounds(axes)
    if len(groups) > 1:
        _legend_below(axes, columns=1)
    return _svg(figure)


def per_site(curves: Mapping[str, Mapping[int, float]], label: str) -> str:
    """What each site said over rounds; empty where there is nothing to show."""
    if not any(curves.values()):
        return ""
    figure, axes = _figure()
    for index, (site, curve) in enumerate(curves.items()):
        axes.plot(
            list(curve),
            list(curve.values()),
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=("-", "--", ":")[index // len(_COLOURS) % 3],
            label=site,
            linewidth=1.4,
        )
    values = [value for curve in curves.values() for value in curve.values()]
    if min(values) > 0.0 and max(values) / min(values) >= _LOG_FROM:
        axes.set_yscale("log")
    elif max(values) == min(values):
        axes.set_ylim(0.0, 2.0 * max(values) or 1.0)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    _whole_rounds(axes)
    _legend_below(axes, columns=2)
    return _svg(figure)


def boundaries(run: Run, number: int) -> str:
    """One example: the image, with the boundaries of the truth and of the prediction."""
    image, truth, found = (run.examples[f"{k}_{number}"] for k in ("image", "truth", "prediction"))
    width, heading = _SIZE[0], 0.3
    figure, (left, right) = _plots(
        1, 2, (width, heading + 0.5 * width * image.shape[0] / image.shape[1])
    )
    classes = range(1, len(run.class_names) + 1)
    for axes, label, title in ((left, truth, "truth"), (right, found, "prediction")):
        axes.imshow(image, cmap="gray", interpolation="nearest")
        for each in classes:
            inside = label == each
            if inside.any():
                _outline(axes, inside, class_colour(each - 1))
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return _png(figure)


def class_colour(number: int) -> str:
    """Of a foreground class from 0, in `boundaries`."""
    return _OUTLINES[number % len(_OUTLINES)]


def _outline(axes: Any, inside: NDArray[np.bool_], colour: str) -> None:
    # A border of zeros closes the lines of what touches the image's edge.
    padded = np.pad(inside, 1).astype(float)
    rows, columns = (np.arange(-1, side + 1) for side in inside.shape)
    axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.3)


def _nanmean(values: NDArray[Any]) -> NDArray[Any]:
    counts = np.isfinite(values).sum(axis=0)
    sums = np.nansum(values, axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _plots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    with needs_extra("dpfast report", extra="federated"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns)


def _figure() -> tuple[Any, Any]:
    return _plots(1, 1, _SIZE)


def _whole_rounds(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_below(axes: Any, *, columns: int) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _svg(figure: Any) -> str:
    return _uri(figure, "svg", "image/svg+xml", metadata={"Date": None})


def _png(figure: Any) -> str:
    return _uri(figure, "png", "image/png", dpi=160)


def _uri(figure: Any, kind: str, media: str, **options: Any) -> str:
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(content, format=kind, **options)
    return f"data:{media};base64,{base64.b64encode(content.getvalue()).decode()}"
