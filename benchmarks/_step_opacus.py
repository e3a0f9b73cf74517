"""Opacus' ways to a private step, through its own modules and optimizers.

Opacus is an optional peer: it is imported where a step is built, so that a process that measures
another contender's memory does not hold it.
"""

from __future__ import annotations

from typing import Any

import torch

import dpfast
from benchmarks._step_task import Batch, Privacy, Step, Task, predict

__all__ = ["FunctorchStep", "GhostStep", "HooksStep"]


class HooksStep(Step):
    """`GradSampleModule` and `DPOptimizer`: Opacus' default."""

    force_functorch = False

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self._wrapped: Any = GradSampleModule(
            self.model, loss_reduction="mean", force_functorch=self.force_functorch
        )
        self.optimizer = DPOptimizer(
            self.optimizer,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            loss_reduction="mean",
        )

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        self.task.loss(predict(self._wrapped, batch.images), batch.masks).backward()
        self.optimizer.step()


class FunctorchStep(HooksStep):
    """The same with every layer's gradients by functorch."""

    force_functorch = True


class _PerSampleCriterion:
    """A loss as Opacus' ghost clipping calls it: it sets `reduction` and wants a vector.

    MONAI's own losses give no vector (B,), and Opacus would clip something else without notice.
    """

    def __init__(self, loss: torch.nn.Module) -> None:
        self.reduction = "mean"
        self._loss = dpfast.per_sample_loss(loss)

    def __call__(self, predictions: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._loss(predictions, masks)
        return loss


class GhostStep(Step):
    """Ghost clipping: norms in a first backward pass, the clipped sum in a second."""

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self._wrapped: Any = GradSampleModuleFastGradientClipping(
            self.model,
            loss_reduction="mean",
            max_grad_norm=privacy.max_grad_norm,
            use_ghost_clipping=True,
        )
        optimizer = DPOptimizerFastGradientClipping(
            self.optimizer,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            loss_reduction="mean",
        )
        self._loss: Any = DPLossFastGradientClipping(
            self._wrapped, optimizer, _PerSampleCriterion(task.loss), "mean"
        )
        self.optimizer = optimizer

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        self._loss(predict(self._wrapped, batch.images), batch.masks).backward()
        self.optimizer.step()
