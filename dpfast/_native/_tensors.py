"""What the kernels are told of a tensor."""

from __future__ import annotations

import torch

__all__ = ["DTYPE_CODES", "address"]

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: torch.Tensor | None) -> int:
    """Of its first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
