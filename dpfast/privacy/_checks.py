"""What `make_private` refuses before any data is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpfast.errors import PrivacyError
from dpfast.grad_sample import per_sample_gradients, refuse_coupling
from dpfast.ops import NoiseSource, clip_and_noise

__all__ = [
    "by_name",
    "check_clipping",
    "check_module",
    "check_optimizer",
    "check_probe",
    "positive_int",
    "trained_parameters",
]

_NAME = "PrivacyEngine"


def positive_int(name: str, value: Any) -> int | None:
    """An int >= 1, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_NAME}: {name} must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{_NAME}: {name} must be >= 1, got {value}")
    return value


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def check_module(module: Any, memory_budget: float | int | None, strategy: str) -> None:
    """Refuse what is no module, is wrapped for data-parallel training, or mixes samples."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{_NAME}: module must be a torch.nn.Module, got {type(module).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(module, wrappers) or "FullyShardedDataParallel" in type(module).__name__:
        raise PrivacyError(
            f"{_NAME}: module must not be wrapped, got {type(module).__name__}: it would add up "
            "gradients that are not clipped; the engine adds the clipped ones up over the "
            "processes of torch.distributed by itself"
        )
    per_sample_gradients(module, memory_budget=memory_budget, strategy=strategy)


def check_optimizer(optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that trains something else than the module's trained parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{_NAME}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PrivacyError(
            f"{_NAME}: optimizer must take one gradient a step, got LBFGS, which asks for several"
        )
    if _hooked(optimizer):
        raise PrivacyError(
            f"{_NAME}: optimizer is private already; make a new one for another engine"
        )
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in params.items()}
    if given - names.keys():
        raise PrivacyError(
            f"{_NAME}: optimizer must hold no parameter but the module's trained ones, got "
            f"{len(given - names.keys())} others: they would be trained without privacy"
        )
    missing = [name for number, name in names.items() if number not in given]
    if missing:
        raise ValueError(
            f"{_NAME}: optimizer must hold every trained parameter, {missing[0]} is not in it; "
            "freeze what is not to be trained (requires_grad_(False))"
        )


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    return any(getattr(hook, "__func__", hook).__module__.startswith("dpfast.") for hook in hooks)


def check_probe(
    module: nn.Module,
    criterion: Callable[..., torch.Tensor] | None,
    probe: tuple[Any, ...] | None,
) -> None:
    """Try the module and the loss on random inputs, for coupled samples and for empty batches."""
    if (criterion is None) != (probe is None):
        raise ValueError(f"{_NAME}: criterion and probe must be given together, or neither")
    if criterion is None or probe is None:
        return
    if not callable(criterion):
        raise TypeError(f"{_NAME}: criterion must be callable, got {type(criterion).__name__}")
    if not isinstance(probe, Sequence) or len(probe) < 2:
        raise TypeError(f"{_NAME}: probe must be (inputs, target, ...), tensors of 2 samples each")
    inputs, *targets = probe
    refuse_coupling(module, inputs, criterion, *targets)
    given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    try:
        with torch.random.fork_rng([]), per_sample_gradients(module):
            values = criterion(module(*(each[:0] for each in given)), *(t[:0] for t in targets))
            values.sum().backward()  # type: ignore[no-untyped-call]
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(
            f"{_NAME}: module and criterion must take a batch of 0 samples, which Poisson sampling "
            f"may draw, got {type(error).__name__}: {error}"
        ) from error


def by_name(params: Mapping[str, nn.Parameter], values: Any) -> Any:
    """One value per parameter in their order, as a mapping by name; other values as they are."""
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        return values
    if len(values) != len(params):
        raise ValueError(
            f"{_NAME}: max_grad_norm and group_noise_weights must have one value for each of the "
            f"{len(params)} trained parameters, got {len(values)}"
        )
    return dict(zip(params, values, strict=True))


def check_clipping(
    params: Mapping[str, nn.Parameter], max_grad_norm: Any, settings: Mapping[str, Any]
) -> None:
    """Refuse what `clip_and_noise` would, on a gradient of zeros."""
    if not isinstance(settings["clipping"], str):
        raise TypeError(
            f"{_NAME}: clipping must be a rule's name, got {type(settings['clipping']).__name__}"
        )
    zeros = {name: p.detach().new_zeros(1, *p.shape) for name, p in params.items()}
    clip_and_noise(
        zeros,
        max_grad_norm=max_grad_norm,
        noise_multiplier=1.0,
        noise=NoiseSource(seed=0),
        return_stats=True,
        **settings,
    )
