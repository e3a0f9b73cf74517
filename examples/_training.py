"""Training a small U-Net with and without differential privacy."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from _data import SegmentationData
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

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
        """Prepare the per-sample and the summed gradient functions."""
        self._data = data
        self._plan = plan
        criterion = DiceCELoss(include_background=False, softmax=True)

        def sample_loss(params: Gradients, image: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(model, params, (image.unsqueeze(0),))
            loss: Tensor = criterion(logits, target.unsqueeze(0))
            return loss

        def summed_loss(params: Gradients, images: Tensor, targets: Tensor) -> Tensor:
            return vmap(sample_loss, in_dims=(None, 0, 0))(params, images, targets).sum()

        self._sample_gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0))
        self._summed_gradient = grad(summed_loss)

    def private(self, params: Gradients, batch: list[int], mechanism: Mechanism) -> Gradients:
        """Return the clipped, noisy mean gradient; an empty batch gives noise alone.

        Physical batches are clipped and summed one after the other, so that memory is
        bounded; the noise is added once, with the last one.
        """
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        *earlier, last = self._physical_batches(batch) or [[]]
        for part in earlier:
            dpfast.clip_and_noise(
                self._grad_samples(params, part),
                max_grad_norm=mechanism.max_grad_norm,
                noise_multiplier=0.0,
                clipping=mechanism.clipping,
                mechanism="none",
                out=total,
                accumulate=True,
            )
        dpfast.clip_and_noise(
            self._grad_samples(params, last),
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

    def plain(self, params: Gradients, batch: list[int]) -> Gradients:
        """Return the same mean gradient without clipping and without noise."""
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        for part in self._physical_batches(batch):
            for name, value in self._summed_gradient(params, *self._tensors(part)).items():
                total[name] += value / self._plan.expected_batch_size
        return total

    def _grad_samples(self, params: Gradients, part: list[int]) -> Gradients:
        if not part:
            return {name: value.new_zeros((0, *value.shape)) for name, value in params.items()}
        grad_samples: Gradients = self._sample_gradients(params, *self._tensors(part))
        return grad_samples

    def _physical_batches(self, batch: list[int]) -> list[list[int]]:
        size = self._plan.physical_batch_size
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _tensors(self, part: list[int]) -> tuple[Tensor, Tensor]:
        # One-hot here because MONAI's own conversion writes in place, which vmap forbids.
        one_hot = nn.functional.one_hot(self._data.labels[part], self._data.num_classes)
        return self._data.images[part], one_hot.movedim(-1, 1).float()


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
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    # Averaging the released weights is post-processing: it costs no privacy.
    average = {name: value.clone() for name, value in params.items()}
    optimiser = torch.optim.Adam(params.values(), lr=learning_rate)
    steps, dice = 0, 0.0
    for batch in poisson_batches(data.num_records, plan.sample_rate, plan.steps, rng):
        steps += 1
        gradient = (
            engine.plain(params, batch)
            if mechanism is None
            else engine.private(params, batch, mechanism)
        )
        for name, value in params.items():
            value.grad = gradient[name]
        optimiser.step()
        decay = min(plan.averaging, steps / (steps + 10))
        for name, value in params.items():
            average[name].lerp_(value, 1.0 - decay)
        ends_epoch = steps % plan.steps_per_epoch == 0 or steps == plan.steps
        if ends_epoch:
            model.load_state_dict(average)
            dice = validation_dice(model, data)
        on_step(steps, dice if ends_epoch else None)
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
