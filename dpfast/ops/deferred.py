"""Per-sample gradients that are not formed: what `clip_and_noise` asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

__all__ = ["DeferredGradient", "GradientStore"]


class DeferredGradient(ABC):
    """One parameter's per-sample gradient (B, *shape), known by what it is computed from.

    Attributes:
      shape: (B, *param.shape), B >= 1.
      dtype: of the parameter and of the sum, float32 or float64.
      device: of the tensors that it is computed from.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def check(self) -> None:
        """Raise RuntimeError where what it is computed from has changed since."""

    @abstractmethod
    def form(self) -> torch.Tensor:
        """The gradient itself (B, *param.shape)."""

    @abstractmethod
    def square_norms(self) -> torch.Tensor:
        """The samples' squared L2 norms (B,), float64, never below the true ones in arithmetic."""

    @abstractmethod
    def weighted_sum(
        self, weights: torch.Tensor, out: torch.Tensor | None, *, accumulate: bool
    ) -> torch.Tensor:
        """The sum over the samples of weight times gradient, (*param.shape,).

        Args:
          weights: (B,) float64. What a sample of weight 0 holds, NaN and Inf included, has no
            part in the sum.
          out: where it goes, of the gradient's dtype; None: a new, contiguous tensor.
          accumulate: add to what `out` holds.
        """

    def stand_in(self) -> torch.Tensor:
        """A tensor of the gradient's shape, dtype and device that takes no memory."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


class GradientStore(Mapping[str, torch.Tensor], ABC):
    """A mapping to per-sample gradients, some of them deferred: looked up, these are formed."""

    @abstractmethod
    def parts(self) -> dict[str, torch.Tensor | DeferredGradient]:
        """What is held, by name."""

    @abstractmethod
    def square_norms(self, name: str) -> torch.Tensor | None:
        """(B,) float64 of a gradient that is held and unchanged since, where they are known."""
