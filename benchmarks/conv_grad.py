"""The benchmark of per-sample gradients of a convolution's weight, layer by layer.

Every row times, in turn and on the same random tensors: dpfast's gradients with their norms, its
norms alone, PyTorch's own gradient of one sample after the other, the same as one grouped
convolution (what `torch.func.vmap` makes of it), and PyTorch's gradient of the whole batch, which
is no per-sample gradient but what an ordinary step pays. The ceilings are measured in the same
rounds: for operations a second multiply-adds in registers (on CUDA a large matrix product), for
bytes reading (on CUDA copying).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks._answers import WrongAnswerError
from benchmarks._bandwidth import Bandwidth
from benchmarks._timing import Contender, clock_for, measure, ratio, summarise
from dpfast import _native
from dpfast.ops.conv_grad_sample import (
    ConvGrads,
    ConvSettings,
    conv_grad_sample,
    conv_square_norms,
)

__all__ = ["DPFAST", "NORMS", "OP", "PEERS", "Case", "Settings", "cases", "run", "run_case"]

OP = "conv_grad"
DPFAST, NORMS = "dpfast", "dpfast_norms"
PEERS = ("loop", "grouped", "batch")
_SEED = 20240607
_MULTIPLY_ADDS = 10**5  # a millisecond
_PRODUCT_SIZE = 8192
# Largest |got - expected| over the largest value: sums of float32 products in float32, some
# thousands to a hundred thousand terms long; TF32 is off while answers are checked.
_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """A convolution of 3 taps an axis and padding 1.

    Attributes:
      batch_size: N.
      channels: of input and output.
      size: extent of the input.
      stride: the same along each axis.
      transposed: whether it enlarges.
    """

    batch_size: int
    channels: tuple[int, int]
    size: tuple[int, ...]
    stride: int = 1
    transposed: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """The case that was saved: JSON turns tuples into lists."""
        return cls(
            **{**fields, "channels": tuple(fields["channels"]), "size": tuple(fields["size"])}
        )

    @property
    def label(self) -> str:
        """The row in words."""
        kind = "transposed, " if self.transposed else ""
        step = f", stride {self.stride}" if self.stride > 1 else ""
        extent = "x".join(map(str, self.size))
        return f"{kind}{self.channels[0]} to {self.channels[1]}, {extent}{step}"

    @property
    def settings(self) -> ConvSettings:
        """What torch.convolution takes."""
        axes = len(self.size)
        more = self.stride - 1 if self.transposed else 0
        return ConvSettings(
            [self.stride] * axes, [1] * axes, [1] * axes, self.transposed, [more] * axes, 1
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the convolution."""
        first, second = self.channels if self.transposed else self.channels[::-1]
        return (first, second, *[3] * len(self.size))

    @property
    def positions(self) -> int:
        """At which all taps multiply: those of the smaller of input and output."""
        step = 1 if self.transposed else self.stride
        return math.prod(-(-extent // step) for extent in self.size)

    @property
    def operations(self) -> int:
        """Multiplications and additions of all samples, those with zeros around included."""
        return 2 * self.batch_size * math.prod(self.weight_shape) * self.positions

    def bytes(self, x: torch.Tensor, grad_output: torch.Tensor) -> int:
        """Input and gradient read once, gradients of the weight written once, float32."""
        written = self.batch_size * math.prod(self.weight_shape)
        return 4 * (x.numel() + grad_output.numel() + written)


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: a few small rows, for trying out the harness; its figures mean nothing.
      rounds: at most so many rounds a row.
      budget_seconds: time for the rounds of one row; at least five rounds are taken.
    """

    quick: bool = False
    rounds: int = 25
    budget_seconds: float = 10.0


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows for a kind of device: layers of the networks of the step benchmark, and larger."""
    if quick:
        return [Case(2, (3, 5), (8, 8)), Case(2, (4, 2), (4, 4, 4), stride=2, transposed=True)]
    if device_type == "cpu":
        return [
            Case(16, (1, 16), (128, 128), stride=2),
            Case(16, (16, 16), (64, 64)),
            Case(16, (32, 32), (32, 32)),
            Case(16, (64, 64), (16, 16)),
            Case(16, (128, 128), (8, 8)),
            Case(16, (64, 16), (32, 32), stride=2, transposed=True),
            Case(4, (8, 8), (48, 48, 48)),
            Case(4, (16, 16), (24, 24, 24)),
            Case(4, (32, 32), (24, 24, 24)),
            Case(4, (64, 64), (12, 12, 12)),
            Case(4, (128, 128), (6, 6, 6)),
            Case(4, (64, 16), (12, 12, 12), stride=2, transposed=True),
        ]
    return [
        Case(32, (1, 16), (256, 256), stride=2),
        Case(32, (16, 16), (128, 128)),
        Case(32, (32, 32), (64, 64)),
        Case(32, (64, 64), (32, 32)),
        Case(32, (128, 128), (16, 16)),
        Case(32, (64, 16), (64, 64), stride=2, transposed=True),
        Case(4, (8, 8), (96, 96, 96)),
        Case(4, (16, 16), (48, 48, 48)),
        Case(4, (32, 32), (48, 48, 48)),
        Case(4, (64, 64), (24, 24, 24)),
        Case(4, (128, 128), (12, 12, 12)),
        Case(4, (64, 16), (24, 24, 24), stride=2, transposed=True),
    ]


class _Layer:
    """A case's tensors, and every contender's call."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(_SEED)
        shape = (case.batch_size, case.channels[0], *case.size)
        self.x = torch.randn(shape, generator=generator, device=device)
        self.weight = torch.randn(case.weight_shape, generator=generator, device=device)
        out = torch.convolution(self.x, self.weight, None, *case.settings)
        self.grad_output = torch.randn(out.shape, generator=generator, device=device)

    def dpfast(self) -> torch.Tensor:
        return self._found().weight

    def norms(self) -> torch.Tensor:
        case = self.case
        return conv_square_norms(self.x, self.grad_output, case.weight_shape, case.settings)

    def loop(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x, grad, weight = (t.to(dtype) for t in (self.x, self.grad_output, self.weight))
        return torch.stack(
            [
                self._by_library(x[i : i + 1], grad[i : i + 1], weight)
                for i in range(self.case.batch_size)
            ]
        )

    def grouped(self) -> torch.Tensor:
        """Samples as groups of channels: a gradient for each comes out."""
        case, samples = self.case, self.case.batch_size
        x, grad = (t.reshape(1, -1, *t.shape[2:]) for t in (self.x, self.grad_output))
        weight = self.weight.repeat(samples, *[1] * (self.weight.dim() - 1))
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *case.settings[:5], samples, [False, True, False]
        )[1]
        grads: torch.Tensor = found.view(samples, *case.weight_shape)
        return grads

    def batch(self) -> torch.Tensor:
        return self._by_library(self.x, self.grad_output, self.weight)

    def _found(self) -> ConvGrads:
        case = self.case
        return conv_grad_sample(self.x, self.grad_output, case.weight_shape, case.settings)

    def _by_library(
        self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self.case.settings, [False, True, False]
        )[1]
        return found

    def check(self) -> dict[str, float]:
        """Everybody's largest error over the largest value, against float64; raises where wrong."""
        expected = self.loop(torch.float64)
        squares = expected.flatten(1).square().sum(1)
        answers = {
            DPFAST: (self.dpfast(), expected),
            NORMS: (self.norms(), squares),
            "loop": (self.loop(), expected),
            "grouped": (self.grouped(), expected),
            "batch": (self.batch(), expected.sum(0)),
        }
        errors = {}
        for name, (got, wanted) in answers.items():
            error = float((got.double() - wanted).abs().max() / wanted.abs().max())
            if not error <= _TOLERANCE:
                raise WrongAnswerError(f"{name}: off by {error:.1e} of the largest value")
            errors[name] = error
        return errors


def _arithmetic(device: torch.device) -> tuple[Contender, int]:
    """What the device's arithmetic can do, and in how many operations.

    On the CPU not a matrix product: the library that PyTorch has for it uses half of the vectors of
    some processors.
    """
    if device.type == "cpu":
        return (
            Contender("multiply_add", lambda: _native.multiply_add(_MULTIPLY_ADDS)),
            _native.multiply_add(_MULTIPLY_ADDS),
        )
    size = _PRODUCT_SIZE
    first, second = (torch.rand(size, size, device=device) for _ in range(2))
    out = torch.empty(size, size, device=device)
    return Contender("product", lambda: torch.mm(first, second, out=out)), 2 * size**3


def run_case(
    case: Case, device: torch.device, bandwidth: Bandwidth, settings: Settings
) -> dict[str, Any]:
    """Measure one row.

    Raises:
      WrongAnswerError: a contender does not compute what it should.
    """
    layer = _Layer(case, device)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        row: dict[str, Any] = {"case": asdict(case), "checks": layer.check()}
        arithmetic, operations = _arithmetic(device)
        calls: dict[str, Callable[[], object]] = {
            DPFAST: layer.dpfast,
            NORMS: layer.norms,
            "loop": layer.loop,
            "grouped": layer.grouped,
            "batch": layer.batch,
        }
        times = measure(
            [*(Contender(*each) for each in calls.items()), bandwidth.contender],
            clock_for(device),
            rounds=settings.rounds,
            budget_seconds=settings.budget_seconds,
            yardstick=arithmetic,
        )
    finally:
        torch.backends.cudnn.allow_tf32 = before
    seconds = times.seconds
    ceiling = [operations / t for t in times.yardstick[DPFAST]]
    rate = [case.operations / t for t in seconds[DPFAST]]
    row["operations"] = case.operations
    row["bytes"] = case.bytes(layer.x, layer.grad_output)
    row["seconds"] = {name: asdict(summarise(seconds[name])) for name in calls}
    row["operations_per_second"] = asdict(summarise(rate))
    row["ceiling_operations_per_second"] = asdict(summarise(ceiling))
    row["ceiling_bytes_per_second"] = asdict(
        summarise([bandwidth.bytes / t for t in seconds[bandwidth.contender.name]])
    )
    row["share_of_ceiling"] = asdict(ratio(rate, ceiling))
    row["over_dpfast"] = {name: asdict(ratio(seconds[name], seconds[DPFAST])) for name in PEERS}
    row["norms_over_dpfast"] = asdict(ratio(seconds[NORMS], seconds[DPFAST]))
    return row


def run(
    device: torch.device, settings: Settings, on_row: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure all rows.

    Args:
      device: CPU or CUDA.
      settings: how much to measure.
      on_row: called before each row with its description, its number from 0 and the number of rows.

    Returns:
      What is saved, without the description of the machine.
    """
    chosen = cases(device.type, quick=settings.quick)
    bandwidth = Bandwidth(device, quick=settings.quick)
    rows = []
    for number, case in enumerate(chosen):
        on_row(case.label, number, len(chosen))
        rows.append(run_case(case, device, bandwidth, settings))
    return {"op": OP, "quick": settings.quick, "rows": rows}
