"""The steps that are compared: ordinary, dpfast with and without a budget, and the peers.

Every step is zero_grad, forward, loss, backward and the update of plain SGD; a private one clips
every sample's gradient and adds noise between the last two.
"""

from __future__ import annotations

import torch

import dpfast
from benchmarks._step_opacus import FunctorchStep, GhostStep, HooksStep
from benchmarks._step_peers import FastdpStep, OpakeStep
from benchmarks._step_task import Batch, Privacy, Step, StepType, Task, predict

__all__ = ["BUDGET", "DPFAST", "ORDINARY", "STEPS"]

ORDINARY, DPFAST, BUDGET = "ordinary", "dpfast", "dpfast_budget"


class OrdinaryStep(Step):
    """Without privacy: the yardstick."""

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        self.task.loss(predict(self.model, batch.images), batch.masks).backward()
        self.optimizer.step()


class DpfastStep(Step):
    """`per_sample_gradients` and `clip_and_noise`, as in the README."""

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        self.loss = dpfast.per_sample_loss(task.loss)

    def _grads(self) -> dpfast.PerSampleGradients:
        return dpfast.per_sample_gradients(self.model)

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        with self._grads() as grads:
            self.loss(predict(self.model, batch.images), batch.masks).sum().backward()
        noisy = dpfast.clip_and_noise(
            grads,
            max_grad_norm=self.privacy.max_grad_norm,
            noise_multiplier=self.privacy.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )
        for name, param in self.params.items():
            param.grad = noisy[name]
        self.optimizer.step()


class BudgetStep(DpfastStep):
    """The same with a bound on peak memory, over the ordinary step's."""

    def _grads(self) -> dpfast.PerSampleGradients:
        budget = self.task.case.memory_budget
        return dpfast.per_sample_gradients(self.model, memory_budget=budget)


class TorchFuncStep(Step):
    """`vmap(grad(...))` over single samples, then clipping and noise in PyTorch's ops."""

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        frozen = {n: p for n, p in self.model.named_parameters() if n not in self.params}
        self._constants = {**frozen, **dict(self.model.named_buffers())}
        self._grad_samples = torch.func.vmap(
            torch.func.grad(self._loss_of_one),
            in_dims=(None, 0, 0),
            randomness="different",
        )

    def _loss_of_one(
        self, params: dict[str, torch.Tensor], image: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        def model(images: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(
                self.model, {**params, **self._constants}, (images,)
            )
            return out

        loss: torch.Tensor = self.task.loss(predict(model, image[None]), mask[None])
        return loss

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        params = {name: param.detach() for name, param in self.params.items()}
        grads = self._grad_samples(params, batch.images, batch.masks)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        weights = (self.privacy.max_grad_norm / norms).clamp(max=1.0)
        scale = self.privacy.noise_multiplier * self.privacy.max_grad_norm
        for name, param in self.params.items():
            total = torch.tensordot(weights, grads[name], dims=1)
            if scale:
                total.add_(torch.randn_like(total), alpha=scale)
            param.grad = total.div_(self.expected_batch_size)
        self.optimizer.step()


# By name; the order of the tables' columns.
STEPS: dict[str, StepType] = {
    ORDINARY: OrdinaryStep,
    DPFAST: DpfastStep,
    BUDGET: BudgetStep,
    "torch_func": TorchFuncStep,
    "opake": OpakeStep,
    "opacus_hooks": HooksStep,
    "opacus_functorch": FunctorchStep,
    "opacus_ghost": GhostStep,
    "fastdp": FastdpStep,
}
