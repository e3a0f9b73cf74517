"""Grey-scale morphology as one op: chains of dilations and erosions, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpfast import _native
from dpfast.ops._morphology_program import Program, encode, index_dtype, num_chains

__all__ = ["morphology", "run_encoded"]

# float16 has kernels on CUDA alone; elsewhere it is widened, which is exact.
_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)

torch.library.define(
    "dpfast::morphology",
    "(Tensor x, int[] program, float[] values, int chains) -> (Tensor, Tensor)",
)
torch.library.define(
    "dpfast::morphology_backward",
    "(Tensor grad, Tensor index, int[] program, float[] values) -> Tensor",
)


def _check_kernels(device: torch.device) -> None:
    if device.type == "cuda" and not _native.has_cuda_kernels():
        raise RuntimeError(
            "morphology: x is on CUDA, but this build of dpfast has no CUDA kernels; reinstall it "
            "with nvcc on PATH (DPFAST_CUDA=ON makes their absence an error)"
        )


def _run(
    x: torch.Tensor, program: Sequence[int], values: Sequence[float], chains: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_kernels(x.device)
    x = x.resolve_neg().contiguous()
    out = torch.empty_like(x)
    index = _empty_index(x, program, chains)
    _native.morphology(x, out, index if chains else None, program, values)
    return out, index


def _empty_index(x: torch.Tensor, program: Sequence[int], chains: int) -> torch.Tensor:
    return x.new_empty((chains, *x.shape), dtype=index_dtype(program, x.shape[2:]))


def _run_backward(
    grad: torch.Tensor, index: torch.Tensor, program: Sequence[int], values: Sequence[float]
) -> torch.Tensor:
    _check_kernels(grad.device)
    grad = grad.resolve_neg().contiguous()
    grad_input = torch.empty_like(grad)
    _native.morphology_backward(grad, index, grad_input, program, values)
    return grad_input


def _fake(
    x: torch.Tensor, program: Sequence[int], values: Sequence[float], chains: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, _empty_index(x, program, chains)


def _fake_backward(
    grad: torch.Tensor, index: torch.Tensor, program: Sequence[int], values: Sequence[float]
) -> torch.Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, ctx.program, ctx.values, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    (index,) = ctx.saved_tensors
    if index.shape[0] == 0:
        raise RuntimeError("morphology: x must require a gradient when the op is called")
    op = torch.ops.dpfast.morphology_backward
    return op(grad, index, ctx.program, ctx.values), None, None, None


torch.library.impl("dpfast::morphology", ("cpu", "cuda"))(_run)
torch.library.impl("dpfast::morphology_backward", ("cpu", "cuda"))(_run_backward)
torch.library.register_fake("dpfast::morphology", _fake)
torch.library.register_fake("dpfast::morphology_backward", _fake_backward)
torch.library.register_autograd("dpfast::morphology", _backward, setup_context=_setup_context)


def morphology(
    x: torch.Tensor, programs: tuple[Program, ...], border: str, border_value: float
) -> torch.Tensor:
    """Run one program per channel.

    Args:
      x: (B, C, H, W) or (B, C, D, H, W), float64, float32, bfloat16 or float16, checked.
      programs: one per channel.
      border: of BORDERS.
      border_value: of the border "constant".

    Returns:
      Shape and dtype of x, contiguous.
    """
    numbers, values = encode(programs, border, border_value)
    return run_encoded(x, numbers, values, num_chains(programs))


def run_encoded(
    x: torch.Tensor, numbers: Sequence[int], values: Sequence[float], chains: int
) -> torch.Tensor:
    """Run what `encode` gave: lists of numbers, which torch.compile takes as constants.

    Args:
      x: as in `morphology`.
      numbers: of `encode`, as are the values.
      values: heights and the border's value.
      chains: `num_chains` of the same programs.

    Returns:
      Shape and dtype of x, contiguous.
    """
    # An index is kept only for a gradient. (Under a transform of torch.func the flag is that of
    # the level at hand.)
    kept = chains if x.requires_grad and torch.is_grad_enabled() else 0
    dtype = x.dtype
    if x.device.type == "cpu" and dtype not in _CPU_DTYPES:
        x = x.float()
    out: torch.Tensor = torch.ops.dpfast.morphology(x, numbers, values, kept)[0]
    return out.to(dtype)
