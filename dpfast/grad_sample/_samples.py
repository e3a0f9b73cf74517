"""Which part of a tensor belongs to which sample."""

from __future__ import annotations

import torch

from dpfast.errors import PrivacyError

__all__ = ["fold", "samples_first"]


def samples_first(tensor: torch.Tensor, batch_size: int, axis: int, name: str) -> torch.Tensor:
    """(B * k, ...) or, with the samples on another axis, (..., B * k, ...) as (B, k, ...).

    The k rows of a sample (windows, slices) follow one another.

    Raises:
      PrivacyError: the axis is not a multiple of B long.
    """
    tensor = tensor.movedim(axis, 0)
    length = tensor.shape[0]
    if batch_size == 0 or length % batch_size:
        if batch_size == length == 0:
            return tensor.unsqueeze(1)
        raise PrivacyError(
            f"per_sample_gradients: {name} is used on a tensor of {length} rows, which does not "
            f"divide into {batch_size} samples: axis {axis} must hold the samples"
        )
    return tensor.reshape(batch_size, length // batch_size, *tensor.shape[1:])


def fold(grads: torch.Tensor, batch_size: int, name: str) -> torch.Tensor:
    """(B * k, *shape) summed over each sample's k rows."""
    if grads.shape[0] == batch_size:
        return grads
    return samples_first(grads, batch_size, 0, name).sum(1)
