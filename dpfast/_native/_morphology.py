"""The morphology kernels: tensors to pointers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpfast import _core
from dpfast._native._tensors import DTYPE_CODES, address

__all__ = ["morphology", "morphology_backward"]


def morphology(
    x: torch.Tensor,
    out: torch.Tensor,
    index: torch.Tensor | None,
    program: Sequence[int],
    values: Sequence[float],
) -> None:
    """Run a morphology program (csrc/math/morphology.h).

    Args:
      x: (B, C, H, W) or (B, C, D, H, W), contiguous.
      out: likewise.
      index: (chains, *x.shape) int16 or int32, where each value's source goes; None: not wanted.
      program: from ops/_morphology_program.py.
      values: likewise.
    """
    told = (
        address(index),
        16 if index is None else 8 * index.element_size(),
        DTYPE_CODES[x.dtype],
        _five_axes(x),
        program,
        values,
    )
    if x.device.type == "cuda":
        device = x.device.index
        workspace = torch.empty(
            _core.morphology_cuda_workspace_bytes(*told, device),
            dtype=torch.uint8,
            device=x.device,
        )
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _core.morphology_cuda(
            x.data_ptr(), out.data_ptr(), *told, workspace.data_ptr(), device, stream
        )
        return
    _core.morphology_cpu(x.data_ptr(), out.data_ptr(), *told, torch.get_num_threads())


def morphology_backward(
    grad: torch.Tensor,
    index: torch.Tensor,
    grad_input: torch.Tensor,
    program: Sequence[int],
    values: Sequence[float],
) -> None:
    """Send the gradient of a morphology program's output back to its input.

    Args:
      grad: shape and dtype of the output, contiguous.
      index: what `morphology` has written.
      grad_input: likewise; is written.
      program: as in `morphology`.
      values: likewise.
    """
    told = (
        grad.data_ptr(),
        grad_input.data_ptr(),
        index.data_ptr(),
        8 * index.element_size(),
        DTYPE_CODES[grad.dtype],
        _five_axes(grad),
        program,
        values,
    )
    if grad.device.type == "cuda":
        stream = torch.cuda.current_stream(grad.device).cuda_stream
        _core.morphology_backward_cuda(*told, grad.device.index, stream)
        return
    _core.morphology_backward_cpu(*told, torch.get_num_threads())


def _five_axes(tensor: torch.Tensor) -> list[int]:
    missing = 5 - tensor.dim()
    return [*tensor.shape[:2], *[1] * missing, *tensor.shape[2:]]
