"""A model's weights as they travel between server and sites."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["Weights", "digest", "load_weights", "problem_with", "weights_of"]

# Parameters and floating-point buffers by their names in the state dict, float32 or float64.
Weights = Mapping[str, NDArray[np.floating]]


def weights_of(model: nn.Module) -> dict[str, NDArray[np.floating]]:
    """A copy of what is averaged: parameters and floating-point buffers.

    Counters and other whole numbers stay where they are: an average of them means nothing. Half
    precision travels as float32.
    """
    return {
        name: _widened(tensor).detach().cpu().numpy().copy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Put weights into a model; its whole numbers stay as they are.

    Raises:
      ValueError: they are another model's.
    """
    state = model.state_dict()
    problem = problem_with(weights, weights_of(model))
    if problem is not None:
        raise ValueError(f"load_weights: weights must be those of the model, got {problem}")
    with torch.no_grad():
        for name, array in weights.items():
            state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def problem_with(weights: Weights, like: Weights) -> str | None:
    """Why weights cannot stand for others; None where they can.

    Names, shapes and kinds of numbers must be the same, and all numbers finite.
    """
    missing, unknown = sorted(like.keys() - weights.keys()), sorted(weights.keys() - like.keys())
    if missing or unknown:
        return f"another model: {(missing or unknown)[0]} is {'missing' if missing else 'unknown'}"
    for name, wanted in like.items():
        array = weights[name]
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            return (
                f"another model: {name} is {array.dtype} of shape {array.shape}, not "
                f"{wanted.dtype} of shape {wanted.shape}"
            )
        if not _all_finite(array):
            return f"numbers that are not finite in {name}"
    return None


def digest(weights: Weights) -> str:
    """SHA-256 of names, kinds, shapes and all bits: equal for equal weights alone."""
    found = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        found.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _all_finite(array: NDArray[np.floating]) -> bool:
    numbers = array.ravel()
    # Squares cannot cancel: their sum is finite only where all numbers are, and one call mostly
    # decides. Large numbers' squares may overflow.
    return math.isfinite(np.dot(numbers, numbers)) or bool(np.isfinite(numbers).all())


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor
