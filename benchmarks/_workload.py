"""The gradients and settings of one row of the clip_and_noise benchmark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["MAX_GRAD_NORM", "NOISE_MULTIPLIER", "Case", "Workload", "uneven_sizes"]

MAX_GRAD_NORM = 1.0
NOISE_MULTIPLIER = 1.1
_SEED = 20240607
# Half of a network's tensors are biases and scales of normalisation layers.
_BIAS_SIZES = (16, 1024)
_WEIGHT_SPREAD = 1.5  # of the logarithm of the weights' sizes

Mechanism = Literal["gaussian", "laplace"]


@dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
      mebibytes: size of all per-sample gradients together, 2^20 bytes each.
      batch_size: B.
      num_tensors: over how many tensors the gradients are spread.
      dtype: the gradients' type, by its name in torch.
      rule: clipping rule, "flat" or "automatic".
      mechanism: noise; Laplace noise goes with an L1 clip.
      given_norms: whether the norms are known, so that the gradients are read once.
      rows_per_unit: rows of one privacy unit; 1 stands for no privacy_unit_ids.
    """

    mebibytes: int
    batch_size: int
    num_tensors: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    rule: Literal["flat", "automatic"] = "flat"
    mechanism: Mechanism = "gaussian"
    given_norms: bool = False
    rows_per_unit: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The gradients' type."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def grad_bytes(self) -> int:
        """Size of the per-sample gradients."""
        return self.mebibytes * 2**20

    @property
    def num_params(self) -> int:
        """P, elements of one sample's gradient."""
        return self.grad_bytes // self.torch_dtype.itemsize // self.batch_size

    @property
    def num_units(self) -> int:
        """Number of privacy units in the batch."""
        return self.batch_size // self.rows_per_unit

    @property
    def norm_order(self) -> int:
        """Order of the norm that is clipped."""
        return 1 if self.mechanism == "laplace" else 2

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move: the gradients once per pass over them, the float32 output once."""
        passes = 1 if self.given_norms else 2
        return passes * self.grad_bytes + 4 * self.num_params

    @property
    def working_bytes(self) -> int:
        """Memory for the row without Opacus: gradients, outputs, float64 answers and noise."""
        return self.grad_bytes + 48 * self.num_params + 2**29

    @property
    def label(self) -> str:
        """The row in words."""
        return f"{self.mebibytes} MiB, B = {self.batch_size}, {self.variant}"

    @property
    def variant(self) -> str:
        """What differs from flat clipping of float32 gradients with Gaussian noise."""
        parts = [
            self.dtype if self.dtype != "float32" else "",
            self.rule if self.rule != "flat" else "",
            self.mechanism if self.mechanism != "gaussian" else "",
            "norms given" if self.given_norms else "",
            f"{self.rows_per_unit} rows a unit" if self.rows_per_unit > 1 else "",
        ]
        return ", ".join(part for part in parts if part) or "flat"


def uneven_sizes(total: int, count: int) -> list[int]:
    """Sizes of `count` tensors with `total` elements: every other one a small bias."""
    if count == 1:
        return [total]
    generator = random.Random(_SEED)
    num_biases = count // 2
    biases = [generator.randint(*_BIAS_SIZES) for _ in range(num_biases)]
    # Where little is to be had, the biases shrink with it.
    shrink = min(1.0, total / 4 / sum(biases))
    biases = [max(1, int(size * shrink)) for size in biases]
    left = total - sum(biases)
    shares = [generator.lognormvariate(0.0, _WEIGHT_SPREAD) for _ in range(count - num_biases)]
    weights = [max(1, int(left * share / sum(shares))) for share in shares]
    weights[weights.index(max(weights))] += left - sum(weights)
    sizes = [0] * count
    sizes[0::2], sizes[1::2] = weights, biases
    return sizes


class Workload:
    """Random gradients of a case on a device, with norms on both sides of the bound.

    Attributes:
      grads: one (B, P_k) per tensor.
      out: one float32 (P_k,) per tensor, where contenders write that can.
      unit_ids: int64 (B,) in random order, or None without privacy units.
      unit_means: float64 (units, B), row u holds 1/rows at the rows of unit u; None without.
      norms: float64 (units,), exact up to float64 rounding.
      expected: float64 (P_k,) per tensor, the noiseless mean over units.
      scale: float64 (P_k,) per tensor, the same with absolute values: what errors are relative to.
    """

    # Columns that are taken to float64 at a time, so that checking needs little memory.
    _chunk_elements = 2**24

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        generator = torch.Generator(device).manual_seed(_SEED)
        self.sizes = uneven_sizes(case.num_params, case.num_tensors)
        # Expected norm of one standard normal row, over all tensors; averaging m rows of a unit
        # divides it by about sqrt(m).
        per_row = (
            math.sqrt(case.num_params)
            if case.norm_order == 2
            else case.num_params * math.sqrt(2 / math.pi)
        ) / math.sqrt(case.rows_per_unit)
        spread = torch.rand(case.batch_size, 1, generator=generator, device=device)
        factors = MAX_GRAD_NORM * torch.exp2(4 * spread - 2) / per_row
        self.grads = []
        for size in self.sizes:
            grad = torch.randn(
                case.batch_size, size, generator=generator, device=device, dtype=case.torch_dtype
            )
            self.grads.append(grad.mul_(factors.to(case.torch_dtype)))
        self.out = [torch.zeros(size, device=device) for size in self.sizes]
        self.unit_ids: torch.Tensor | None = None
        self.unit_means: torch.Tensor | None = None
        if case.rows_per_unit > 1:
            order = torch.randperm(case.batch_size, generator=generator, device=device)
            self.unit_ids = order // case.rows_per_unit
            units = torch.arange(case.num_units, device=device)
            member = (units[:, None] == self.unit_ids).double()
            self.unit_means = member / member.sum(1, keepdim=True)
        self.norms = self._norms()
        weights = self._weights()
        self.expected, self.scale = [], []
        for grad in self.grads:
            sums, scales = [], []
            for unit_rows in self._chunks(grad):
                sums.append(weights @ unit_rows)
                scales.append(weights @ unit_rows.abs())
            self.expected.append(torch.cat(sums))
            self.scale.append(torch.cat(scales))

    @property
    def divisor(self) -> int:
        """The expected batch size that the sum is divided by."""
        return self.case.num_units

    def _chunks(self, grad: torch.Tensor) -> Iterator[torch.Tensor]:
        """The units' rows in float64, (units, columns) at a time."""
        width = max(1, self._chunk_elements // self.case.batch_size)
        for columns in torch.split(grad, width, dim=1):
            rows = columns.double()
            yield rows if self.unit_means is None else self.unit_means @ rows

    def _norms(self) -> torch.Tensor:
        order = self.case.norm_order
        total = torch.zeros(self.case.num_units, dtype=torch.float64, device=self.device)
        for grad in self.grads:
            for unit_rows in self._chunks(grad):
                total += torch.linalg.vector_norm(unit_rows, ord=order, dim=1) ** order
        return total ** (1 / order)

    def _weights(self) -> torch.Tensor:
        if self.case.rule == "automatic":
            weights = MAX_GRAD_NORM / (self.norms + 0.01)
        else:
            weights = (MAX_GRAD_NORM / self.norms).clamp(max=1.0)
        return weights / self.divisor
