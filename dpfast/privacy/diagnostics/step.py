"""One probe batch of `alignment`: its gradients once, then every clipping rule on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpfast.grad_sample import PerSampleGradients, per_sample_gradients
from dpfast.ops import NoiseSource, clip_and_noise
from dpfast.privacy.diagnostics import figures
from dpfast.privacy.diagnostics.figures import Units
from dpfast.privacy.diagnostics.report import SumFigures

__all__ = ["NAME", "Probe", "Rule", "Step", "buffers_kept", "take_step"]

NAME = "alignment"
_NO_NOISE: dict[str, Any] = {"noise_multiplier": 0.0, "mechanism": "none"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """One clipping rule with its settings.

    Attributes:
      sensitivity: B; what clip_and_noise calls max_grad_norm.
      constant: gamma or r; None: the rule's default, or it has none.
    """

    name: str
    sensitivity: float
    constant: float | None

    def settings(self) -> dict[str, Any]:
        """Of clip_and_noise."""
        return {
            "clipping": self.name,
            "max_grad_norm": self.sensitivity,
            "stability_constant": self.constant,
        }


@dataclass(frozen=True)
class Probe:
    """What is asked of every batch; see `alignment`.

    Attributes:
      members: by layer group, the places of its parameters.
    """

    loss_of: Callable[[nn.Module, Any], torch.Tensor]
    rules: list[Rule]
    members: dict[str, list[int]]
    noise_multiplier: float
    privacy_unit_ids_of: Callable[[Any], torch.Tensor] | None
    foreground_of: Callable[[Any], torch.Tensor] | None
    noise: NoiseSource


@dataclass(frozen=True)
class Step:
    """What one batch gave; `sums` by rule, all parameters together first, then each group."""

    units: Units
    nonfinite_units: int
    diversity: float | None
    sums: dict[str, list[SumFigures]]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the forward passes do to the model's buffers is undone."""
    held = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, before in held:
                owner[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def take_step(model: nn.Module, batch: Any, probe: Probe) -> Step:
    """The figures of one batch; its gradients are gone afterwards."""
    grads = _gradients(model, batch, probe)
    num_rows = next(iter(grads.values())).shape[0]
    ids = None if probe.privacy_unit_ids_of is None else probe.privacy_unit_ids_of(batch)
    foreground = None
    if probe.foreground_of is not None:
        foreground = _checked_foreground(probe.foreground_of(batch), num_rows)

    total, stats = clip_and_noise(
        grads,
        clipping="none",
        max_grad_norm=1.0,
        privacy_unit_ids=ids,
        return_stats=True,
        **_NO_NOISE,
    )
    unit_of_row = torch.arange(num_rows)
    if ids is not None:  # ascending, as the norms are
        unit_of_row = torch.unique(ids.cpu(), return_inverse=True)[1]
    num_units = int(unit_of_row.max()) + 1 if num_rows else 0
    norms = stats.sensitive_norms[:num_units]
    total_squares = figures.inner_products(total, total)
    # Row u of the identity goes into entry u of the sum: with the units' norms, the sum is phi.
    identity = torch.eye(num_units, dtype=torch.float64, device=norms.device)

    sums, weights = {}, {}
    for rule in probe.rules:
        settings = {**_NO_NOISE, **rule.settings(), "norms": norms}
        clipped = clip_and_noise(grads, privacy_unit_ids=ids, **settings)
        sums[rule.name] = _sums(clipped, total, total_squares, rule, probe)
        weights[rule.name] = clip_and_noise(identity, **settings).cpu()

    norms = norms.cpu()
    finite = norms.isfinite()
    total_square = float(total_squares.sum())
    along = _unit_means(figures.row_products(grads, total, num_rows)[:, None], unit_of_row)[:, 0]
    cosines = (along / (norms * total_square**0.5)).clamp(-1.0, 1.0)
    units = Units(
        norms=norms[finite],
        cosines=cosines[finite],
        weights={name: weight[finite] for name, weight in weights.items()},
        foreground=None if foreground is None else _unit_means(foreground, unit_of_row)[finite],
    )
    return Step(
        units=units,
        nonfinite_units=int((~finite).sum()),
        diversity=figures.ratio(total_square, float(units.norms.square().sum())),
        sums=sums,
    )


def _gradients(model: nn.Module, batch: Any, probe: Probe) -> PerSampleGradients:
    # Sums of gradients that were not formed would be rounded in float32.
    with per_sample_gradients(model, strategy="keep") as grads:
        loss = probe.loss_of(model, batch)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"{NAME}: loss_of must return a tensor, got {type(loss).__name__}")
        loss.backward()  # type: ignore[no-untyped-call]
    return grads


def _checked_foreground(value: Any, num_rows: int) -> torch.Tensor:
    """(B, classes) as float64 on the CPU."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{NAME}: foreground_of must return a tensor, got {type(value).__name__}")
    shown = value.detach().to("cpu", torch.float64)
    usable = shown.dim() == 2 and len(shown) == num_rows
    if not (usable and bool(((shown >= 0) & shown.isfinite()).all())):
        raise ValueError(
            f"{NAME}: foreground_of must return finite amounts >= 0 of shape ({num_rows}, "
            f"classes), got shape {tuple(shown.shape)}"
        )
    return shown


def _unit_means(rows: torch.Tensor, unit_of_row: torch.Tensor) -> torch.Tensor:
    """(B, k) to the means over the rows of each unit, (units, k)."""
    counts = unit_of_row.bincount()
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, unit_of_row, rows)
    return sums / counts[:, None]


def _sums(
    clipped: Tensors, total: Tensors, total_squares: torch.Tensor, rule: Rule, probe: Probe
) -> list[SumFigures]:
    """Of all parameters together, then of each group."""
    noisy = _with_noise(clipped, rule, probe)
    products = torch.stack(
        [
            figures.inner_products(clipped, clipped),
            figures.inner_products(clipped, total),
            figures.inner_products(noisy, noisy),
            figures.inner_products(noisy, total),
            total_squares,
        ]
    )
    sizes = [value.numel() for value in total.values()]
    return [
        figures.sum_figures(
            products[:, places].sum(1),
            sum(sizes[place] for place in places),
            probe.noise_multiplier * rule.sensitivity,
        )
        for places in (list(range(len(sizes))), *probe.members.values())
    ]


def _with_noise(clipped: Tensors, rule: Rule, probe: Probe) -> Tensors:
    """What a training step would release: the noise comes by the same call."""
    noisy = {name: value.clone() for name, value in clipped.items()}
    clip_and_noise(
        {name: value.new_empty((0, *value.shape)) for name, value in clipped.items()},
        **rule.settings(),
        noise_multiplier=probe.noise_multiplier,
        noise=probe.noise,
        out=noisy,
        accumulate=True,
    )
    return noisy
