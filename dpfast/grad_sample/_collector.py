"""Where the rules leave per-sample gradients, and which tensors they owe one for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dpfast.errors import PrivacyError
from dpfast.grad_sample._deferred import LayerGradient
from dpfast.grad_sample._routes import RouteKeeper
from dpfast.grad_sample._target import Target

__all__ = ["Collector", "Target"]


class Collector:
    """The targets of one context, by the identity of their tensors.

    Args:
      params: the trainable parameters by name.
      constants: the model's buffers and frozen parameters. What is computed from them and
        parameters alone belongs to no sample.
    """

    def __init__(
        self, params: Mapping[str, torch.nn.Parameter], constants: Iterable[torch.Tensor]
    ) -> None:
        self.routes = RouteKeeper()
        self.params = [Target(name, param) for name, param in params.items()]
        self._targets = {id(target.tensor): target for target in self.params}
        self.computed: list[Target] = []
        self._shared = {id(tensor): tensor for tensor in constants}
        self._batch_size: int | None = None
        # Inside attention the samples are on the second axis, of this length: (L, rows, E).
        self.attention_rows: int | None = None

    @property
    def batch_size(self) -> int:
        """B, known from the loss on."""
        if self._batch_size is None:
            raise PrivacyError(
                "per_sample_gradients: backward must be called on the per-sample loss of shape "
                "(B,) or its sum, inside the context"
            )
        return self._batch_size

    def set_batch_size(self, size: int) -> None:
        """The length of the loss; the same for all backward calls in a context."""
        if self._batch_size not in (None, size):
            raise PrivacyError(
                f"per_sample_gradients: every loss in one context must have the same length, got "
                f"{self._batch_size} and {size}"
            )
        self._batch_size = size

    @property
    def sample_axis(self) -> int:
        """Axis of the samples in the calls that are being made."""
        return 0 if self.attention_rows is None else 1

    @property
    def saw_loss(self) -> bool:
        """Whether a backward has begun."""
        return self._batch_size is not None

    def target_of(self, value: object) -> Target | None:
        """The target of a tensor, if it is one."""
        return self._targets.get(id(value))

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor comes from constants alone and so belongs to no sample."""
        return id(tensor) in self._shared

    def mark_shared(self, tensor: torch.Tensor) -> None:
        """Note that a tensor was computed from constants alone."""
        self._shared[id(tensor)] = tensor

    def mark_computed(self, output: torch.Tensor, used: Iterable[Target]) -> torch.Tensor:
        """Note that a tensor was computed, by ordinary autograd, from targets alone.

        Returns:
          A leaf to use in its place.
        """
        sources = tuple({id(target): target for target in used}.values())
        name = ", ".join(dict.fromkeys(source.name for source in sources))
        target = Target(name, output.detach().requires_grad_(), output, sources)
        self._targets[id(target.tensor)] = target
        self.computed.append(target)
        return target.tensor

    def release(self) -> None:
        """Let go of all gradients; whoever wants them holds them."""
        for target in (*self.params, *self.computed):
            target.grad_sample = target.deferred = target.square_norms = None
        self.computed.clear()
        self.routes.tracker = None

    def take(self, target: Target, gradient: LayerGradient) -> None:
        """Keep or defer the gradient of one use of a weight."""
        self.routes.take(target, gradient)

    def pull_back(self) -> None:
        """Turn the per-sample gradients of computed tensors into those of their parameters."""
        for target in reversed(self.computed):
            if target.grad_sample is None or target.output is None:
                continue
            if self.batch_size == 0:
                for source in target.sources:
                    source.add(source.tensor.new_zeros((0, *source.tensor.shape)))
                continue
            grads = torch.autograd.grad(
                target.output,
                [source.tensor for source in target.sources],
                target.grad_sample,
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
            target.grad_sample = None
            for source, grad in zip(target.sources, grads, strict=True):
                if grad is not None:
                    source.add(grad)
