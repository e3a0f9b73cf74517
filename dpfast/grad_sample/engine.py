"""`per_sample_gradients`: the context in which a backward pass keeps the samples apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.grad_sample._budget import Budget, checked_budget
from dpfast.grad_sample._collector import Collector
from dpfast.grad_sample._deferred import LayerGradient
from dpfast.grad_sample._interception import Interception
from dpfast.grad_sample.batchnorm import refuse_mixing_layers
from dpfast.grad_sample.planner import Plan, Route
from dpfast.ops.deferred import DeferredGradient, GradientStore

__all__ = ["PerSampleGradients", "per_sample_gradients"]

_NAME = "per_sample_gradients"


class Gradient(NamedTuple):
    """One parameter's, with the squared norms of what is kept and the version they belong to."""

    part: torch.Tensor | LayerGradient
    square_norms: tuple[torch.Tensor, int] | None


class PerSampleGradients(GradientStore):
    """Per-sample gradients by parameter name: each (B, *param.shape), in the parameter's dtype.

    Usable as a context manager once; a mapping from the backward pass on, which `clip_and_noise`
    takes as it is. A gradient that is not kept is formed whenever it is looked up.
    """

    def __init__(
        self,
        model: nn.Module,
        memory_budget: float | int | None = None,
        strategy: str = "auto",
    ) -> None:
        if memory_budget is not None:
            checked_budget(memory_budget)
        _validate.choice(_NAME, "strategy", strategy, ("auto", *(route.value for route in Route)))
        if strategy != "auto" and memory_budget is not None:
            raise ValueError(f"{_NAME}: memory_budget needs strategy auto, got {strategy}")
        modules = dict(model.named_modules())
        refuse_mixing_layers(modules)
        params, constants = _members(modules)
        if not params:
            raise ValueError(f"{_NAME}: the model must have a parameter that requires grad")
        self._collector = Collector(params, constants)
        self._budget: Budget | None = None
        if memory_budget is not None:
            self._budget = Budget(model, memory_budget, list(params), self._collector.routes)
        self._collector.routes.forced = None if strategy == "auto" else Route(strategy)
        self._grads_before = {name: _state_of(p.grad) for name, p in params.items()}
        self._mode: Interception | None = None
        self._entered = False
        self._result: dict[str, Gradient] | None = None

    def __enter__(self) -> PerSampleGradients:
        if self._entered:
            raise RuntimeError(f"{_NAME}: a context must not be entered twice")
        self._entered = True
        see_first_layer = None if self._budget is None else self._budget.see_first_layer
        self._mode = Interception(self._collector, self._check_loss, see_first_layer)
        with ExitStack() as stack:
            if self._budget is not None:
                stack.enter_context(self._budget)
            stack.enter_context(self._mode)
            self._modes = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._modes.__exit__(kind, error, trace)
            if kind is None:
                self._finish()
                self._end_budget()
        finally:
            if kind is not None:
                self._result = None
            # The loss' graph outlives the step in many a loop, and knows the collector.
            self._collector.release()
            self._mode = None

    def _end_budget(self) -> None:
        if self._budget is None:
            return
        params = [target.tensor for target in self._collector.params]
        self._budget.end(sum(param.numel() * param.element_size() for param in params))

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._finish()[name].part
        return part.form() if isinstance(part, LayerGradient) else part

    def __iter__(self) -> Iterator[str]:
        return iter([target.name for target in self._collector.params])

    def __len__(self) -> int:
        return len(self._collector.params)

    def parts(self) -> dict[str, torch.Tensor | DeferredGradient]:
        """See GradientStore."""
        return {name: gradient.part for name, gradient in self._finish().items()}

    def square_norms(self, name: str) -> torch.Tensor | None:
        """See GradientStore."""
        part, known = self._finish()[name]
        if known is None or isinstance(part, LayerGradient):
            return None
        squares, version = known
        return squares if part._version == version else None

    @property
    def plan(self) -> Plan:
        """What became of each layer's gradient, once backward has run.

        It names the batch size, which is private under Poisson sampling.
        """
        self._finish()
        layers = tuple(self._collector.routes.layers)
        plain = Plan(layers, self._collector.batch_size)
        choice = None if self._budget is None else self._budget.choice
        if choice is None:
            return plain
        return replace(
            plain, budget=choice.budget, ordinary=choice.ordinary, predicted=choice.predicted
        )

    def _check_loss(self, loss: torch.Tensor, gradient: Any) -> torch.Tensor:
        """Refuse what is not one loss per sample; return the gradient to start with."""
        self._result = None
        if self._collector.target_of(loss) is not None:
            raise PrivacyError(
                f"{_NAME}: the loss depends on no sample, only on what the model itself creates"
            )
        if loss.dim() == 1:
            self._begin_backward(loss.shape[0])
            if gradient is None:
                return torch.ones_like(loss)
            start: torch.Tensor = gradient
            return start
        # The sum of a vector is as good: the vector's length stands in the graph.
        node = loss.grad_fn
        # A tensor subclass (MONAI's MetaTensor) puts an alias around the sum.
        while node is not None and type(node).__name__ == "AliasBackward0":
            node = node.next_functions[0][0]
        sizes = getattr(node, "_saved_self_sym_sizes", None)
        is_sum = loss.dim() == 0 and type(node).__name__ == "SumBackward0"
        if not is_sum or sizes is None or len(sizes) != 1:
            raise PrivacyError(
                f"{_NAME}: backward needs the per-sample loss of shape (B,) or its sum, got shape "
                f"{tuple(loss.shape)} from {type(node).__name__}; dpfast.per_sample_loss(loss) "
                "adapts MONAI's losses"
            )
        self._begin_backward(int(sizes[0]))
        return torch.ones_like(loss) if gradient is None else gradient

    def _begin_backward(self, batch_size: int) -> None:
        self._collector.set_batch_size(batch_size)
        if self._budget is not None:
            self._budget.begin_backward(batch_size)

    @staticmethod
    def _unseen(name: str) -> str:
        return (
            f"{_NAME}: {name} got a gradient that mixes the samples, through a function that torch "
            "cannot intercept (a custom autograd.Function, reentrant checkpointing?)"
        )

    def _finish(self) -> dict[str, Gradient]:
        if self._result is not None:
            return self._result
        collector = self._collector
        if not collector.saw_loss:
            raise RuntimeError(
                f"{_NAME}: there are no gradients before backward was called on the per-sample "
                "loss inside the context"
            )
        if self._entered and self._mode is None:
            raise RuntimeError(f"{_NAME}: there are no gradients, an error ended the context")
        with torch._C.DisableTorchFunction():
            collector.pull_back()
        for computed in collector.computed:
            if computed.tensor.grad is not None:
                raise PrivacyError(self._unseen(computed.name))
        for target in collector.params:
            if _state_of(target.tensor.grad) != self._grads_before[target.name]:
                raise PrivacyError(self._unseen(target.name))
            if target.is_empty:
                raise PrivacyError(
                    f"{_NAME}: {target.name} requires grad but got no per-sample gradient; freeze "
                    "it (requires_grad_(False)) if it takes no part"
                )
        result: dict[str, Gradient] = {}
        for target in collector.params:
            part = target.deferred if target.grad_sample is None else target.grad_sample
            assert part is not None
            if part.shape[0] != collector.batch_size:
                raise PrivacyError(
                    f"{_NAME}: {target.name} got gradients of {part.shape[0]} samples, the loss "
                    f"has {collector.batch_size}"
                )
            result[target.name] = Gradient(part, target.square_norms)
        self._result = result
        return result


def _members(
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, nn.Parameter], list[torch.Tensor]]:
    """Trainable parameters as model.named_parameters() has them; frozen ones and buffers.

    In one walk: a step of a small network is short.
    """
    params: dict[str, nn.Parameter] = {}
    constants: list[torch.Tensor] = []
    seen = set()
    for prefix, module in modules.items():
        for name, param in module._parameters.items():
            if param is None or id(param) in seen:
                continue
            seen.add(id(param))
            if param.requires_grad:
                params[f"{prefix}.{name}" if prefix else name] = param
            else:
                constants.append(param)
        constants += [buffer for buffer in module._buffers.values() if buffer is not None]
    return params, constants


def _state_of(grad: torch.Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), grad._version)


def per_sample_gradients(
    model: nn.Module, *, memory_budget: float | int | None = None, strategy: str = "auto"
) -> PerSampleGradients:
    """Compute every sample's own gradient in an ordinary forward and backward pass.

        with dpfast.per_sample_gradients(model) as grads:
            loss = per_sample_loss(model(images), targets)  # (B,)
            loss.sum().backward()
        noisy = dpfast.clip_and_noise(grads, max_grad_norm=1.0, noise_multiplier=1.1)

    The model is not wrapped, hooked or renamed, and no `.grad` is written. Frozen and shared
    parameters, functional use of weights, in-place activations, checkpointing, autocast and
    several forward passes before one backward pass work.

    The gradient of a convolution's or a linear layer's weight is kept, or only its norms are taken
    and `clip_and_noise` forms the clipped sum alone (book-keeping, ghost norms): whatever costs the
    layer least work, or what fits in `memory_budget`. `grads.plan.report()` tells. The clipped sums
    are the same up to rounding.

    Args:
      model: samples must not influence one another: layers that take statistics over the batch are
        refused.
      memory_budget: for the step's own tensors (activations and gradients, at their highest): an
        int in bytes, or a float as a share of what the ordinary step takes (1.1 for a tenth more).
        The first step of a kind (shape of the inputs, autocast, trained parameters) measures and
        runs slower, every layer on the way that holds least, and tells whether anything fits. Where
        a later, larger batch does not, it takes the least that it can. None: no limit.
      strategy: "auto", as above; or one way for all weights that can go it, the others being kept:
        "keep" forms all per-sample gradients, "recompute" and "ghost" as few as possible. A sum of
        gradients that were formed is taken in float64, of others in the parameter's dtype.

    Returns:
      A context manager that yields a mapping from the names of the parameters that require grad
      to per-sample gradients (B, *param.shape), in the order of `model.named_parameters()`.

    Raises:
      ValueError: nothing in the model requires grad; memory_budget and another strategy than auto;
        nothing fits in memory_budget (at the backward pass or on leaving the context).
      PrivacyError: a layer mixes the samples (on entry); the loss is not one number per sample, a
        parameter got no per-sample gradient, or one got a gradient past the interception (at the
        backward pass or on leaving the context).
    """
    return PerSampleGradients(model, memory_budget, strategy)
