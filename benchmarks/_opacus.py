"""Opacus' own clipping and noise on the same per-sample gradients."""

from __future__ import annotations

import torch

from benchmarks._workload import MAX_GRAD_NORM, NOISE_MULTIPLIER, Case, Workload

try:
    from opacus.optimizers import DPOptimizer
except ImportError:  # an optional peer
    DPOptimizer = None

__all__ = ["OpacusStep", "reason_to_skip"]


def reason_to_skip(case: Case, available_bytes: int) -> str | None:
    """Why Opacus cannot take part in a row, or None.

    Args:
      case: the row.
      available_bytes: memory left beside the row's own.
    """
    lacking = {
        "clipping rule " + case.rule: case.rule != "flat",
        case.mechanism + " noise": case.mechanism != "gaussian",
        "given norms": case.given_norms,
        "privacy units of several rows": case.rows_per_unit > 1,
    }
    for feature, wanted in lacking.items():
        if wanted:
            return f"Opacus has no {feature}"
    if DPOptimizer is None:
        return "Opacus is not installed"
    # Gradients of another type than the parameters' are copied to float32 first; where it copies
    # besides depends on PyTorch's version, so one copy is always allowed for.
    copies = 1 if case.dtype == "float32" else 2
    needed = copies * case.grad_bytes + 16 * case.num_params
    if needed > available_bytes:
        return f"may need {needed / 2**30:.1f} GiB more, {available_bytes / 2**30:.1f} GiB are left"
    return None


class OpacusStep:
    """`DPOptimizer.clip_and_accumulate`, `add_noise` and `scale_grad`: a step but for the update.

    Args:
      work: gradients and settings.
      noise_multiplier: 0 for the noiseless answer.
    """

    def __init__(self, work: Workload, noise_multiplier: float = NOISE_MULTIPLIER) -> None:
        self._work = work
        self._params = [
            torch.nn.Parameter(torch.zeros(size, device=work.device)) for size in work.sizes
        ]
        self._optimizer = DPOptimizer(
            torch.optim.SGD(self._params, lr=0.1),
            noise_multiplier=noise_multiplier,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=work.divisor,
            loss_reduction="mean",
        )

    def reset(self) -> None:
        """Give the optimizer unused gradients: it marks those that it has seen."""
        for param, grad in zip(self._params, self._work.grads, strict=True):
            param.grad = None
            param.summed_grad = None  # type: ignore[attr-defined]
            param.grad_sample = grad.view_as(grad)  # type: ignore[attr-defined]

    def __call__(self) -> list[torch.Tensor]:
        """The noisy mean, as the parameters' gradients."""
        self._optimizer.clip_and_accumulate()
        self._optimizer.add_noise()
        self._optimizer.scale_grad()
        return [param.grad for param in self._params if param.grad is not None]
