"""What `make_private` was asked for, checked and worked out before any data is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfast import _validate
from dpfast.privacy import _checks
from dpfast.privacy.accounting import SAMPLINGS, TrainingStep
from dpfast.privacy.loader import refuse_foreign_loader
from dpfast.privacy.sampling import SamplingPlan
from dpfast.privacy.thresholds import PercentilePaper, Statistic, Threshold, make_statistic
from dpfast.privacy.units import PrivacyUnits, find_units

__all__ = ["Request"]

_NAME = "PrivacyEngine"


@dataclass(frozen=True)
class Request:
    """The arguments of `PrivacyEngine.make_private`, which documents them, less the noise."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    data_loader: DataLoader[Any]
    max_grad_norm: Any
    criterion: Callable[..., torch.Tensor] | None
    probe: tuple[Any, ...] | None
    clipping: str
    stability_constant: float | None
    mechanism: str
    norm: str | None
    group_noise_weights: Any
    unit_reduction: str
    threshold: Threshold | None
    privacy_unit: str
    privacy_unit_ids: str | Sequence[Hashable] | None
    max_samples_per_unit: int | None
    sampling: str
    sample_rate: float | None
    max_batch_size: int | None
    loss_reduction: str
    physical_batch_size: int | None
    memory_budget: float | int | None
    strategy: str

    def check(self, num_processes: int) -> SamplingPlan:
        """Refuse what cannot be private; return how units are drawn. Reads no entry's data."""
        refuse_foreign_loader(self.data_loader)
        _checks.check_module(self.module, self.memory_budget, self.strategy)
        params = _checks.trained_parameters(self.module)
        _checks.check_optimizer(self.optimizer, params)
        _validate.choice(_NAME, "loss_reduction", self.loss_reduction, ("mean", "sum"))
        _validate.choice(_NAME, "mechanism", self.mechanism, ("gaussian", "laplace"))
        self._check_threshold(num_processes)
        _checks.check_clipping(params, self.bound, self.clip_settings())
        plan = self._sampling_plan()
        _checks.check_probe(self.module, self.criterion, self.probe)
        return plan

    def clip_settings(self) -> dict[str, Any]:
        """The keyword arguments of `clip_and_noise` that never change."""
        settings: dict[str, Any] = {
            "clipping": self.clipping,
            "stability_constant": self.stability_constant,
            "mechanism": self.mechanism,
            "norm": self.resolved_norm,
            "group_noise_weights": _checks.by_name(
                _checks.trained_parameters(self.module), self.group_noise_weights
            ),
            "unit_reduction": self.unit_reduction,
        }
        if isinstance(self.threshold, PercentilePaper):
            settings["percentile"] = self.threshold.percentile
        return settings

    @property
    def bound(self) -> Any:
        """`max_grad_norm` as `clip_and_noise` takes it; None where a percentile takes its place."""
        if isinstance(self.threshold, PercentilePaper):
            return None
        return _checks.by_name(_checks.trained_parameters(self.module), self.max_grad_norm)

    @property
    def resolved_norm(self) -> str:
        """The norm that is clipped."""
        if self.norm is not None:
            return self.norm
        return "l1" if self.mechanism == "laplace" else "l2"

    def step(self, noise_multiplier: float, plan: SamplingPlan) -> TrainingStep:
        """One step as the accountant sees it."""
        return TrainingStep(
            noise_multiplier=noise_multiplier,
            sample_rate=plan.sample_rate,
            num_units=plan.units.num_units,
            mechanism=self.mechanism,
            norm=self.resolved_norm,
            sampling=plan.scheme,
            max_batch_size=plan.max_batch_size,
        )

    def statistic(self, noise_multiplier: float, plan: SamplingPlan) -> Statistic | None:
        """What an adaptive threshold releases."""
        return make_statistic(
            self.threshold, self.max_grad_norm, noise_multiplier, plan.expected_batch_size
        )

    def reasons(self, noise_multiplier: float, secure: bool) -> list[str]:
        """Why there is no guarantee; empty where there is one."""
        found = []
        if isinstance(self.threshold, PercentilePaper):
            found.append("percentile_paper: the threshold is taken from private data without noise")
        if self.clipping == "none":
            found.append("clipping none: the sensitivity is unbounded")
        if noise_multiplier == 0.0:
            found.append("noise_multiplier 0: no noise is added")
        if not secure:
            found.append("seeded noise: who knows the seed can remove it")
        return found

    def description(self, plan: SamplingPlan, statistic: Statistic | None) -> dict[str, Any]:
        """What a reader of the ledger wants to know about a training step; JSON-able."""
        paper = self.threshold if isinstance(self.threshold, PercentilePaper) else None
        threshold: Any = None if statistic is None else statistic.description()
        if paper is not None:
            threshold = {"type": "PercentilePaper", "percentile": paper.percentile}
        return {
            "release": "training step",
            "protects": plan.units.statement,
            "mechanism": self.mechanism,
            "norm": self.resolved_norm,
            "clipping": self.clipping,
            "stability_constant": self.stability_constant,
            "max_grad_norm": None if paper else _plain(self.max_grad_norm),
            "group_noise_weights": _plain(self.group_noise_weights),
            "unit_reduction": self.unit_reduction,
            "threshold": threshold,
            "sampling": plan.scheme,
            "sample_rate": plan.sample_rate,
            "num_units": plan.units.num_units,
            "expected_batch_size": plan.expected_batch_size,
            "steps_per_epoch": plan.steps_per_epoch,
            "max_batch_size": plan.max_batch_size,
            "max_samples_per_unit": plan.max_samples_per_unit,
            "loss_reduction": self.loss_reduction,
            "arithmetic": "floating point; the guarantee is one of real arithmetic",
        }

    def _check_threshold(self, num_processes: int) -> None:
        threshold = self.threshold
        if threshold is None:
            return
        if isinstance(threshold, PercentilePaper):
            if self.physical_batch_size is not None or num_processes > 1:
                raise ValueError(
                    f"{_NAME}: threshold PercentilePaper needs a step's whole batch at once: "
                    "physical_batch_size None and one process"
                )
            return
        if self.mechanism != "gaussian":
            raise ValueError(
                f"{_NAME}: threshold must be None or PercentilePaper with mechanism "
                f"{self.mechanism!r}: its noise is Gaussian, and the accountant knows no bound for "
                "both in one sampled batch"
            )
        if self.clipping in ("normalized", "none"):
            raise ValueError(
                f"{_NAME}: threshold must be None with clipping {self.clipping!r}, whose bound is "
                "no threshold"
            )

    def _sampling_plan(self) -> SamplingPlan:
        units = find_units(self.data_loader.dataset, self.privacy_unit, self.privacy_unit_ids)
        _validate.choice(_NAME, "sampling", self.sampling, SAMPLINGS)
        per_unit = _checks.positive_int("max_samples_per_unit", self.max_samples_per_unit)
        if per_unit is not None and units.name == "sample":
            raise ValueError(
                f"{_NAME}: max_samples_per_unit must be None for privacy_unit 'sample', which is "
                f"one entry, got {per_unit}"
            )
        self._check_physical_batch_size(units, per_unit)
        batch_size = int(self.data_loader.batch_size or 0)
        if self.sample_rate is not None:
            rate = _validate.number(
                _NAME, "sample_rate", self.sample_rate, minimum=0.0, maximum=1.0, exclusive=True
            )
            steps = math.ceil(1.0 / rate)
        elif batch_size > units.num_units:
            raise ValueError(
                f"{_NAME}: the data_loader's batch_size, the expected number of units in a step, "
                f"must be <= {units.num_units}, the number of units, got {batch_size}"
            )
        else:
            rate, steps = batch_size / units.num_units, math.ceil(units.num_units / batch_size)
        if self.sampling == "shuffled_unamplified":
            rate = 1.0 / steps
        return SamplingPlan(
            units=units,
            scheme=self.sampling,
            sample_rate=rate,
            steps_per_epoch=steps,
            max_batch_size=_checks.positive_int("max_batch_size", self.max_batch_size),
            max_samples_per_unit=per_unit,
        )

    def _check_physical_batch_size(self, units: PrivacyUnits, per_unit: int | None) -> None:
        size = _checks.positive_int("physical_batch_size", self.physical_batch_size)
        largest = units.largest() if per_unit is None else min(units.largest(), per_unit)
        if size is not None and largest > size:
            raise ValueError(
                f"{_NAME}: physical_batch_size must hold all samples of any unit, which are "
                f"clipped together, got {size}; raise it or set max_samples_per_unit"
            )


def _plain(value: Any) -> Any:
    """A bound or weights as JSON."""
    if hasattr(value, "tolist"):  # a tensor, an array or one of their numbers
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
