"""The private step: per-sample gradients in, one clipped and noisy gradient out, counted first."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from dpfast._validate import MIN_BOUND
from dpfast.errors import PrivacyError
from dpfast.grad_sample import PerSampleGradients, per_sample_gradients
from dpfast.ops import ClipStats, NoiseSource, clip_and_noise
from dpfast.privacy._group import Group
from dpfast.privacy.ledger import PrivacyLedger
from dpfast.privacy.loader import Part
from dpfast.privacy.thresholds import Statistic

__all__ = ["PrivateSteps", "StepSettings"]

_NAME = "PrivacyEngine"
# What stands open on this thread, across engines: a loop that ended with an error leaves its
# gradient context on the stack until its frames are gone.
_OPEN = threading.local()


@dataclass(frozen=True)
class StepSettings:
    """How gradients are clipped and hidden.

    Attributes:
      clip: the keyword arguments of `clip_and_noise` that never change.
      bound: the threshold where it is fixed; None with a percentile.
      noise_multiplier: of the gradient, larger than the accountant's where a statistic has a share.
      divisor: of the noisy sum; None: no division.
      engine: the keyword arguments of `per_sample_gradients`.
      once_per_epoch: whether one count of the ledger covers all steps of an epoch.
    """

    clip: Mapping[str, Any]
    bound: Any
    noise_multiplier: float
    divisor: float | None
    engine: Mapping[str, Any]
    once_per_epoch: bool = False


class PrivateSteps:
    """Takes the private steps of one training run.

    A part that the loader hands out opens a gradient context; `optimizer.step()` closes it, adds
    its clipped gradients up and, with a step's last part, counts the step in the ledger, adds noise
    and puts the result in the parameters' `.grad`. Until then `.grad` is None, so that the
    optimizer leaves the weights as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings,
        statistic: Statistic | None,
        ledger: PrivacyLedger,
        mechanism: int,
        noise: NoiseSource,
        group: Group,
    ) -> None:
        self.settings = settings
        self.statistic = statistic
        self.max_spends: int | None = None
        self._model = model
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._ledger, self._mechanism = ledger, mechanism
        self._noise, self._group = noise, group
        self._context: PerSampleGradients | None = None
        self._part: Part | None = None
        self._unit_of_row: list[int] = []
        self._sums: dict[str, torch.Tensor] | None = None
        self._counted: torch.Tensor | None = None
        self._last_percentile: Any = MIN_BOUND
        self._epoch_paid = False
        # Weakly: gradients are as large as the model, and theirs who hold the parameters. Not by
        # Python's own references, which do not know that `.grad` may own the tensor's object.
        self._released: dict[str, TensorWeakRef] = {}

    # --- what the loader calls ---

    def begin_epoch(self) -> int:
        """How many steps the budget allows in this epoch."""
        # Layers are looked at again: the module may be in another mode than at set-up.
        per_sample_gradients(self._model, **self.settings.engine)
        self._epoch_paid = False
        if self.max_spends is None:
            return 2**62
        left = self.max_spends - self._ledger.spending(self._mechanism).spends
        if left <= 0:
            raise PrivacyError(
                f"{_NAME}: the budget is spent: all {self.max_spends} of the steps (or epochs, "
                "where one count covers an epoch) that the target allows were begun"
            )
        return 2**62 if self.settings.once_per_epoch else left

    def open(self, part: Part, unit_of_row: list[int]) -> None:
        """Begin to collect per-sample gradients."""
        stale: PrivateSteps | None = getattr(_OPEN, "steps", None)
        if stale is not None and stale is not self:
            stale.abandon()
        params = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if params.keys() != self._params.keys() or any(
            params[name] is not p for name, p in self._params.items()
        ):
            raise PrivacyError(
                f"{_NAME}: the model's trained parameters changed since make_private; make a new "
                "engine with the same ledger"
            )
        self._released.clear()
        for param in params.values():
            param.grad = None
        self._context = per_sample_gradients(self._model, **self.settings.engine).__enter__()
        self._part, self._unit_of_row = part, unit_of_row
        _OPEN.steps = self

    def require_taken(self) -> None:
        """Raise where a part was handed out and not stepped."""
        if self._part is not None:
            raise PrivacyError(
                f"{_NAME}: optimizer.step() must follow every batch of the private loader, those "
                "with 0 samples too, before the next one is drawn"
            )

    def abandon(self) -> None:
        """Forget what is open: nothing of it was released."""
        context, self._context = self._context, None
        self._part, self._sums, self._counted = None, None, None
        if context is not None:
            self._leave(context, failed=True)

    # --- what the optimizer calls ---

    def before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """A pre-hook of `optimizer.step`: see torch.optim.Optimizer.register_step_pre_hook."""
        if self._part is None:
            self._refuse_foreign_gradients(optimizer)
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._take(self._part)
        except BaseException:
            self.abandon()
            raise
        self._refuse_foreign_gradients(optimizer)
        if closure is None:
            return None
        return (args[0], lambda: loss), {k: v for k, v in kwargs.items() if k != "closure"}

    def _take(self, part: Part) -> None:
        context, self._context = self._context, None
        assert context is not None
        self._leave(context, failed=not self._unit_of_row)
        grads: Mapping[str, torch.Tensor] = context if self._unit_of_row else self._no_gradients()
        if self._unit_of_row:
            self._check_rows(context)
        if part.last:
            self._release(grads)
        else:
            self._sums, stats = self._clip(grads, noise_multiplier=0.0, divisor=None)
            self._count(stats)
        self._part = None

    def _release(self, grads: Mapping[str, torch.Tensor]) -> None:
        paid = self.settings.once_per_epoch and self._epoch_paid
        # On the disk before any noise is drawn: a process killed here has counted too much.
        self._ledger.record(self._mechanism, spends=0 if paid else 1)
        self._epoch_paid = True
        first = self._group.is_first
        multiplier = self.settings.noise_multiplier if first else 0.0
        sums, stats = self._clip(grads, noise_multiplier=multiplier, divisor=self.settings.divisor)
        self._group.add_up(sums)
        self._count(stats)
        self._release_statistic()
        self._sums = None
        for name, param in self._params.items():
            param.grad = sums[name].to(param.dtype)
            self._released[name] = TensorWeakRef(param.grad)

    def _clip(
        self,
        grads: Mapping[str, torch.Tensor],
        *,
        noise_multiplier: float,
        divisor: float | None,
    ) -> tuple[dict[str, torch.Tensor], ClipStats | None]:
        """The part's clipped sums added to those of the parts before it."""
        settings: dict[str, Any] = dict(self.settings.clip)
        if noise_multiplier == 0.0:
            settings["mechanism"] = "none"
        if len(set(self._unit_of_row)) < len(self._unit_of_row):
            device = next(iter(self._params.values())).device
            settings["privacy_unit_ids"] = torch.tensor(self._unit_of_row, device=device)
        paper = settings.get("percentile") is not None
        bound = self.settings.bound
        if self.statistic is not None:
            bound = self.statistic.bound.to(next(iter(self._params.values())).device)
        elif paper and not self._unit_of_row:
            # Nothing to take a percentile of: the one before stands.
            del settings["percentile"]
            bound = self._last_percentile
        want_stats = self.statistic is not None or paper
        call: Any = clip_and_noise  # the overloads want a literal return_stats
        result = call(
            grads,
            max_grad_norm=bound,
            noise_multiplier=noise_multiplier,
            expected_batch_size=divisor,
            noise=self._noise,
            out=self._sums,
            accumulate=self._sums is not None,
            return_stats=want_stats,
            **settings,
        )
        sums, stats = result if want_stats else (result, None)
        if stats is not None and paper:
            self._last_percentile = stats.max_grad_norm
        return dict(sums), stats

    def _count(self, stats: ClipStats | None) -> None:
        if self.statistic is None or stats is None:
            return
        # With several rows a unit there are more slots than units.
        norms = stats.sensitive_norms[: len(set(self._unit_of_row))]
        counted = self.statistic.count(norms)
        self._counted = counted if self._counted is None else self._counted + counted

    def _release_statistic(self) -> None:
        """Noise on the count or histogram; it is part of the step that the ledger has counted."""
        statistic, counted = self.statistic, self._counted
        if statistic is None or counted is None:
            return
        if self._group.is_first:
            clip_and_noise(
                counted.new_zeros(0, statistic.size),
                max_grad_norm=statistic.sensitivity,
                noise_multiplier=statistic.noise / statistic.sensitivity,
                noise=self._noise,
                out=counted,
                accumulate=True,
            )
        self._group.add_up({"counted": counted})
        statistic.update(counted)
        self._counted = None

    def _no_gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().new_zeros(0, *p.shape) for name, p in self._params.items()}

    def _check_rows(self, context: PerSampleGradients) -> None:
        rows = next(iter(context.parts().values())).shape[0]
        if rows != len(self._unit_of_row):
            raise PrivacyError(
                f"{_NAME}: the loss must have one entry for each sample of the batch, got another "
                "number: nobody knows to whom they belong"
            )

    def _leave(self, context: PerSampleGradients, *, failed: bool) -> None:
        if getattr(_OPEN, "steps", None) is self:
            _OPEN.steps = None
        # Without samples there may be no backward pass; the context must not ask for it.
        error = GeneratorExit() if failed else None
        context.__exit__(None if error is None else type(error), error, None)

    def _refuse_foreign_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise where the optimizer would use a gradient that is not a private one."""
        known = {id(param): name for name, param in self._params.items()}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                released = self._released.get(known.get(id(param), ""))
                if released is None or released() is not param.grad:
                    raise PrivacyError(
                        f"{_NAME}: optimizer.step() got a gradient that the engine did not "
                        "release: call backward inside the loop over the private loader"
                    )
