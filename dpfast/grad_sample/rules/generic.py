"""Any differentiable function that takes a parameter: torch.func on that function alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from dpfast.errors import PrivacyError
from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample._function import quiet_backward
from dpfast.grad_sample._samples import samples_first

__all__ = ["generic"]


class _Call(NamedTuple):
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


class _Generic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        result = call.run(tensors)
        if not isinstance(result, torch.Tensor):
            names = ", ".join(t.name for t in call.targets if t is not None)
            raise NotImplementedError(
                f"per_sample_gradients: {names} is used in {call.function}, which returns more than "
                "one tensor and has no rule"
            )
        # A view would have to be tracked as one.
        return result.clone() if result._is_view() else result

    @quiet_backward
    def backward(ctx: Any, saved: Any, grad_output: torch.Tensor) -> Any:
        call: _Call = ctx.call
        batch_size = call.collector.batch_size
        names = ", ".join(t.name for t in call.targets if t is not None)
        wanted = [
            place
            for place, tensor in enumerate(saved)
            if call.targets[place] is not None or ctx.needs_input_grad[1 + place]
        ]
        if batch_size == 0:
            for target in call.targets:
                if target is not None:
                    target.add(target.tensor.new_zeros((0, *target.tensor.shape)))
            return (None, *[None if t is None else torch.zeros_like(t) for t in saved])
        rows = [
            tensor
            if call.targets[place] is not None or call.shared[place] or tensor.dim() == 0
            else samples_first(tensor, batch_size, 0, names)
            for place, tensor in enumerate(saved)
        ]
        of_sample = [row is not tensor for row, tensor in zip(rows, saved, strict=True)]

        def gradients(cotangent: torch.Tensor, *sample: torch.Tensor) -> Any:
            def partial(*varied: torch.Tensor) -> Any:
                tensors = list(sample)
                for place, tensor in zip(wanted, varied, strict=True):
                    tensors[place] = tensor
                return call.run(tensors)

            result, pull = torch.func.vjp(partial, *[sample[place] for place in wanted])
            if result.shape != cotangent.shape:
                raise PrivacyError(
                    f"per_sample_gradients: {names} is used in {call.function}, whose result for one "
                    f"sample has shape {tuple(result.shape)}, not {tuple(cotangent.shape)}: the "
                    "first axis must hold the samples"
                )
            return pull(cotangent)

        cotangents = samples_first(grad_output, batch_size, 0, names)
        axes = (0, *[0 if own else None for own in of_sample])
        with torch.enable_grad():
            grads = torch.func.vmap(gradients, in_dims=axes, randomness="error")(cotangents, *rows)
        result: list[torch.Tensor | None] = [None] * len(saved)
        for place, grad in zip(wanted, grads, strict=True):
            target = call.targets[place]
            if target is not None:
                target.add(grad)
            elif of_sample[place]:
                result[place] = grad.reshape(saved[place].shape)
            else:
                result[place] = grad.sum(0)
        return (None, *result)


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
    call = _Call(
        collector,
        function,
        spec,
        tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        places,
        tuple(collector.target_of(tensor) for tensor in tensors),
        tuple(collector.is_shared(tensor) for tensor in tensors),
    )
    result = _Generic.apply(call, *tensors)
    assert isinstance(result, torch.Tensor)
    return result
