"""Any differentiable function that takes a parameter: torch.func on that function alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dpfast.errors import PrivacyError
from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import RuleCall
from dpfast.grad_sample._samples import samples_first

__all__ = ["generic"]


@dataclass(frozen=True)
class _Generic(RuleCall):
    collector: Collector
    function: Callable[..., Any]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]  # arguments that are no tensors; None where a tensor stands
    places: tuple[int, ...]  # of the tensors among the leaves
    targets: tuple[Target | None, ...]  # per tensor
    shared: tuple[bool, ...]  # per tensor: it belongs to no sample

    def run(self, tensors: Any) -> Any:
        """The function on other tensors in the same places."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    @property
    def names(self) -> str:
        """Of the parameters, for messages."""
        return ", ".join(target.name for target in self.targets if target is not None)

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        result = self.run(inputs)
        if not isinstance(result, torch.Tensor):
            raise NotImplementedError(
                f"per_sample_gradients: {self.names} is used in {self.function}, which returns "
                "more than one tensor and has no rule"
            )
        # A view of an input would have to be tracked as one.
        return result.clone() if result._is_view() else result, (*inputs, _row_sums(result))

    def backward(
        self, saved: Sequence[Any], grad_output: torch.Tensor, wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        batch_size, names = self.collector.batch_size, self.names
        *saved, row_sums = [tensor.detach() for tensor in saved]
        if batch_size == 0:
            for target in self.targets:
                if target is not None:
                    target.add(target.tensor.new_zeros((0, *target.tensor.shape)))
            return [
                torch.zeros_like(t) if want and target is None else None
                for t, want, target in zip(saved, wanted, self.targets, strict=True)
            ]
        varied = [place for place, want in enumerate(wanted) if want]
        rows, axes = [], []
        for tensor, target, shared in zip(saved, self.targets, self.shared, strict=True):
            of_samples = target is None and not shared and tensor.dim() > 0
            rows.append(samples_first(tensor, batch_size, 0, names) if of_samples else tensor)
            axes.append(0 if of_samples else None)

        def gradients(cotangent: torch.Tensor, *sample: torch.Tensor) -> Any:
            def partial(*values: torch.Tensor) -> Any:
                tensors = list(sample)
                for place, value in zip(varied, values, strict=True):
                    tensors[place] = value
                return self.run(tensors)

            vjp: Any = torch.func.vjp(partial, *[sample[place] for place in varied])
            result, pull = vjp
            if result.shape != cotangent.shape:
                raise PrivacyError(
                    f"per_sample_gradients: {names} is used in {self.function}, whose result for "
                    f"one sample has shape {tuple(result.shape)}, not {tuple(cotangent.shape)}: "
                    "the first axis must hold the samples"
                )
            return result, pull(cotangent)

        cotangents = samples_first(grad_output, batch_size, 0, names)
        try:
            with torch.enable_grad():
                again, grads = torch.func.vmap(gradients, in_dims=(0, *axes))(cotangents, *rows)
        except RuntimeError as error:
            if isinstance(error, PrivacyError):
                raise
            raise PrivacyError(
                f"per_sample_gradients: {names} is used in {self.function}, which cannot be run "
                "for one sample alone: the first axis of its tensors must hold the samples"
            ) from error
        found = _row_sums(again.detach().flatten(0, 1))
        if not torch.allclose(found, row_sums, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise PrivacyError(
                f"per_sample_gradients: {names} is used in {self.function}, which treats a sample "
                "differently alone than in the batch"
            )
        result: list[torch.Tensor | None] = [None] * len(saved)
        for place, grad in zip(varied, grads, strict=True):
            target = self.targets[place]
            if target is not None:
                target.add(grad)
            else:
                result[place] = (
                    grad.sum(0) if axes[place] is None else grad.reshape_as(saved[place])
                )
        return result


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """What tells whether a row is the same again, scaled to about 1."""
    if tensor.dim() == 0:
        return tensor.detach().clone()
    if tensor.numel() == 0:
        return tensor.new_zeros(len(tensor), dtype=torch.float32)
    rows = tensor.detach().flatten(1).float() if tensor.dim() > 1 else tensor.detach()[:, None]
    return rows.sum(1) / rows.abs().sum(1).max().clamp(min=1e-30)


def generic(
    collector: Collector, function: Callable[..., Any], args: Any, kwargs: Any
) -> torch.Tensor:
    """Call `function` so that its parameters get per-sample gradients.

    Its tensors must have the samples on their first axis, unless they are parameters, come from
    buffers alone or have no axes; the function must treat the samples alike and apart.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    tensors = [leaves[place] for place in places]
    call = _Generic(
        collector,
        function,
        spec,
        tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        places,
        tuple(collector.target_of(tensor) for tensor in tensors),
        tuple(collector.is_shared(tensor) for tensor in tensors),
    )
    return call(*tensors)
