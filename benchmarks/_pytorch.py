"""clip_and_noise in PyTorch's own ops, as fast as they allow without compiling kernels."""

from __future__ import annotations

import torch

from benchmarks._workload import MAX_GRAD_NORM, NOISE_MULTIPLIER, Workload

__all__ = ["PytorchOps"]


class PytorchOps:
    """Norms, weights, one matrix-vector product per tensor and one draw of noise for all tensors.

    Buffers are taken once, outside the timed call. The noise comes from PyTorch's own generator,
    which is not cryptographic. bfloat16 gradients keep their type until the result: converting
    them first would cost three times as much.

    Args:
      work: gradients and settings.
      noise_multiplier: 0 for the noiseless answer.
    """

    def __init__(self, work: Workload, noise_multiplier: float = NOISE_MULTIPLIER) -> None:
        self._work = work
        case, device = work.case, work.device
        self._scale = noise_multiplier * MAX_GRAD_NORM / work.divisor
        self._noise = torch.empty(case.num_params, device=device)
        self._second = torch.empty_like(self._noise) if case.mechanism == "laplace" else None
        self._noise_parts = list(torch.split(self._noise, work.sizes))
        self._norms = work.norms.float() if case.given_norms else None
        means = work.unit_means
        self._unit_means = None if means is None else means.to(case.torch_dtype)

    def __call__(self) -> list[torch.Tensor]:
        """The noisy mean, written to the workload's `out`."""
        work = self._work
        grads, out = work.grads, work.out
        if self._unit_means is not None:
            grads = [self._unit_means @ grad for grad in grads]
        weights = self._weights(grads).to(work.case.torch_dtype)
        for grad, result in zip(grads, out, strict=True):
            if grad.dtype == result.dtype:
                torch.mv(grad.t(), weights, out=result)
            else:
                result.copy_(torch.mv(grad.t(), weights))
        if self._scale:
            self._draw()
            torch._foreach_add_(out, self._noise_parts)
        return out

    def _weights(self, grads: list[torch.Tensor]) -> torch.Tensor:
        order = self._work.case.norm_order
        norms = self._norms
        if norms is None:
            parts = [torch.linalg.vector_norm(grad, ord=order, dim=1) for grad in grads]
            norms = torch.linalg.vector_norm(torch.stack(parts).float(), ord=order, dim=0)
        if self._work.case.rule == "automatic":
            return MAX_GRAD_NORM / self._work.divisor / (norms + 0.01)
        return (MAX_GRAD_NORM / norms).clamp(max=1.0) / self._work.divisor

    def _draw(self) -> None:
        if self._second is None:
            self._noise.normal_(std=self._scale)
            return
        # The difference of two exponential variables has the Laplace distribution.
        self._noise.exponential_()
        self._second.exponential_()
        self._noise.sub_(self._second).mul_(self._scale)
