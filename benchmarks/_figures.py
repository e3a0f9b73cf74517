"""Pictures of the report: rooflines, and a private step beside an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks import clip_and_noise, conv_grad, morphology
from benchmarks._morphology_cases import Case as MorphologyCase
from benchmarks._networks import network_of
from benchmarks._step_contenders import DPFAST
from benchmarks._step_tables import LABELS
from benchmarks._tables import BANDWIDTH_TARGET
from benchmarks._workload import Case as ClipCase
from benchmarks.conv_grad import DPFAST as CONV
from benchmarks.conv_grad import Case as ConvCase

__all__ = ["draw_roofline", "draw_steps"]

Result = Mapping[str, Any]
_DOTS_PER_INCH = 110
_GREY = "0.45"
_COLOURS = tuple(f"C{number}" for number in range(10))  # a contender has one in both pictures


def _draw_lines(axes: Axes, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    """Shares of the bandwidth, a line for each name, under the whole of it."""
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(ylabel="of the measured bandwidth")
    axes.legend(fontsize=7)


def _clip_and_noise(axes: Axes, result: Result) -> None:
    """Share of the bandwidth over the gradients' size."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        case = ClipCase(**row["case"])
        if row.get("ratios") and case.variant == "flat":
            plural = "s" if case.num_tensors > 1 else ""
            name = f"{case.num_tensors} tensor{plural}, B = {case.batch_size}"
            share = row["ratios"]["share_of_bandwidth"]["median_of_rounds"]
            lines.setdefault(name, []).append((case.mebibytes, share))
    _draw_lines(axes, lines)
    axes.axhline(BANDWIDTH_TARGET, color=_GREY, linewidth=1, linestyle="--")
    axes.set(
        xscale="log",
        xlabel="per-sample gradients, MiB",
        title="clip_and_noise",
    )


def _closings(axes: Axes, result: Result) -> None:
    """Share of the bandwidth over the window's size."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        case = MorphologyCase.from_json(row["case"])
        plain = (case.operation, case.element, case.dtype) == ("closing", "box", "float32")
        if not plain or len(case.sizes) > 1:
            continue
        share = row["ratios"]["share_of_bandwidth"]["median_of_rounds"]
        name = case.input + (", one thread" if case.one_thread else "")
        lines.setdefault(name, []).append((case.sizes[0], share))
    _draw_lines(axes, lines)
    axes.set(ylim=(0, None), xlabel="size of the box", title="closing, result alone")


def _convolutions(axes: Axes, result: Result) -> None:
    """Operations a second over operations a byte, under both measured ceilings."""
    found: dict[str, list[tuple[float, float]]] = {}
    peaks, rates = [], []
    for row in result["rows"]:
        case = ConvCase.from_json(row["case"])
        name = f"{len(case.size)}D{', transposed' if case.transposed else ''}"
        reached = row["operations"] / row["seconds"][CONV]["median"] / 1e9
        found.setdefault(name, []).append((row["operations"] / row["bytes"], reached))
        peaks.append(row["ceiling_operations_per_second"]["median"] / 1e9)
        rates.append(row["ceiling_bytes_per_second"]["median"] / 1e9)
    peak, rate = sorted(peaks)[len(peaks) // 2], sorted(rates)[len(rates) // 2]
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), linestyle="", marker="o", label=name)
    most = 2 * max(x for points in found.values() for x, _ in points)
    axes.plot([0.5, peak / rate, most], [0.5 * rate, peak, peak], color="black", linewidth=1)
    axes.annotate(f"reading, {rate:.0f} GB/s", (0.6, 0.75 * rate), fontsize=7, rotation=35)
    axes.annotate(f"arithmetic, {peak:.0f} GFLOP/s", (peak / rate, 1.05 * peak), fontsize=7)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP a byte",
        ylabel="GFLOP/s",
        title="gradients of convolutions",
    )
    axes.legend(fontsize=7)


_PANELS = (
    (clip_and_noise.OP, _clip_and_noise),
    (morphology.OP, _closings),
    (conv_grad.OP, _convolutions),
)


def draw_roofline(results: Sequence[Result], path: Path) -> None:
    """What the kernels reach of what the machine gives.

    Args:
      results: full ones of one device, at least one of them of a kernel.
      path: of the picture.
    """
    panels = [(draw, r) for op, draw in _PANELS for r in results if r["op"] == op]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for each, (draw, result) in zip(axes[0], panels, strict=True):
        draw(each, result)
        each.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def _times(row: Result) -> dict[str, float]:
    found = row["time_over_ordinary"]
    return {name: ratio["median_of_rounds"] for name, ratio in found.items()}


def _peaks(row: Result) -> dict[str, float]:
    return dict(row["memory_over_ordinary"])


def draw_steps(steps: Result, memories: Result, path: Path) -> None:
    """Time and memory of a private step over an ordinary one's, all contenders that did it.

    Args:
      steps: of the step benchmark.
      memories: of the memory benchmark, on the same device.
      path: of the picture.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8))
    for each, title, result, ratios in (
        (axes[0], "time", steps, _times),
        (axes[1], "peak memory", memories, _peaks),
    ):
        found = {
            row["case"]["network"]: ratios(row)
            for row in result["rows"]
            if network_of(row["case"]["network"]).has_target
        }
        contenders = [name for name in LABELS if any(name in row for row in found.values())]
        width = 0.8 / len(contenders)
        for number, name in enumerate(contenders):
            shown = {i: row[name] for i, row in enumerate(found.values()) if name in row}
            each.bar(
                [i + (number - (len(contenders) - 1) / 2) * width for i in shown],
                list(shown.values()),
                width,
                label=LABELS[name],
                color="black" if name == DPFAST else _COLOURS[list(LABELS).index(name)],
            )
        each.axhline(1.0, color=_GREY, linewidth=1, linestyle="--")
        each.set_xticks(range(len(found)), list(found))
        each.set(title=f"{title} of a private step over an ordinary one's")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(figure)
