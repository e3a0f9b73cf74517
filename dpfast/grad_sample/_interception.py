"""Sees every call of a torch function and sends those that take a parameter to a rule."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dpfast.errors import PrivacyError
from dpfast.grad_sample._checkpointing import watch_reentrant, watch_saved_tensor_hooks
from dpfast.grad_sample._collector import Collector, Target
from dpfast.grad_sample.rules import RULES, generic

__all__ = ["Interception"]


def _unguarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch without its own test for overrides, so that its calls are seen."""
    assert isinstance(function, types.FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attention = _unguarded(F.multi_head_attention_forward)


class Interception(TorchFunctionMode):
    """The mode that is on inside `per_sample_gradients`.

    Args:
      collector: what the rules fill.
      check_loss: called with the arguments of Tensor.backward; returns the gradient to start with.
      see_first_layer: called once, if given, with the name of the first parameter that meets
        samples, and with their tensor.
    """

    def __init__(
        self,
        collector: Collector,
        check_loss: Callable[[torch.Tensor, Any], torch.Tensor],
        see_first_layer: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._collector = collector
        self._check_loss = check_loss
        self._see_first_layer = see_first_layer
        self._again = False  # whether a forward pass is run again

    @contextmanager
    def _seen_again(self) -> Iterator[None]:
        before, self._again = self._again, True
        try:
            with self:
                yield
        finally:
            self._again = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        _refuse_batch_statistics(func, args, kwargs)
        tensors = _tensors_in(args, kwargs)
        used = [t for t in map(self._collector.target_of, tensors) if t is not None]
        if used and self._see_first_layer is not None:
            samples = [t for t in tensors if not self._is_constant(t)]
            if samples:
                self._see_first_layer(used[0].name, samples[0])
                self._see_first_layer = None
        if not used or not torch.is_grad_enabled():
            if used:
                watch_reentrant(self._seen_again)
            result = func(*args, **kwargs)
            # A call without tensors makes a constant, if it is the model that makes it.
            if all(map(self._collector.is_shared, tensors)) and (
                tensors or self._again or _inside_a_module()
            ):
                for tensor in _tensors_in((result,), {}):
                    self._collector.mark_shared(tensor)
            return result
        if not self._again:
            watch_saved_tensor_hooks(", ".join(t.name for t in used), self._seen_again)
        collector = self._collector
        if all(map(self._is_constant, tensors)):
            # No sample takes part: ordinary autograd follows, up to where one does.
            # Its graph is walked once more at the end, when checkpointing is over.
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                result = func(*args, **kwargs)
            return pytree.tree_map_only(torch.Tensor, lambda t: self._computed(t, used), result)
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        if func in RULES and collector.target_of(tensors[0]) is None:
            return RULES[func](collector, *args, **kwargs)
        return self._other(func, args, kwargs, used)

    def _is_constant(self, tensor: torch.Tensor) -> bool:
        collector = self._collector
        return collector.target_of(tensor) is not None or collector.is_shared(tensor)

    def _other(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        used: Sequence[Target],
    ) -> Any:
        collector = self._collector
        if collector.sample_axis != 0:
            names = ", ".join(target.name for target in used)
            raise NotImplementedError(
                f"per_sample_gradients: {names} is used inside attention in {func}, which has no "
                "rule there"
            )
        plain = _out_of_place(func)
        if plain is None:
            return generic(collector, func, args, kwargs)
        changed = args[0]
        if collector.target_of(changed) is not None:
            raise NotImplementedError(
                f"per_sample_gradients: {used[0].name} is changed in place by {func}"
            )
        return changed.copy_(generic(collector, plain, (changed.clone(), *args[1:]), kwargs))

    def _computed(self, tensor: torch.Tensor, used: Sequence[Target]) -> torch.Tensor:
        if not tensor.requires_grad or self._collector.target_of(tensor) is not None:
            return tensor
        return self._collector.mark_computed(tensor, used)

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        if self._collector.attention_rows is not None:
            raise NotImplementedError("per_sample_gradients: attention inside attention")
        query = args[0] if args else kwargs["query"]
        if query.dim() != 3:
            raise ValueError(
                "per_sample_gradients: multi-head attention needs inputs with a sample axis, got "
                f"shape {tuple(query.shape)}"
            )
        self._collector.attention_rows = query.shape[1]
        try:
            with self:
                return _attention(*args, **kwargs)
        finally:
            self._collector.attention_rows = None

    def _backward(
        self,
        loss: torch.Tensor,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if create_graph:
            raise ValueError("per_sample_gradients: create_graph is not supported")
        start = self._check_loss(loss, gradient)
        torch.autograd.backward(loss, start, retain_graph, inputs=inputs)


def _tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for value in [*args, *kwargs.values()]:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _out_of_place(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that returns what an in-place function of a tensor writes, None for others."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i") and name.endswith("__") and hasattr(torch.Tensor, f"__{name[3:]}"):
        other: Callable[..., Any] = getattr(torch.Tensor, f"__{name[3:]}")
        return other
    if name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name[:-1]):
        other = getattr(torch.Tensor, name[:-1])
        return other
    return None


def _inside_a_module() -> bool:
    """Whether the present call comes from a module's forward."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is torch.nn.Module._call_impl.__code__:
            return True
    return False


def _refuse_batch_statistics(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Statistics over the batch, that no module announced, e.g. in functional use."""
    if func in (F.batch_norm, torch.batch_norm):
        training = kwargs.get("training", args[5] if len(args) > 5 else False)
        if training:
            raise PrivacyError(
                "per_sample_gradients: batch_norm in training mode mixes the samples; "
                "dpfast.replace_batchnorm(model) turns BatchNorm into GroupNorm"
            )
    elif func is F.instance_norm:
        running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        if running is not None and kwargs.get(
            "use_input_stats", args[5] if len(args) > 5 else True
        ):
            raise PrivacyError(
                "per_sample_gradients: instance_norm must not update running statistics, which "
                "would publish the batch's"
            )
