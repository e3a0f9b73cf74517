"""`dpfast.profile`: one step, measured and taken apart."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dpfast.profiling._attribution import LAYER_PREFIX, OUTSIDE, owners

__all__ = ["KernelTime", "LayerTime", "Profile", "profile"]

_MICRO = 1e-6
_ROOT = "(model)"


@dataclass(frozen=True)
class LayerTime:
    """A layer's share of a step, in seconds.

    Attributes:
      name: as in `model.named_modules()`; "(model)" for what the model itself does, "(no layer)"
        for what belongs to none: loss, clipping, noise, optimizer, whatever else the step does.
      kind: class of the layer.
      forward: time of its forward pass.
      backward: time of its nodes in the backward pass, per-sample gradients and what checkpointing
        computes again included.
    """

    name: str
    kind: str
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class KernelTime:
    """An operation's own time in a step, without what it calls, over all layers.

    Attributes:
      name: as PyTorch knows it, such as `aten::mkldnn_convolution` or `dpfast::conv_grad_sample`.
      calls: in one step.
      seconds: in one step.
    """

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Where a step's time goes.

    Attributes:
      seconds: of a step without the profiler, median.
      profiled_seconds: of a step with it: what the times below add up to, nearly.
      device: where their kernels run; on CUDA the times are the device's.
      layers: the largest first.
      kernels: the largest first.
    """

    seconds: float
    profiled_seconds: float
    device: str
    layers: tuple[LayerTime, ...]
    kernels: tuple[KernelTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        return asdict(self)

    def table(self, rows: int = 20) -> str:
        """The largest layers and kernels as text.

        Args:
          rows: of each.
        """
        total = sum(layer.seconds for layer in self.layers) or 1.0
        lines = [
            f"a step takes {1e3 * self.seconds:.2f} ms, {1e3 * self.profiled_seconds:.2f} ms while "
            f"it is profiled ({self.device})",
            "",
            f"{'layer':<44}{'kind':<20}{'forward ms':>12}{'backward ms':>13}{'share':>8}",
        ]
        for layer in self.layers[:rows]:
            lines.append(
                f"{_cut(layer.name, 43):<44}{_cut(layer.kind, 19):<20}"
                f"{1e3 * layer.forward:>12.3f}{1e3 * layer.backward:>13.3f}"
                f"{layer.seconds / total:>8.1%}"
            )
        lines += ["", f"{'kernel':<64}{'calls':>8}{'ms':>12}{'share':>8}"]
        for kernel in self.kernels[:rows]:
            lines.append(
                f"{_cut(kernel.name, 63):<64}{kernel.calls:>8.1f}{1e3 * kernel.seconds:>12.3f}"
                f"{kernel.seconds / total:>8.1%}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-length + 1 :]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """What is told apart: layers without parts, and those with parameters of their own."""
    return {
        name or _ROOT: module
        for name, module in model.named_modules()
        if next(module.children(), None) is None
        or next(module.parameters(recurse=False), None) is not None
    }


@contextmanager
def _named_ranges(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Every layer's forward pass inside a range of its name."""
    handles = []
    for name, module in layers.items():
        open_ranges: list[Any] = []

        def enter(
            _module: nn.Module, _inputs: Any, name: str = name, ranges: list[Any] = open_ranges
        ) -> None:
            ranges.append(torch.profiler.record_function(LAYER_PREFIX + name))
            ranges[-1].__enter__()

        def leave(
            _module: nn.Module, _inputs: Any, _output: Any, ranges: list[Any] = open_ranges
        ) -> None:
            if ranges:
                ranges.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _timed(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _own_seconds(event: Any, device: torch.device) -> float:
    own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return float(own) * _MICRO


def _kinds(layers: dict[str, nn.Module]) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in layers.items()} | {OUTSIDE: ""}


def _add_up(
    events: Any, layers: dict[str, nn.Module], device: torch.device, repeats: int
) -> tuple[tuple[LayerTime, ...], tuple[KernelTime, ...]]:
    by_layer: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, owner in owners(events):
        seconds = _own_seconds(event, device) / repeats
        by_layer[owner.layer][owner.phase] += seconds
        if not event.name.startswith(LAYER_PREFIX):
            by_kernel[event.name][0] += 1.0 / repeats
            by_kernel[event.name][1] += seconds
    kinds = _kinds(layers)
    layer_times = [
        LayerTime(name, kinds[name], times["forward"], times["backward"])
        for name, times in by_layer.items()
    ]
    kernel_times = [KernelTime(name, *values) for name, values in by_kernel.items()]
    return (
        tuple(sorted(layer_times, key=lambda each: -each.seconds)),
        tuple(sorted(kernel_times, key=lambda each: -each.seconds)),
    )


def profile(step: Callable[[], object], model: nn.Module, *, repeats: int = 3) -> Profile:
    """Take training steps and say where their time goes, by layer and by kernel.

    Works with any step: an ordinary one, one inside `dpfast.per_sample_gradients`, one of a
    `PrivacyEngine`, another library's. Read with `print(dpfast.profile(step, model))`.

    Every call of `step` is a real one: it changes weights and spends privacy budget. There are
    `1 + 2 * repeats` of them: one to warm up, `repeats` without the profiler and `repeats` with it.

    Args:
      step: what is measured, a call without arguments: forward pass, backward pass and update.
      model: whose layers are told apart, also inside wrappers that call it.
      repeats: steps to average over.

    Returns:
      Times in seconds per step. Times of layers are those of their own operations: a block's time
      is the sum of its layers'.

    Raises:
      ValueError: `repeats` is below 1.
      RuntimeError: another profiler is at work.
    """
    if repeats < 1:
        raise ValueError(f"profile: repeats must be >= 1, got {repeats}")
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    layers = _layers(model)
    step()
    seconds = statistics.median(_timed(step, device) for _ in range(repeats))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _named_ranges(layers), torch.profiler.profile(activities=activities) as recorded:
        profiled = sum(_timed(step, device) for _ in range(repeats)) / repeats
    events = recorded.events()
    assert events is not None  # the profiler has stopped
    layer_times, kernel_times = _add_up(events, layers, device, repeats)
    return Profile(seconds, profiled, str(device), layer_times, kernel_times)
