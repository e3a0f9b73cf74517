"""Gradients of convolutions and linear layers, by what they are computed from."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dpfast.grad_sample._samples import samples_first
from dpfast.ops._precision import full_float32
from dpfast.ops.conv_grad import conv_grad, product
from dpfast.ops.conv_grad_sample import ConvSettings, conv_grad_sample, conv_square_norms
from dpfast.ops.deferred import DeferredGradient
from dpfast.ops.ghost_norms import ghost_square_norms

__all__ = ["ConvGradient", "LayerGradient", "LinearGradient"]

_FORMED_BYTES = 4 << 20  # of a few samples' gradients, formed for their norms


@contextmanager
def _plain() -> Iterator[None]:
    """No graph, and no mode that looks at every call."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def _rounded_down(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 weights >= 0 in a dtype; a weight rounded up would exceed the bound."""
    rounded = weights.to(dtype)
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double() > weights, below, rounded)


class LayerGradient(DeferredGradient):
    """The gradient of one use of a weight.

    Args:
      name: of the parameter.
      weight: the parameter.
      batch_size: B.
      x: the layer's input.
      grad_output: gradient of the layer's output.
    """

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        batch_size: int,
        x: torch.Tensor,
        grad_output: torch.Tensor,
    ) -> None:
        self.name = name
        self.shape = torch.Size((batch_size, *weight.shape))
        self.dtype, self.device = weight.dtype, x.device
        # Detached, or the whole graph before the layer would be held.
        self._x, self._grad_output = x.detach(), grad_output.detach()
        self._versions = x._version, grad_output._version
        self._squares: torch.Tensor | None = None
        self.note_seconds: Callable[[float], None] = lambda _: None

    @property
    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What must stay in memory while the gradient is not formed."""
        self.check()
        return self._x, self._grad_output

    def check(self) -> None:
        """See DeferredGradient."""
        if (self._x._version, self._grad_output._version) != self._versions:
            raise RuntimeError(
                f"per_sample_gradients: what the gradient of {self.name} is computed from has been "
                "changed in place since the backward pass"
            )

    @property
    def held_storages(self) -> dict[int, int]:
        """Address and bytes of the memory behind these."""
        storages = (self._x.untyped_storage(), self._grad_output.untyped_storage())
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def measure(self, *, ghost: bool) -> None:
        """Take the norms, which square_norms then returns."""
        with _plain(), full_float32(self.device):
            self._squares = self._ghost_norms() if ghost else self._direct_norms()

    def square_norms(self) -> torch.Tensor:
        """See DeferredGradient."""
        if self._squares is None:
            self.measure(ghost=False)
        assert self._squares is not None
        return self._squares

    def form_measured(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient, and its squared norms where they come out of the same pass."""
        with _plain():
            return self._form()

    def form(self) -> torch.Tensor:
        """See DeferredGradient."""
        return self.form_measured()[0]

    def weighted_sum(
        self, weights: torch.Tensor, out: torch.Tensor | None, *, accumulate: bool
    ) -> torch.Tensor:
        """See DeferredGradient."""
        start = time.perf_counter()
        with _plain(), full_float32(self.device):
            x, grad_output = self._weighted(weights)
            total = self._sum(x, grad_output, out, accumulate).to(self.dtype)
        self.note_seconds(time.perf_counter() - start)
        return total

    def _weighted(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held, by sample, the gradients weighted and dropped samples zero."""
        x, grad_output = self._wide(*self._by_sample())
        column = _rounded_down(weights, grad_output.dtype)
        column = column.reshape(-1, *[1] * (grad_output.dim() - 1))
        grad_output = grad_output * column
        dropped = column == 0.0
        if self.device.type == "cuda" or bool(dropped.any()):
            # 0 * NaN is NaN.
            grad_output = grad_output.masked_fill_(dropped, 0.0)
            x = x.masked_fill(dropped.reshape(-1, *[1] * (x.dim() - 1)), 0.0)
        return x, grad_output

    @staticmethod
    def _wide(x: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In float32 at least: norms and sums must be of the same gradients."""
        if grad_output.dtype in (torch.float32, torch.float64):
            return x, grad_output
        return x.float(), grad_output.float()

    @property
    @abstractmethod
    def can_ghost(self) -> bool:
        """Whether there are norms from inner products."""

    @property
    @abstractmethod
    def positions(self) -> tuple[int, int]:
        """Of the anchor and the moving tensor, per sample; see csrc/math/conv_grad.h."""

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """Likewise."""

    @property
    @abstractmethod
    def taps(self) -> int:
        """Pairs of positions that each anchor position is part of."""

    @abstractmethod
    def _form(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See form_measured."""

    @abstractmethod
    def _by_sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The held tensors with samples on the first axis."""

    @abstractmethod
    def _sum(
        self,
        x: torch.Tensor,
        grad_output: torch.Tensor,
        out: torch.Tensor | None,
        accumulate: bool,
    ) -> torch.Tensor:
        """The ordinary gradient of the weight, written or added."""

    @abstractmethod
    def _direct_norms(self) -> torch.Tensor: ...

    @abstractmethod
    def _ghost_norms(self) -> torch.Tensor: ...


class ConvGradient(LayerGradient):
    """Of a convolution: x (B, C, *spatial), grad_output (B, K, *positions)."""

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        x: torch.Tensor,
        grad_output: torch.Tensor,
        settings: ConvSettings,
    ) -> None:
        super().__init__(name, weight, x.shape[0], x, grad_output)
        self._settings = settings
        self.bias: torch.Tensor | None = None  # (B, K), once form has found it

    def _form(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        grads = conv_grad_sample(*self.held, self.shape[1:], self._settings)
        self.bias = grads.bias
        same = grads.weight.dtype == self.dtype
        return grads.weight.to(self.dtype), grads.square_norms if same else None

    @property
    def can_ghost(self) -> bool:
        """See LayerGradient."""
        return self._settings.groups == 1

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, grad_output = self._x, self._grad_output
        return (x, grad_output) if self._settings.transposed else (grad_output, x)

    @property
    def positions(self) -> tuple[int, int]:
        """See LayerGradient."""
        anchor, moving = self._ends()
        return anchor.shape[2:].numel(), moving.shape[2:].numel()

    @property
    def channels(self) -> tuple[int, int]:
        """See LayerGradient."""
        anchor, moving = self._ends()
        return anchor.shape[1], moving.shape[1]

    @property
    def taps(self) -> int:
        """See LayerGradient."""
        return self.shape[3:].numel()

    def _by_sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.held

    def _sum(
        self,
        x: torch.Tensor,
        grad_output: torch.Tensor,
        out: torch.Tensor | None,
        accumulate: bool,
    ) -> torch.Tensor:
        shape = self.shape[1:]
        return conv_grad(x, grad_output, shape, self._settings, out, accumulate=accumulate)

    def _direct_norms(self) -> torch.Tensor:
        return conv_square_norms(*self._wide(*self.held), self.shape[1:], self._settings)

    def _ghost_norms(self) -> torch.Tensor:
        self.check()
        return ghost_square_norms(
            *self._ends(),
            kernel=self.shape[3:],
            stride=self._settings.stride,
            padding=self._settings.padding,
            dilation=self._settings.dilation,
        )


class LinearGradient(LayerGradient):
    """Of a linear layer: x (..., d) and grad_output (..., p), with the samples on one axis."""

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        batch_size: int,
        x: torch.Tensor,
        grad_output: torch.Tensor,
        sample_axis: int,
    ) -> None:
        super().__init__(name, weight, batch_size, x, grad_output)
        self._sample_axis = sample_axis

    def _form(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, grad_output = self._by_sample()
        return (grad_output.transpose(1, 2) @ x).to(self.dtype), None

    @property
    def can_ghost(self) -> bool:
        """See LayerGradient."""
        return True

    @property
    def positions(self) -> tuple[int, int]:
        """See LayerGradient."""
        count = self._x.shape[:-1].numel() // self.shape[0]
        return count, count

    @property
    def channels(self) -> tuple[int, int]:
        """See LayerGradient."""
        return self._grad_output.shape[-1], self._x.shape[-1]

    @property
    def taps(self) -> int:
        """See LayerGradient."""
        return 1

    def _by_sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, all positions of a sample, features)."""
        first, second = (
            samples_first(t, self.shape[0], self._sample_axis, self.name).flatten(1, -2)
            for t in self.held
        )
        return first, second

    def _sum(
        self,
        x: torch.Tensor,
        grad_output: torch.Tensor,
        out: torch.Tensor | None,
        accumulate: bool,
    ) -> torch.Tensor:
        first, second = grad_output.flatten(0, 1).t(), x.flatten(0, 1)
        return product(first, second, self.shape[1:], out, accumulate=accumulate)

    def _direct_norms(self) -> torch.Tensor:
        x, grad_output = self._wide(*self._by_sample())
        chunk = max(1, _FORMED_BYTES // max(1, 4 * self.shape[1:].numel()))
        squares = [
            (grad_output[i : i + chunk].transpose(1, 2) @ x[i : i + chunk])
            .flatten(1)
            .double()
            .square()
            .sum(1)
            for i in range(0, self.shape[0], chunk)
        ]
        return torch.cat(squares)

    def _ghost_norms(self) -> torch.Tensor:
        x, grad_output = self._by_sample()
        return ghost_square_norms(
            grad_output.transpose(1, 2),
            x.transpose(1, 2),
            kernel=[1],
            stride=[1],
            padding=[0],
            dilation=[1],
        )
