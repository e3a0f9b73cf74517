"""`per_sample_gradients`: the context in which a backward pass keeps the samples apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from dpfast.errors import PrivacyError
from dpfast.grad_sample._collector import Collector
from dpfast.grad_sample._interception import Interception
from dpfast.grad_sample.batchnorm import refuse_mixing_layers

__all__ = ["PerSampleGradients", "per_sample_gradients"]

_NAME = "per_sample_gradients"


class PerSampleGradients(Mapping[str, torch.Tensor]):
    """Per-sample gradients by parameter name: each (B, *param.shape), in the parameter's dtype.

    Usable as a context manager once; a mapping from the backward pass on, which `clip_and_noise`
    takes as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_mixing_layers(model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError(f"{_NAME}: the model must have a parameter that requires grad")
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self._collector = Collector(params, [*model.buffers(), *frozen])
        self._grads_before = {name: _state_of(p.grad) for name, p in params.items()}
        self._mode: Interception | None = None
        self._result: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> PerSampleGradients:
        if self._mode is not None:
            raise RuntimeError(f"{_NAME}: a context must not be entered twice")
        self._mode = Interception(self._collector, self._check_loss)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._mode is not None
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None:
            self._finish()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._finish()[name]

    def __iter__(self) -> Iterator[str]:
        return iter([target.name for target in self._collector.params])

    def __len__(self) -> int:
        return len(self._collector.params)

    def _check_loss(self, loss: torch.Tensor, gradient: Any) -> torch.Tensor:
        """Refuse what is not one loss per sample; return the gradient to start with."""
        self._result = None
        if self._collector.target_of(loss) is not None:
            raise PrivacyError(
                f"{_NAME}: the loss depends on no sample, only on what the model itself creates"
            )
        if loss.dim() == 1:
            self._collector.set_batch_size(loss.shape[0])
            if gradient is None:
                return torch.ones_like(loss)
            start: torch.Tensor = gradient
            return start
        # The sum of a vector is as good: the vector's length stands in the graph.
        node = loss.grad_fn
        sizes = getattr(node, "_saved_self_sym_sizes", None)
        is_sum = loss.dim() == 0 and type(node).__name__ == "SumBackward0"
        if not is_sum or sizes is None or len(sizes) != 1:
            raise PrivacyError(
                f"{_NAME}: backward needs the per-sample loss of shape (B,) or its sum, got shape "
                f"{tuple(loss.shape)} from {type(node).__name__}; dpfast.per_sample_loss(loss) "
                "adapts MONAI's losses"
            )
        self._collector.set_batch_size(int(sizes[0]))
        return torch.ones_like(loss) if gradient is None else gradient

    @staticmethod
    def _unseen(name: str) -> str:
        return (
            f"{_NAME}: {name} got a gradient that mixes the samples, through a function that torch "
            "cannot intercept (a custom autograd.Function, reentrant checkpointing?)"
        )

    def _finish(self) -> dict[str, torch.Tensor]:
        if self._result is not None:
            return self._result
        collector = self._collector
        if not collector.saw_loss:
            raise RuntimeError(
                f"{_NAME}: there are no gradients before backward was called on the per-sample "
                "loss inside the context"
            )
        with torch._C.DisableTorchFunction():
            collector.pull_back()
        for computed in collector.computed:
            if computed.tensor.grad is not None:
                raise PrivacyError(self._unseen(computed.name))
        for target in collector.params:
            if _state_of(target.tensor.grad) != self._grads_before[target.name]:
                raise PrivacyError(self._unseen(target.name))
            if target.grad_sample is None:
                raise PrivacyError(
                    f"{_NAME}: {target.name} requires grad but got no per-sample gradient; freeze "
                    "it (requires_grad_(False)) if it takes no part"
                )
        self._result = {}
        for target in collector.params:
            assert target.grad_sample is not None
            if target.grad_sample.shape[0] != collector.batch_size:
                raise PrivacyError(
                    f"{_NAME}: {target.name} got gradients of {target.grad_sample.shape[0]} "
                    f"samples, the loss has {collector.batch_size}"
                )
            self._result[target.name] = target.grad_sample
        return self._result


def _state_of(grad: torch.Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), grad._version)


def per_sample_gradients(model: nn.Module) -> PerSampleGradients:
    """Compute every sample's own gradient in an ordinary forward and backward pass.

        with dpfast.per_sample_gradients(model) as grads:
            loss = per_sample_loss(model(images), targets)  # (B,)
            loss.sum().backward()
        noisy = dpfast.clip_and_noise(grads, max_grad_norm=1.0, noise_multiplier=1.1)

    The model is not wrapped, hooked or renamed, and no `.grad` is written. Frozen and shared
    parameters, functional use of weights, in-place activations, checkpointing, autocast and
    several forward passes before one backward pass work.

    Args:
      model: samples must not influence one another: layers that take statistics over the batch are
        refused.

    Returns:
      A context manager that yields a mapping from the names of the parameters that require grad
      to per-sample gradients (B, *param.shape), in the order of `model.named_parameters()`.

    Raises:
      ValueError: nothing in the model requires grad.
      PrivacyError: a layer mixes the samples (on entry); the loss is not one number per sample, a
        parameter got no per-sample gradient, or one got a gradient past the interception (at the
        backward pass or on leaving the context).
    """
    return PerSampleGradients(model)
