"""PyTorch's switches for products of float32 in less than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["allows_tf32_convolutions", "full_float32"]


def allows_tf32_convolutions() -> bool:
    """What PyTorch's own convolutions on CUDA are told."""
    settings = getattr(torch.backends.cudnn, "conv", None)  # PyTorch >= 2.9
    if settings is not None:
        return bool(settings.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 and no bfloat16 in products: a sample's part in a sum must not outgrow its norm.

    PyTorch has older and newer switches for the same, and refuses to read the older once a newer
    one has been used: each is set and put back by the kind that the program uses.
    """
    with ExitStack() as stack:
        stack.enter_context(_matrix_products())
        if device.type == "cuda":
            stack.enter_context(_cuda_convolutions())
        else:
            stack.enter_context(_ieee(getattr(torch.backends.mkldnn, "conv", None)))
        yield


@contextmanager
def _matrix_products() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
        with _ieee(mkldnn), _ieee(torch.backends.cuda.matmul):
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _cuda_convolutions() -> Iterator[None]:
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        with _ieee(getattr(torch.backends.cudnn, "conv", None)):
            yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _ieee(switch: Any) -> Iterator[None]:
    before = getattr(switch, "fp32_precision", "ieee")
    if before in ("ieee", "none"):
        yield
        return
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
