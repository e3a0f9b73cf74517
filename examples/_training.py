"""Training a small U-Net with and without differential privacy."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from _data import SegmentationData
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

import dpfast

EVALUATION_BATCH = 32

Gradients = dict[str, Tensor]
ClippingRule = Literal["automatic", "flat", "auto_v", "psac"]


@dataclass(frozen=True)
class Plan:
    """What the private and the non-private run have in common."""

    steps: int
    steps_per_epoch: int
    sample_rate: float
    expected_batch_size: int
    physical_batch_size: int
    averaging: float


@dataclass(frozen=True)
class Mechanism:
    """How the private run bounds and hides one record's gradient."""

    clipping: ClippingRule
    max_grad_norm: float
    noise_multiplier: float
    noise: dpfast.NoiseSource


@dataclass(frozen=True)
class Outcome:
    """The end of a run; `steps` counts every step begun, empty batches included."""

    dice: float
    steps: int
    seconds: float


def build_unet(dims: int, num_classes: int, channels: tuple[int, ...], seed: int) -> nn.Module:
    """Return a U-Net whose layers never mix samples, with public initial weights.

    Instance normalisation without running statistics keeps each sample's loss a
    function of that sample alone, as the clipping bound needs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(
            spatial_dims=dims,
            in_channels=1,
            out_channels=num_classes,
            channels=channels,
            strides=(2,) * (len(channels) - 1),
            norm="instance",
        )


def poisson_batches(
    num_records: int, sample_rate: float, steps: int, rng: random.Random
) -> Iterator[list[int]]:
    """Yield `steps` batches that include every record independently; some may be empty."""
    for _ in range(steps):
        yield [record for record in range(num_records) if rng.random() < sample_rate]


class GradientEngine:
    """Computes the step's gradient from the records of one Poisson batch."""

    def __init__(self, model: nn.Module, data: SegmentationData, plan: Plan) -> None:
        """Prepare the loss of every sample by itself."""
        self._model = model
        self._data = data
        self._plan = plan
        self._loss = dpfast.per_sample_loss(
            DiceCELoss(include_background=False, softmax=True, to_onehot_y=True)
        )

    def private(self, batch: list[int], mechanism: Mechanism) -> Gradients:
        """Return the clipped, noisy mean gradient; an empty batch gives noise alone.

        Physical batches are clipped and summed one after the other, so that memory is
        bounded; the noise is added once, with the last one.
        """
        total = self._zeros()
        *earlier, last = self._physical_batches(batch) or [[]]
        for part in earlier:
            dpfast.clip_and_noise(
                self._grad_samples(part),
                max_grad_norm=mechanism.max_grad_norm,
                noise_multiplier=0.0,
                clipping=mechanism.clipping,
                mechanism="none",
                out=total,
                accumulate=True,
            )
        dpfast.clip_and_noise(
            self._grad_samples(last),
            max_grad_norm=mechanism.max_grad_norm,
            noise_multiplier=mechanism.noise_multiplier,
            clipping=mechanism.clipping,
            mechanism="gaussian",
            expected_batch_size=self._plan.expected_batch_size,
            noise=mechanism.noise,
            out=total,
            accumulate=True,
        )
        return total

    def plain(self, batch: list[int]) -> Gradients:
        """Return the same mean gradient without clipping and without noise."""
        total = self._zeros()
        for part in self._physical_batches(batch):
            loss = self._losses(part).sum()
            gradients = torch.autograd.grad(loss, list(self._model.parameters()))
            for value, gradient in zip(total.values(), gradients, strict=True):
                value += gradient / self._plan.expected_batch_size
        return total

    def _losses(self, part: list[int]) -> Tensor:
        losses: Tensor = self._loss(
            self._model(self._data.images[part]), self._data.labels[part].unsqueeze(1)
        )
        return losses

    def _grad_samples(self, part: list[int]) -> Mapping[str, Tensor]:
        if not part:
            return {name: value[None][:0] for name, value in self._zeros().items()}
        with dpfast.per_sample_gradients(self._model) as grad_samples:
            self._losses(part).sum().backward()  # type: ignore[no-untyped-call]
        return grad_samples

    def _zeros(self) -> Gradients:
        return {name: torch.zeros_like(p) for name, p in self._model.named_parameters()}

    def _physical_batches(self, batch: list[int]) -> list[list[int]]:
        size = self._plan.physical_batch_size
        return [batch[start : start + size] for start in range(0, len(batch), size)]


def train(
    model: nn.Module,
    data: SegmentationData,
    plan: Plan,
    learning_rate: float,
    mechanism: Mechanism | None,
    rng: random.Random,
    on_step: Callable[[int, float | None], None],
) -> Outcome:
    """Train in place and return the validation Dice of the averaged weights.

    Without a mechanism the gradient is the plain mean and the run is not private; after
    every step `on_step` gets the steps begun and, at the end of an epoch, the Dice.
    """
    start = time.perf_counter()
    engine = GradientEngine(model, data, plan)
    params = dict(model.named_parameters())
    # Averaging the released weights is post-processing: it costs no privacy.
    averaged = copy.deepcopy(model).requires_grad_(False)
    average = dict(averaged.named_parameters())
    optimiser = torch.optim.Adam(params.values(), lr=learning_rate)
    steps, dice = 0, 0.0
    for batch in poisson_batches(data.num_records, plan.sample_rate, plan.steps, rng):
        steps += 1
        gradient = engine.plain(batch) if mechanism is None else engine.private(batch, mechanism)
        for name, value in params.items():
            value.grad = gradient[name]
        optimiser.step()
        decay = min(plan.averaging, steps / (steps + 10))
        for name, value in params.items():
            average[name].lerp_(value.detach(), 1.0 - decay)
        ends_epoch = steps % plan.steps_per_epoch == 0 or steps == plan.steps
        if ends_epoch:
            dice = validation_dice(averaged, data)
        on_step(steps, dice if ends_epoch else None)
    model.load_state_dict(averaged.state_dict())
    return Outcome(dice, steps, time.perf_counter() - start)


def validation_dice(model: nn.Module, data: SegmentationData) -> float:
    """Return the mean foreground Dice of the model on the held-out records."""
    images = data.validation_images
    with torch.no_grad():
        predictions = [
            model(images[start : start + EVALUATION_BATCH]).argmax(1)
            for start in range(0, len(images), EVALUATION_BATCH)
        ]
    return mean_foreground_dice(torch.cat(predictions), data.validation_labels, data.num_classes)


def mean_foreground_dice(predictions: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the Dice of int64 maps of shape (N, *spatial), averaged over images and classes.

    A class absent from both label map and prediction scores 1; the background is left out.
    """
    scores = []
    for index in range(1, num_classes):
        predicted = (predictions == index).flatten(1).double()
        actual = (labels == index).flatten(1).double()
        sizes = predicted.sum(1) + actual.sum(1)
        overlap = 2.0 * (predicted * actual).sum(1)
        scores.append(torch.where(sizes > 0, overlap / sizes.clamp(min=1.0), 1.0))
    return float(torch.stack(scores).mean())
