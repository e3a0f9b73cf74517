"""A private step by opake and by fastDP, through their own functions and engines.

Both are optional, as Opacus is, and imported where a step is built.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from benchmarks._step_task import Batch, Privacy, Step, Task, predict

__all__ = ["FastdpStep", "OpakeStep"]

_SEED = 20240607


class OpakeStep(Step):
    """opake's `clipped_grad` and `gaussian_noise`, which are functions of parameters and state."""

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.functional import make_functional
        from opake.random import key

        split: Any = make_functional  # its type leaves open what comes back
        model, self._trained, frozen = split(
            self.model, disable_autograd_tracking=True, partition_trainable=True
        )

        def loss_of_one(
            params: dict[str, torch.Tensor], image: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            def network(images: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = model({**frozen, **params}, images)
                return out

            loss: torch.Tensor = task.loss(predict(network, image[None]), mask[None])
            return loss

        self._clipped_sum: Any
        self._add_noise: Any
        self._clipped_sum, self._clipping = clipped_grad(
            loss_of_one,
            clipping_norm=privacy.max_grad_norm,
            normalize_by=float(self.expected_batch_size),
            batch_argnums=(1, 2),
        )
        self._add_noise, self._noise = gaussian_noise(
            noise_multiplier=privacy.noise_multiplier, key=key(_SEED)
        )

    def run(self, batch: Batch) -> None:
        self.zero_grad()
        grads, self._clipping = self._clipped_sum(
            self._trained, batch.images, batch.masks, state=self._clipping
        )
        noisy, self._noise = self._add_noise(grads, self._noise)
        for name, param in self.params.items():
            param.grad = noisy.pytree[name]
        self.optimizer.step()


class FastdpStep(Step):
    """fastDP's `PrivacyEngine` with its default mode, MixOpt, and flat clipping ("Abadi").

    It leaves parameters of layers that it does not know without gradients; that is for the
    comparison with the truth to say.
    """

    def __init__(self, task: Task, privacy: Privacy) -> None:
        super().__init__(task, privacy)
        from fastDP import PrivacyEngine

        with _silence():
            engine = PrivacyEngine(
                self.model,
                batch_size=self.expected_batch_size,
                sample_size=1000 * self.expected_batch_size,
                epochs=1,
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                clipping_fn="Abadi",
                clipping_mode="MixOpt",
                loss_reduction="mean",
            )
            engine.attach(self.optimizer)

    def run(self, batch: Batch) -> None:
        with _silence():
            self.zero_grad()
            self.task.loss(predict(self.model, batch.images), batch.masks).backward()
            self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those that were applied: without the parameters that the engine leaves out."""
        return {
            name: param.grad.detach().clone()
            for name, param in self.params.items()
            if param.grad is not None
        }


@contextlib.contextmanager
def _silence() -> Any:
    """Nothing on standard output: fastDP prints what it does."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
