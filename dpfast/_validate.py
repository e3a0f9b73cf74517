"""All argument checks. Messages: function: argument, rule, received value (never private data)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = [
    "MAX_BOUND",
    "MIN_BOUND",
    "batch_of",
    "choice",
    "flag",
    "number",
    "structure",
    "tensor_like",
]

# Between these, products and quotients of a bound and a norm stay far from overflow.
MIN_BOUND, MAX_BOUND = 1e-30, 1e30

GRADIENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def number(
    function: str,
    name: str,
    value: Any,
    *,
    minimum: float,
    maximum: float,
    exclusive: bool = False,
) -> float:
    """A finite real number in [minimum, maximum], or (minimum, maximum] where exclusive."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    try:
        converted = float(value)
    except OverflowError:  # an int beyond any float
        converted = math.inf
    low_enough = converted > minimum if exclusive else converted >= minimum
    if not (math.isfinite(converted) and low_enough and converted <= maximum):
        rule = f"> {minimum:g}" if exclusive else f">= {minimum:g}"
        raise ValueError(
            f"{function}: {name} must be finite, {rule} and <= {maximum:g}, got {converted!r}"
        )
    return converted


def choice(function: str, name: str, value: Any, options: Sequence[str]) -> str:
    """One of the named options."""
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} must be a str, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{function}: {name} must be one of {', '.join(options)}, got {value!r}")
    return value


def flag(function: str, name: str, value: Any) -> bool:
    """A real bool: a misplaced number must not switch a privacy setting."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")
    return value


def tensor_like(
    function: str,
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """A dense tensor of one of the dtypes, the shape and the device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{function}: {name} must be {names}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be dense, got {value.layout}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{function}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(
            f"{function}: {name} must be on {device} like grad_samples, got {value.device}"
        )
    return value


def structure(function: str, name: str, value: Any) -> tuple[list[torch.Tensor], list[Any] | None]:
    """The tensors of a tensor, sequence or mapping, and the mapping's keys."""
    keys: list[Any] | None = None
    if isinstance(value, torch.Tensor):
        tensors = [value]
    elif isinstance(value, Mapping):
        keys = list(value.keys())
        tensors = [value[key] for key in keys]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        tensors = list(value)
    else:
        raise TypeError(
            f"{function}: {name} must be a tensor or a sequence or mapping of tensors, got "
            f"{type(value).__name__}"
        )
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{function}: {name} must hold tensors, got {type(tensor).__name__}")
    if not tensors:
        raise ValueError(f"{function}: {name} must hold at least one tensor, got none")
    return tensors, keys


def batch_of(function: str, tensors: Sequence[torch.Tensor]) -> int:
    """The common batch size of per-sample gradients that agree on device and axis 0."""
    first = tensors[0]
    device, num_rows = first.device, first.shape[0] if first.dim() else -1
    for index, tensor in enumerate(tensors):
        # One test where all is well: a network has hundreds of tensors.
        if not (
            tensor.dtype in GRADIENT_DTYPES
            and tensor.layout is torch.strided
            and tensor.dim()
            and tensor.device == device
            and tensor.shape[0] == num_rows
        ):
            raise _misfit(function, f"grad_samples[{index}]", tensor, first)
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{function}: grad_samples must be on cpu or cuda, got {device.type}")
    return int(num_rows)


def _misfit(function: str, where: str, tensor: torch.Tensor, first: torch.Tensor) -> Exception:
    """What is wrong with a gradient that batch_of does not take."""
    if tensor.dtype not in GRADIENT_DTYPES:
        return TypeError(
            f"{function}: {where} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        return TypeError(f"{function}: {where} must be dense, got {tensor.layout}")
    if tensor.dim() == 0:
        return ValueError(f"{function}: {where} must have shape (B, *param_shape), got ()")
    if tensor.device != first.device:
        return ValueError(
            f"{function}: {where} must be on {first.device} like grad_samples[0], got "
            f"{tensor.device}"
        )
    return ValueError(
        f"{function}: {where} must have {first.shape[0]} samples like grad_samples[0], got shape "
        f"{tuple(tensor.shape)}"
    )
