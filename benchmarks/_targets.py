"""The table of targets: what each demands, and what was measured, worst row and best row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import (
    _federated_tables,
    _memory_tables,
    _morphology_tables,
    _scaling_tables,
    _step_tables,
    _tables,
    clip_and_noise,
    federated,
    memory,
    morphology,
    scaling,
    step,
)
from benchmarks._morphology_cases import Case as MorphologyCase
from benchmarks._morphology_contenders import DPFAST as MORPHOLOGY
from benchmarks._step_contenders import BUDGET, DPFAST
from benchmarks._step_task import Case as StepCase
from benchmarks._text import NOT_MEASURED, TextTable
from benchmarks._workload import Case

__all__ = ["TARGETS", "Figure", "Target", "table"]

Result = Mapping[str, Any]

# Two reads from memory take at least so many times longer than a call that fits on the chip.
_ON_CHIP_TARGET = 1.5
_ON_CHIP_MEBIBYTES = 8  # fits in no second-level cache and in every last-level one


@dataclass(frozen=True)
class Figure:
    """A measured value and its limit.

    Attributes:
      value: a ratio.
      least: it must not be below; None where it has an upper limit.
      most: it must not be above; None where it has a lower limit.
    """

    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the target holds."""
        below = self.least is not None and self.value < self.least
        above = self.most is not None and self.value > self.most
        return not below and not above


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
      what: is demanded of what.
      op: whose results have the figures.
      limits: in words, by type of device; without one nothing is demanded there.
      figures: those of a result.
      percent: how they are written: as percentages, else as multiples.
    """

    what: str
    op: str
    limits: Mapping[str, str]
    figures: Callable[[Result, str], Iterable[Figure]]
    percent: bool = False

    def cell(self, results: Sequence[Result], device_type: str) -> str:
        """What was measured on a type of device: worst and best row, and how many hold."""
        if device_type not in self.limits:
            return "-"
        found = [
            figure
            for result in results
            if result["op"] == self.op and result["machine"]["device_type"] == device_type
            for figure in self.figures(result, device_type)
        ]
        if not found:
            return NOT_MEASURED
        values = sorted(figure.value for figure in found)
        held = sum(figure.met for figure in found)
        bounds = [self._write(values[0])]
        if self._write(values[-1]) != bounds[0]:
            bounds.append(self._write(values[-1]))
        rows = f"{held} of {len(found)} rows"
        return f"{' to '.join(bounds)}; met in {rows}{'' if held == len(found) else ' (missed)'}"

    def _write(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.2f}x"


def _clip_rows(result: Result) -> Iterable[tuple[Case, Mapping[str, Any]]]:
    for row in result["rows"]:
        if row.get("ratios"):
            yield Case(**row["case"]), row["ratios"]


def _bandwidth(result: Result, device_type: str) -> Iterable[Figure]:
    for case, ratios in _clip_rows(result):
        if (least := _tables.bandwidth_target(case)) is not None:
            yield Figure(ratios["share_of_bandwidth"]["median_of_rounds"], least=least)


def _on_chip(result: Result, device_type: str) -> Iterable[Figure]:
    for case, ratios in _clip_rows(result):
        if case.mebibytes == _ON_CHIP_MEBIBYTES:
            share = ratios["share_of_bandwidth"]["median_of_rounds"]
            yield Figure(share, least=_ON_CHIP_TARGET)


def _noise_share(result: Result, device_type: str) -> Iterable[Figure]:
    for case, ratios in _clip_rows(result):
        most = _tables.noise_share_target(case, device_type)
        if most is not None and "noise_share" in ratios:
            yield Figure(ratios["noise_share"]["median_of_rounds"], most=most)


def _noise_speed(result: Result, device_type: str) -> Iterable[Figure]:
    for each in result["noise"]:
        ratio = each["torch_randn_over_dpfast"]["median_of_rounds"]
        yield Figure(ratio, least=_tables.NOISE_OVER_RANDN_TARGET)


def _step_time(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["rows"]:
        most = _step_tables.time_target(StepCase.from_json(row["case"]), device_type)
        if most is not None and DPFAST in row["time_over_ordinary"]:
            yield Figure(row["time_over_ordinary"][DPFAST]["median_of_rounds"], most=most)


def _step_memory(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["rows"]:
        most = _memory_tables.memory_target(StepCase.from_json(row["case"]), device_type)
        if most is not None and DPFAST in row["memory_over_ordinary"]:
            yield Figure(row["memory_over_ordinary"][DPFAST], most=most)


def _largest_batch(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["batches"]:
        if BUDGET in row["memory_over_ordinary"]:
            share = 1 / row["memory_over_ordinary"][BUDGET]
            yield Figure(share, least=_memory_tables.LARGEST_BATCH_TARGET)


def _morphology_ratio(
    result: Result, key: str, limit: Callable[[MorphologyCase], Mapping[str, float | None] | None]
) -> Iterable[Figure]:
    for row in result["rows"]:
        limits = limit(MorphologyCase.from_json(row["case"]))
        ratios = _morphology_tables.quoted_ratios(row)
        if limits is not None and key in ratios:
            yield Figure(ratios[key], **limits)


def _against_opencv(result: Result, device_type: str) -> Iterable[Figure]:
    def limit(case: MorphologyCase) -> Mapping[str, float | None] | None:
        least = _morphology_tables.opencv_target(case)
        return None if least is None else {"least": least}

    return _morphology_ratio(result, "opencv_over_dpfast", limit)


def _backward(result: Result, device_type: str) -> Iterable[Figure]:
    def limit(case: MorphologyCase) -> Mapping[str, float | None] | None:
        most = _morphology_tables.backward_target(case, device_type)
        return None if most is None else {"most": most}

    return _morphology_ratio(result, "backward_over_forward", limit)


def _against_kornia(size: int | None) -> Callable[[Result, str], Iterable[Figure]]:
    def figures(result: Result, device_type: str) -> Iterable[Figure]:
        def limit(case: MorphologyCase) -> Mapping[str, float | None] | None:
            least = _morphology_tables.kornia_target(case, device_type)
            wanted = size is None or device_type == "cuda" or case.sizes[0] == size
            return {"least": least} if least is not None and wanted else None

        return _morphology_ratio(result, "kornia_backward_over_dpfast", limit)

    return figures


def _morphology_bandwidth(result: Result, device_type: str) -> Iterable[Figure]:
    def limit(case: MorphologyCase) -> Mapping[str, float | None] | None:
        if _morphology_tables.opencv_target(case) is None:
            return None
        return {"least": _morphology_tables.BANDWIDTH_TARGET}

    return _morphology_ratio(result, "share_of_bandwidth", limit)


def _morphology_memory(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["memory"]:
        if row["contender"] == MORPHOLOGY and "memory_over_input" in row:
            yield Figure(row["memory_over_input"], most=_morphology_tables.MEMORY_TARGET)


def _overhead(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["rows"]:
        yield Figure(row["outside_over_training"], most=_federated_tables.OVERHEAD_TARGET)


def _federated_memory(result: Result, device_type: str) -> Iterable[Figure]:
    fewest = result["memory"][0]["bytes"]
    for row in result["memory"][1:]:
        yield Figure(row["bytes"] / fewest, most=_federated_tables.MEMORY_GROWTH_TARGET)


def _weak_scaling(result: Result, device_type: str) -> Iterable[Figure]:
    for row in result["rows"]:
        together = row["contenders"]["dpfast"]["efficiency"]["together"]["median"]
        yield Figure(together, least=_scaling_tables.EFFICIENCY_TARGET)


TARGETS = (
    Target(
        "clip_and_noise, float32, larger than the caches: share of the bandwidth",
        clip_and_noise.OP,
        {"cpu": "at least 85 %", "cuda": "at least 85 %"},
        _bandwidth,
        percent=True,
    ),
    Target(
        "clip_and_noise that fits on the chip (8 MiB): two reads from memory over its time",
        clip_and_noise.OP,
        {"cpu": "at least 1.5x", "cuda": "at least 1.5x"},
        _on_chip,
    ),
    Target(
        "noise: part of the call",
        clip_and_noise.OP,
        {"cpu": "at most 15 % at B = 16, 5 % at B >= 64", "cuda": "at most 5 %"},
        _noise_share,
        percent=True,
    ),
    Target(
        "noise: a sample of torch.randn over one of dpfast",
        clip_and_noise.OP,
        {"cpu": "at least 2.6x"},
        _noise_speed,
    ),
    Target(
        "DP step: time over the ordinary step's",
        step.OP,
        {"cpu": "at most 1.05x", "cuda": "at most 1.15x"},
        _step_time,
    ),
    Target(
        "DP step: peak memory over the ordinary step's",
        memory.OP,
        {"cpu": "at most 1.10x", "cuda": "at most 1.15x"},
        _step_memory,
    ),
    Target(
        "largest batch over the ordinary step's",
        memory.OP,
        {"cpu": "at least 0.90x", "cuda": "at least 0.90x"},
        _largest_batch,
    ),
    Target(
        "closing: OpenCV's time over dpfast's, equal threads",
        morphology.OP,
        {"cpu": "at least 1.00x"},
        _against_opencv,
    ),
    Target(
        "closing: share of the bandwidth",
        morphology.OP,
        {"cuda": "at least 60 %"},
        _morphology_bandwidth,
        percent=True,
    ),
    Target(
        "closing: result and gradient over the result alone",
        morphology.OP,
        {"cpu": "at most 4.00x"},
        _backward,
    ),
    Target(
        "closing of 3, result and gradient: kornia's time over dpfast's",
        morphology.OP,
        {"cpu": "at least 50x"},
        _against_kornia(3),
    ),
    Target(
        "closing of 15, result and gradient: kornia's time over dpfast's",
        morphology.OP,
        {"cpu": "at least 500x"},
        _against_kornia(15),
    ),
    Target(
        "closing, result and gradient: kornia's time over dpfast's",
        morphology.OP,
        {"cuda": "at least 10x"},
        _against_kornia(None),
    ),
    Target(
        "closing: peak memory over the input",
        morphology.OP,
        {"cpu": "at most 3.00x", "cuda": "at most 3.00x"},
        _morphology_memory,
    ),
    Target(
        "federated rounds in one process: what is outside the sites, over their training",
        federated.OP,
        {"cpu": "at most 2 %"},
        _overhead,
        percent=True,
    ),
    Target(
        "federated rounds in one process: peak memory at more sites, over two sites'",
        federated.OP,
        {"cpu": "at most 1.10x"},
        _federated_memory,
    ),
    Target(
        "weak scaling over 2 processes: efficiency",
        scaling.OP,
        {"cpu": "at least 0.95x", "cuda": "at least 0.95x"},
        _weak_scaling,
    ),
)


def table(results: Sequence[Result]) -> TextTable:
    """The table of targets.

    Args:
      results: full ones of all ops and devices.
    """
    headings = ["what", "target, CPU", "measured, CPU", "target, CUDA", "measured, CUDA"]
    rows = [
        [
            target.what,
            target.limits.get("cpu", "-"),
            target.cell(results, "cpu"),
            target.limits.get("cuda", "-"),
            target.cell(results, "cuda"),
        ]
        for target in TARGETS
    ]
    return TextTable("targets", headings, rows, tuple(headings))
