"""What the command line and the report know of every benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks import (
    _conv_grad_tables,
    _federated_tables,
    _memory_tables,
    _morphology_tables,
    _scaling_tables,
    _step_tables,
    _tables,
    clip_and_noise,
    conv_grad,
    federated,
    memory,
    morphology,
    scaling,
    step,
)
from benchmarks._text import TextTable

__all__ = ["OPS", "Op"]


class _Unmeasured(Protocol):
    def __call__(self, device_type: str, *, quick: bool) -> list[TextTable]: ...


@dataclass(frozen=True)
class Op:
    """A benchmark.

    Attributes:
      settings: called with `quick` and `rounds`; what `run` takes.
      run: measures on a device with settings; calls its last argument before each row with the
        row's description, its number from 0 and the number of rows.
      tables: the tables of a result.
      unmeasured: the same tables without figures.
      text: says in the report what the tables show.
      requires: packages without which there is nothing to measure.
      peers: packages whose versions the report names.
      devices: on which there is something to measure.
    """

    settings: Callable[..., Any]
    run: Callable[[torch.device, Any, Callable[[str, int, int], None]], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[TextTable]]
    unmeasured: _Unmeasured
    text: str
    requires: tuple[str, ...]
    peers: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")


OPS = {
    clip_and_noise.OP: Op(
        clip_and_noise.Settings,
        clip_and_noise.run,
        _tables.tables,
        _tables.unmeasured,
        _tables.TEXT,
        requires=(),
        peers=("opacus",),
    ),
    conv_grad.OP: Op(
        conv_grad.Settings,
        conv_grad.run,
        _conv_grad_tables.tables,
        _conv_grad_tables.unmeasured,
        _conv_grad_tables.TEXT,
        requires=(),
        peers=(),
    ),
    step.OP: Op(
        step.Settings,
        step.run,
        _step_tables.tables,
        _step_tables.unmeasured,
        _step_tables.TEXT,
        requires=("monai", "einops"),
        peers=("monai", "opacus", "opake", "fastdp"),
    ),
    memory.OP: Op(
        memory.Settings,
        memory.run,
        _memory_tables.tables,
        _memory_tables.unmeasured,
        _memory_tables.TEXT,
        requires=("monai", "einops"),
        peers=("monai", "opacus", "opake", "fastdp"),
    ),
    morphology.OP: Op(
        morphology.Settings,
        morphology.run,
        _morphology_tables.tables,
        _morphology_tables.unmeasured,
        _morphology_tables.TEXT,
        requires=(),
        peers=("kornia", "opencv", "scipy"),
    ),
    federated.OP: Op(
        federated.Settings,
        federated.run,
        _federated_tables.tables,
        _federated_tables.unmeasured,
        _federated_tables.TEXT,
        requires=("monai", "pydantic", "flwr"),
        peers=("flower",),
        devices=("cpu",),
    ),
    scaling.OP: Op(
        scaling.Settings,
        scaling.run,
        _scaling_tables.tables,
        _scaling_tables.unmeasured,
        _scaling_tables.TEXT,
        requires=("monai",),
        peers=("monai",),
    ),
}
