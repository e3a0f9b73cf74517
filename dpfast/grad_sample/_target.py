"""A tensor whose per-sample gradient is wanted, and what is known of that gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpfast.grad_sample._deferred import LayerGradient

__all__ = ["Target"]


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
      deferred: the gradient so far where it is not formed.
      square_norms: of grad_sample, with the version of it that they belong to.
    """

    name: str
    tensor: torch.Tensor
    output: torch.Tensor | None = None
    sources: tuple[Target, ...] = ()
    grad_sample: torch.Tensor | None = None
    deferred: LayerGradient | None = None
    square_norms: tuple[torch.Tensor, int] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.grad_sample is None and self.deferred is None

    def form(self) -> None:
        """Form what is deferred."""
        if self.deferred is not None:
            self.grad_sample, self.deferred = self.deferred.form(), None

    def add(self, grad_sample: torch.Tensor, square_norms: torch.Tensor | None = None) -> None:
        """Add (B, *shape), in the tensor's own dtype."""
        self.form()
        grad_sample = grad_sample.to(self.tensor.dtype)
        if grad_sample.shape[1:] != self.tensor.shape:
            raise RuntimeError(
                f"per_sample_gradients: {self.name} got per-sample gradients of shape "
                f"{tuple(grad_sample.shape)}"
            )
        if self.grad_sample is None:
            self.grad_sample = grad_sample
            if square_norms is not None:
                self.square_norms = square_norms, grad_sample._version
        else:
            # Out of place: a rule may have passed an expanded tensor.
            self.grad_sample = self.grad_sample + grad_sample
            self.square_norms = None
