"""Where the rules leave per-sample gradients, and which tensors they owe one for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dpfast.errors import PrivacyError

__all__ = ["Collector", "Target"]


@dataclass(eq=False)
class Target:
    """A tensor whose per-sample gradient is wanted: a parameter, or one computed from parameters.

    Attributes:
      name: the parameter's name; of a computed tensor the names it comes from.
      tensor: the tensor itself; of a computed one a leaf with the same values, so that no backward
        pass runs past it. Held, so that its id is not given to another.
      output: the computed tensor with its graph; None for a parameter.
      sources: the targets that a computed tensor comes from; empty for a parameter.
      grad_sample: (B, *shape) so far.
    """

    name: str
    tensor: torch.Tensor
    output: torch.Tensor | None = None
    sources: tuple[Target, ...] = ()
    grad_sample: torch.Tensor | None = None

    def add(self, grad_sample: torch.Tensor) -> None:
        """Add (B, *shape), in the tensor's own dtype."""
        grad_sample = grad_sample.to(self.tensor.dtype)
        if grad_sample.shape[1:] != self.tensor.shape:
            raise RuntimeError(
                f"per_sample_gradients: {self.name} got per-sample gradients of shape "
                f"{tuple(grad_sample.shape)}"
            )
        # Out of place: a rule may have passed an expanded tensor.
        self.grad_sample = (
            grad_sample if self.grad_sample is None else self.grad_sample + grad_sample
        )


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
