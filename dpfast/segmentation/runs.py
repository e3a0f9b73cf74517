"""The steps of a training run, private or not, behind one face."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dpfast.ops import NoiseSource
from dpfast.privacy import PrivacyEngine, PrivacyLedger
from dpfast.segmentation.settings import PrivacySettings
from dpfast.segmentation.task import SegmentationTask

__all__ = ["PlainRun", "PrivateRun", "Run", "spoken"]

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Entry = Mapping[str, Any]


def spoken(epsilon: float | None) -> float | str:
    """An epsilon as it is written down: JSON knows no infinity."""
    return "infinite" if epsilon is None or math.isinf(epsilon) else epsilon


class Run(ABC):
    """A model, how it takes a step, and what the steps cost.

    Attributes:
      steps_per_epoch, total_steps: of the whole run, lost steps included.
    """

    steps_per_epoch: int
    total_steps: int

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion
    ) -> None:
        self.model, self.optimizer, self._criterion = model, optimizer, criterion
        self._device = next(model.parameters()).device

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps begun."""

    @abstractmethod
    def epoch(self) -> Iterator[None]:
        """Take the steps of one epoch; yields after each."""

    @abstractmethod
    def epsilon(self) -> float | str:
        """What the steps have cost, or "infinite"."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What is guaranteed, to whom, and by which means; JSON-able."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""

    def _losses(self, batch: Entry) -> torch.Tensor:
        images, labels = (batch[key].to(self._device) for key in ("image", "label"))
        return self._criterion(self.model(images), labels)


class PrivateRun(Run):
    """Training by dpfast.PrivacyEngine, which samples, clips, adds noise and keeps the ledger.

    Args:
      model, optimizer, criterion, dataset, task, privacy: what is trained, how and under which
        promise.
      epochs: of the whole run, earlier processes' included.
      ledger: where the steps are counted.
      noise: None: keyed by the operating system. A seed makes epsilon infinite.
      probe: whether to look for samples that mix; a run that goes on in the same process has been
        looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        dataset: Dataset[Any],
        task: SegmentationTask,
        privacy: PrivacySettings,
        epochs: int,
        ledger: PrivacyLedger,
        *,
        noise: NoiseSource | None = None,
        probe: bool = True,
    ) -> None:
        super().__init__(model, optimizer, criterion)
        self._delta: Any = privacy.target_delta
        self._engine = PrivacyEngine(ledger=ledger, noise=noise)
        by_patient = privacy.privacy_unit == "patient"
        arguments: dict[str, Any] = {
            "module": model,
            "optimizer": optimizer,
            "data_loader": DataLoader(dataset, batch_size=privacy.expected_batch_size),
            "max_grad_norm": privacy.max_grad_norm,
            **({"criterion": criterion, "probe": self._probe(task)} if probe else {}),
            "clipping": privacy.clipping,
            "mechanism": privacy.mechanism,
            "threshold": privacy.threshold.build(),
            "privacy_unit": privacy.privacy_unit,
            "privacy_unit_ids": "patient_id" if by_patient else None,
            "max_samples_per_unit": privacy.max_samples_per_unit,
            "physical_batch_size": privacy.physical_batch_size,
        }
        if privacy.target_epsilon is None:
            arguments["noise_multiplier"] = privacy.noise_multiplier
            _, _, self._loader = self._engine.make_private(**arguments)
        else:
            arguments["target_epsilon"] = privacy.target_epsilon
            arguments["target_delta"] = privacy.target_delta
            arguments["epochs"] = epochs
            _, _, self._loader = self._engine.make_private_with_epsilon(**arguments)
        self.steps_per_epoch = len(self._loader)
        self.total_steps = epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps that the ledger has counted, those lost with a killed process included."""
        return self._engine.steps

    def epoch(self) -> Iterator[None]:
        """See Run; a step may take several physical batches."""
        before = self.steps
        for batch in self._loader:
            self.optimizer.zero_grad()
            self._losses(batch).sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if self.steps > before:
                before = self.steps
                yield

    @property
    def max_grad_norm(self) -> float | None:
        """The present threshold, which is public; None where it is a percentile."""
        return self._engine.max_grad_norm

    def epsilon(self) -> float | str:
        """See Run."""
        return spoken(self._engine.get_epsilon(self._delta))

    def report(self) -> dict[str, Any]:
        """See Run."""
        report = self._engine.report(self._delta)
        names = [name for name in ("epsilon", "conditional_epsilon") if name in report]
        return {**report, **{name: spoken(report[name]) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """See Run."""
        return self._engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Run; the ledger is not rewound."""
        self._engine.load_state_dict(state)

    def _probe(self, task: SegmentationTask) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images and labels, on which the engine looks for samples that mix."""
        labels = torch.randint(task.num_classes, (2, 1, *task.image_size), device=self._device)
        size = (2, task.in_channels, *task.image_size)
        return torch.randn(size, device=self._device), labels


class PlainRun(Run):
    """The same without protection, in shuffled batches of the expected size."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        dataset: Dataset[Any],
        privacy: PrivacySettings,
        epochs: int,
    ) -> None:
        super().__init__(model, optimizer, criterion)
        self._loader = DataLoader(dataset, batch_size=privacy.expected_batch_size, shuffle=True)
        self._part_size = privacy.physical_batch_size or privacy.expected_batch_size
        self._steps = 0
        self.steps_per_epoch = len(self._loader)
        self.total_steps = epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """See Run."""
        return self._steps

    def epoch(self) -> Iterator[None]:
        """See Run; gradients of physical batches are added up."""
        for batch in self._loader:
            self.optimizer.zero_grad()
            count = len(batch["label"])
            for start in range(0, count, self._part_size):
                rows = slice(start, start + self._part_size)
                part = {key: batch[key][rows] for key in ("image", "label")}
                (self._losses(part).sum() / count).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self._steps += 1
            yield

    def epsilon(self) -> float | str:
        """See Run."""
        return spoken(math.inf)

    def report(self) -> dict[str, Any]:
        """See Run."""
        return {
            "epsilon": self.epsilon(),
            "guarantee": "none",
            "reasons": ["private = false: neither clipped nor noisy"],
        }

    def state_dict(self) -> dict[str, Any]:
        """See Run."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Run."""
        self._steps = int(state["steps"])
