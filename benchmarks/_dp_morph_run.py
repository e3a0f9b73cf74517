"""One training run of the DP-Morph experiment, and the scores of what it learned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import dpfast
from dpfast.morphology import DPMorph, adapt
from dpfast.morphology.label_maps import refine_by
from dpfast.segmentation import ClassScores, Labels, class_scores
from dpfast.segmentation.data import Data, load_data
from dpfast.segmentation.models import build_model
from dpfast.segmentation.settings import Settings, load_settings
from dpfast.segmentation.training import WeightAverage

__all__ = ["OPERATION", "Choice", "Experiment", "Trained"]

OPERATION, FIXED_SIZE = "close", 3
# Of the measurement of sizes. With 215 patients, two classes and six octaves 10 is about the most
# that they can bear; fewer patients fall back to the fixed size.
MEASUREMENT_NOISE = 10.0
_TOLERANCE = 1.0  # of the surface Dice, in pixels
_EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Choice:
    """What is varied."""

    variant: str
    rule: str
    epsilon: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """A run's model, what is written down about it, and what follows the model's scores.

    Attributes:
      operation: that of the training; the fixed one where there was none.
    """

    model: nn.Module
    record: dict[str, Any]
    operation: DPMorph


class Experiment:
    """The runs of one task.

    Args:
      settings_file: an example's; data, network, optimizer, delta, batch size and unit are its.
      path: of the data set.
      epochs: instead of the example's.
      max_grad_norm: likewise; 1 where the rule scales every gradient to that norm.
    """

    def __init__(self, settings_file: Path, path: Path, epochs: int, max_grad_norm: float) -> None:
        settings = load_settings(settings_file)
        self.settings: Settings = settings.model_copy(
            update={"data": settings.data.model_copy(update={"path": str(path)})}
        )
        self.epochs = epochs
        self.max_grad_norm = max_grad_norm
        # Noise by target and whether sizes are measured: the same for all rules and seeds.
        self._noise: dict[tuple[float, bool], float] = {}

    @cached_property
    def data(self) -> Data:
        """Read once."""
        return load_data(self.settings.data)

    def run(self, choice: Choice) -> Trained:
        """Train and evaluate."""
        from monai.losses.dice import DiceCELoss

        privacy, training, task = self.settings.privacy, self.settings.training, self.data.task
        threshold = 1.0 if choice.rule == "normalized" else self.max_grad_norm
        dataset: Any = self.data.training
        model = build_model(
            self.settings.model.name,
            task,
            self.settings.model.arguments,
            weights_seed=choice.seed,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
        loss = dpfast.per_sample_loss(
            DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
        )
        average = WeightAverage(model, training.averaging)
        with tempfile.TemporaryDirectory() as folder:
            ledger = dpfast.PrivacyLedger(Path(folder) / "ledger.jsonl")
            morph, sizes = self._morph(choice.variant, ledger)
            engine = dpfast.PrivacyEngine(ledger=ledger)
            measured = choice.variant == "adaptive"
            budget: dict[str, Any] = {
                "target_epsilon": choice.epsilon,
                "target_delta": privacy.target_delta,
                "epochs": self.epochs,
            }
            known = self._noise.get((choice.epsilon, measured))
            make: Any = engine.make_private_with_epsilon
            if known is not None:
                make, budget = engine.make_private, {"noise_multiplier": known}
            by_patient = privacy.privacy_unit == "patient"
            _, _, loader = make(
                module=model,
                optimizer=optimizer,
                data_loader=DataLoader(dataset, batch_size=privacy.expected_batch_size),
                max_grad_norm=threshold,
                clipping=choice.rule,
                privacy_unit=privacy.privacy_unit,
                privacy_unit_ids="patient_id" if by_patient else None,
                physical_batch_size=privacy.physical_batch_size,
                **budget,
            )
            for _ in range(self.epochs):
                for batch in loader:
                    optimizer.zero_grad()
                    loss(morph(model(batch["image"])), batch["label"]).sum().backward()
                    before = average.count
                    optimizer.step()
                    if engine.steps > before:
                        average.update(model)
            noise = ledger.mechanisms[-1].description["noise_multiplier"]
            self._noise[choice.epsilon, measured] = noise
            assert privacy.target_delta is not None
            epsilon = ledger.epsilon(privacy.target_delta)
        unit = privacy.privacy_unit
        record = {
            **{name: getattr(choice, name) for name in ("variant", "rule", "epsilon", "seed")},
            "epochs": self.epochs,
            "max_grad_norm": threshold,
            "steps": average.count,
            "noise_multiplier": noise,
            "spent_epsilon": epsilon,
            "delta": privacy.target_delta,
            "unit": unit,
            "training_units": self.data.num_training[unit],
            "validation_units": self.data.num_validation[unit],
            "sizes": sizes,
            **self.evaluate(average.model, morph),
        }
        return Trained(average.model.eval(), record, self._operation(morph))

    def _morph(self, variant: str, ledger: dpfast.PrivacyLedger) -> tuple[nn.Module, Any]:
        """What stands between scores and loss, and its size for each class."""
        classes = self.data.task.num_classes
        if variant == "none":
            return nn.Identity(), None
        if variant == "fixed":
            return DPMorph(OPERATION, FIXED_SIZE), [FIXED_SIZE] * (classes - 1)
        dataset: Any = self.data.training
        adapted = adapt(
            Labels(dataset),
            [record["patient_id"] for record in dataset.data],
            num_classes=classes,
            noise_multiplier=MEASUREMENT_NOISE,
            ledger=ledger,
            fixed_size=FIXED_SIZE,
            operation=OPERATION,
        )
        return adapted.morph, list(adapted.sizes.values())

    @staticmethod
    def _operation(morph: nn.Module) -> DPMorph:
        return morph if isinstance(morph, DPMorph) else DPMorph(OPERATION, FIXED_SIZE)

    def evaluate(self, model: nn.Module, morph: nn.Module) -> dict[str, Any]:
        """Scores of what the model predicts by itself, and after the operation.

        Returns:
          "scores": by itself; "morphed_scores": the operation between its scores and the choice of
          the class, as in training; "refined_scores": the operation on the predicted classes. Each
          by measure and class: means over the validation images that have the class, None where
          none has it.
        """
        classes = self.data.task.num_classes
        operation = self._operation(morph)
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "scores": lambda scores: scores.argmax(1, keepdim=True),
            "morphed_scores": lambda scores: operation(scores).argmax(1, keepdim=True),
            "refined_scores": lambda scores: refine_by(
                operation, scores.argmax(1, keepdim=True), classes
            ),
        }
        parts: dict[str, list[ClassScores]] = {name: [] for name in ways}
        model.eval()
        with torch.no_grad():
            for batch in DataLoader(self.data.validation, batch_size=_EVALUATION_BATCH):
                scores = model(batch["image"])
                for name, choose in ways.items():
                    found = class_scores(
                        choose(scores), batch["label"], classes, tolerance=_TOLERANCE
                    )
                    parts[name].append(found)
        return {name: _means(each) for name, each in parts.items()}

    def alike(self, choice: Choice) -> list[Choice]:
        """The choice with each variant, for a comparison by eye."""
        return [replace(choice, variant=each) for each in ("none", "fixed", "adaptive")]


def _means(parts: Sequence[ClassScores]) -> dict[str, list[float | None]]:
    found = {}
    for name in ("dice", "hausdorff95", "surface_dice"):
        means = torch.cat([getattr(part, name) for part in parts]).nanmean(0).tolist()
        found[name] = [None if math.isnan(each) else each for each in means]
    return found
