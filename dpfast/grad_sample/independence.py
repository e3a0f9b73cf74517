"""The detector of samples that influence one another (DP_SPEC, losses)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dpfast.errors import PrivacyError
from dpfast.grad_sample.engine import per_sample_gradients

__all__ = ["refuse_coupling"]

_NAME = "refuse_coupling"
_TOLERANCE = 1e-6  # of per-sample gradients in float64; a wrong grouping is off by far more


def refuse_coupling(
    model: nn.Module,
    inputs: torch.Tensor | Sequence[torch.Tensor],
    loss: Callable[..., torch.Tensor],
    *targets: torch.Tensor,
) -> None:
    """Raise where one sample can influence what another one contributes to a step.

    Run it once at set-up, with random tensors of the shapes that training will use: an error on
    private data would itself tell something about them. It works on a float64 copy of the model
    in its present mode, and leaves the model and the random number generators as they were.

    Found are: a loss entry that depends on another sample's input, a forward pass that changes a
    buffer, and per-sample gradients that are not those of the loss's entries (samples that are not
    grouped along the first axis where a parameter is used).

    Args:
      model: the network.
      inputs: what it is called with, tensors (B, ...) with B >= 2; random, not private.
      loss: called with the model's output and the targets; returns (B,).
      targets: what the loss takes besides; random, not private.

    Raises:
      PrivacyError: the samples are coupled.
      ValueError: fewer than two samples.
    """
    given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    if not given or any(len(tensor) < 2 for tensor in given):
        raise ValueError(f"{_NAME}: inputs must hold at least two samples")
    double = copy.deepcopy(model).double()
    probes = [_probe(tensor) for tensor in given]
    goals = [t.double() if t.is_floating_point() else t for t in targets]
    devices = [t.device.index or 0 for t in given if t.device.type == "cuda"]
    with torch.random.fork_rng(devices), torch.enable_grad():
        state = torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in double.named_buffers()}
        values = _vector(loss(double(*probes), *goals), len(given[0]))
        _refuse_changed_buffers(double, buffers)
        _refuse_cross_gradients(values, probes)
        # The same random numbers, so that dropout drops the same.
        torch.set_rng_state(state)
        with per_sample_gradients(double) as grads:
            loss(double(*probes), *goals).sum().backward()  # type: ignore[no-untyped-call]
        _refuse_wrong_gradients(double, values, grads)


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_()


def _vector(values: torch.Tensor, batch_size: int) -> torch.Tensor:
    if values.shape != (batch_size,):
        raise PrivacyError(
            f"{_NAME}: the loss must have shape ({batch_size},), one number per sample, got "
            f"{tuple(values.shape)}; dpfast.per_sample_loss(loss) adapts MONAI's losses"
        )
    return values


def _refuse_changed_buffers(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise PrivacyError(
                f"{_NAME}: the forward pass changes the buffer {name}, which would publish what it "
                "takes from the batch"
            )


def _refuse_cross_gradients(values: torch.Tensor, probes: Sequence[torch.Tensor]) -> None:
    differentiable = [probe for probe in probes if probe.requires_grad]
    for sample in range(len(values) if differentiable else 0):
        grads = torch.autograd.grad(
            values[sample], differentiable, retain_graph=True, allow_unused=True
        )
        for grad in grads:
            if grad is None:
                continue
            strength = grad.flatten(1).abs().amax(1)
            strength[sample] = 0.0
            if not (strength == 0.0).all():
                other = int(strength.argmax())
                raise PrivacyError(
                    f"{_NAME}: the loss of sample {sample} depends on sample {other} (gradient "
                    f"{float(strength[other]):.1e}); a layer or the loss mixes the samples"
                )


def _refuse_wrong_gradients(model: nn.Module, values: torch.Tensor, grads: Any) -> None:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for sample in range(len(values)):
        truth = torch.autograd.grad(
            values[sample], list(params.values()), retain_graph=True, allow_unused=True
        )
        size = max(float(t.abs().max()) for t in truth if t is not None)
        for name, expected in zip(params, truth, strict=True):
            found = grads[name][sample]
            off = found if expected is None else found - expected
            if float(off.abs().max()) > _TOLERANCE * max(size, 1e-300):
                raise PrivacyError(
                    f"{_NAME}: the per-sample gradient of {name} is not that of sample {sample}'s "
                    "loss; where the parameter is used, the samples are not grouped along the "
                    "first axis"
                )
