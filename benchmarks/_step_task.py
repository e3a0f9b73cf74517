"""What every contender of the step benchmark works on: a network, a batch and a loss."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from benchmarks._networks import built, network_of

__all__ = ["Batch", "Case", "Privacy", "Step", "StepType", "Task", "predict"]

_SEED = 20240607
# So small that the weights stay what they were, however often a network is trained on noise alone.
_LEARNING_RATE = 1e-9


@dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
      network: name of the network.
      batch_size: B.
      size: extent of an image.
      memory_budget: of the contender with a budget, over the ordinary step's peak memory.
    """

    network: str
    batch_size: int
    size: tuple[int, ...]
    memory_budget: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """The case that was saved: JSON turns tuples into lists."""
        return cls(**{**fields, "size": tuple(fields["size"])})

    @property
    def label(self) -> str:
        """The row in words."""
        return f"{self.network}, {self.shape}"

    @property
    def shape(self) -> str:
        """The batch's shape, one channel."""
        return "x".join(str(extent) for extent in (self.batch_size, 1, *self.size))


@dataclass(frozen=True)
class Privacy:
    """Settings of a private step; the noise multiplier is 0 for the noiseless answer."""

    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Images (B, 1, *size) and masks (B, 2, *size), one-hot: vmap cannot encode them itself."""

    images: torch.Tensor
    masks: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the samples."""
        return Batch(self.images[start:stop], self.masks[start:stop])


def predict(model: Callable[[torch.Tensor], Any], images: torch.Tensor) -> torch.Tensor:
    """The network's last output: some return a list for deep supervision."""
    out = model(images)
    result: torch.Tensor = out[-1] if isinstance(out, (list, tuple)) else out
    return result


class Task:
    """A network with random weights, a random batch and MONAI's Dice and cross-entropy loss.

    Parameters that take no part in the forward pass are frozen.

    Args:
      case: the row.
      device: where it is computed.
      dtype: of network and batch; float64 shows what is computed without rounding.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.case = case
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self._model = built(network_of(case.network)).to(device, dtype).train()
        generator = torch.Generator().manual_seed(_SEED)
        shape = (case.batch_size, 1, *case.size)
        images = torch.randn(shape, generator=generator)
        front = (torch.rand(shape, generator=generator) < 0.3).float()
        masks = torch.cat([1 - front, front], 1)
        self.batch = Batch(images.to(device, dtype), masks.to(device, dtype))
        self._freeze_unused()

    @cached_property
    def loss(self) -> nn.Module:
        """MONAI's loss: its mean over the batch is the mean of the samples' losses."""
        from monai.losses.dice import DiceCELoss

        loss: nn.Module = DiceCELoss(softmax=True)
        return loss

    @property
    def num_params(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def model(self) -> nn.Module:
        """A copy of the network, to be wrapped, hooked and trained at will."""
        return copy.deepcopy(self._model)

    def _freeze_unused(self) -> None:
        one = self.batch.rows(0, 1)
        self.loss(predict(self._model, one.images), one.masks).backward()
        for param in self._model.parameters():
            param.requires_grad_(param.grad is not None)
            param.grad = None


class Step(ABC):
    """One contender with a network and an optimizer of its own.

    Args:
      task: network, batch and loss.
      privacy: bound and noise of the private steps.
    """

    def __init__(self, task: Task, privacy: Privacy) -> None:
        self.task = task
        self.privacy = privacy
        self.model = task.model()
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.params.values(), lr=_LEARNING_RATE
        )
        self.expected_batch_size = len(task.batch)

    @abstractmethod
    def run(self, batch: Batch) -> None:
        """Take the step; the mean gradient stays in the parameters' `.grad`."""

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The mean gradient that the last step applied, by the parameters' names."""
        found = {}
        for name, param in self.params.items():
            assert param.grad is not None, name
            found[name] = param.grad.detach().clone()
        return found


StepType = Callable[[Task, Privacy], Step]
