"""`PrivacyEngine`: sampler, mechanism and accountant in one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.ops import NoiseSource
from dpfast.privacy import _checks, accounting
from dpfast.privacy._group import Group
from dpfast.privacy._request import Request
from dpfast.privacy.ledger import PrivacyLedger
from dpfast.privacy.loader import PrivateLoader
from dpfast.privacy.sampling import SamplingPlan, UnitSampler
from dpfast.privacy.steps import PrivateSteps, StepSettings
from dpfast.privacy.thresholds import Threshold

__all__ = ["PrivacyEngine"]

_NAME = "PrivacyEngine"
_FORMAT = "dpfast.PrivacyEngine/1"
Module = TypeVar("Module", bound=nn.Module)
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class PrivacyEngine:
    """Makes a training loop private and knows what it has spent.

        engine = dpfast.PrivacyEngine(ledger="run/ledger.jsonl")
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model, optimizer=optimizer, data_loader=loader,
            target_epsilon=8.0, target_delta=1e-5, epochs=20, max_grad_norm=1.0,
        )
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)  # (B,): dpfast.per_sample_loss(criterion)
            loss.sum().backward()
            optimizer.step()
        engine.get_epsilon(1e-5)

    The engine draws the batches, clips, adds the noise and keeps the ledger, so that epsilon is
    that of what was really released. Module and optimizer come back as they are, not wrapped; what
    is new is the loader. Between a batch and its `optimizer.step()` the backward pass collects
    per-sample gradients and writes no `.grad`; the step puts the clipped, noisy gradient there,
    and refuses any other one.

    In data-parallel training with `torch.distributed` every process makes an engine with the same
    settings after `init_process_group`; the first one adds the noise and writes the ledger. The
    module must not be wrapped in DistributedDataParallel.

    Args:
      accountant: "pld" (default) or "rdp", of dp-accounting.
      ledger: where releases are counted: a path (durable), a PrivacyLedger shared with other
        releases about the same data set, or None: in memory, and in checkpoints.
      noise: of which the noise and the sampling are drawn; None: keyed by the operating system. A
        seeded source makes epsilon infinite.
      process_group: of torch.distributed; None: the default one where it is initialised.

    Raises:
      TypeError, ValueError: a bad argument. PrivacyError: the ledger cannot be continued.
    """

    def __init__(
        self,
        *,
        accountant: str = "pld",
        ledger: str | os.PathLike[str] | PrivacyLedger | None = None,
        noise: NoiseSource | None = None,
        process_group: Any = None,
    ) -> None:
        self.accountant = _validate.choice(_NAME, "accountant", accountant, accounting.ACCOUNTANTS)
        if noise is not None and not isinstance(noise, NoiseSource):
            raise TypeError(f"{_NAME}: noise must be a NoiseSource, got {type(noise).__name__}")
        self._process_group = process_group
        self._group = Group(process_group)
        self._noise = NoiseSource() if noise is None else noise
        if isinstance(ledger, PrivacyLedger):
            self.ledger = ledger
        else:
            self.ledger = PrivacyLedger(ledger if self._group.is_first else None)
        self._steps: PrivateSteps | None = None
        self._sampling: NoiseSource | None = None
        self._mechanism = -1
        self._plan: SamplingPlan | None = None

    def make_private(
        self,
        *,
        module: Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: Any,
        criterion: Callable[..., torch.Tensor] | None = None,
        probe: tuple[Any, ...] | None = None,
        clipping: str = "flat",
        stability_constant: float | None = None,
        mechanism: str = "gaussian",
        norm: str | None = None,
        group_noise_weights: Any = "equal",
        unit_reduction: str = "mean",
        threshold: Threshold | None = None,
        privacy_unit: str = "sample",
        privacy_unit_ids: str | Sequence[Hashable] | None = None,
        max_samples_per_unit: int | None = None,
        sampling: str = "poisson",
        sample_rate: float | None = None,
        max_batch_size: int | None = None,
        loss_reduction: str = "mean",
        physical_batch_size: int | None = None,
        memory_budget: float | int | None = None,
        strategy: str = "auto",
    ) -> tuple[Module, Optimizer, PrivateLoader]:
        """Make training private with a given noise.

        Args:
          module: the network. BatchNorm in it is refused (`dpfast.replace_batchnorm` mends it).
          optimizer: of exactly the module's trained parameters.
          data_loader: a plain DataLoader over a map-style data set. Its batch_size is the expected
            number of privacy units in a step; its order is replaced by the sampler's.
          noise_multiplier: scale of all that a step releases over its sensitivity, >= 0; what the
            accountant is told. With an adaptive threshold the gradient's own noise is larger.
          max_grad_norm: bound on a unit's gradient; the first one with an adaptive threshold; one
            per parameter (by name, or in order) clips group-wise.
          criterion: the loss, returning (B,), called as criterion(module(inputs), target, ...).
          probe: random tensors (inputs, target, ...) of at least two samples. With both, it is
            checked that samples do not influence one another and that empty batches pass. Without
            them a loss of another shape is refused at the first backward pass.
          clipping: see `clip_and_noise`, as the next five.
          stability_constant: gamma or r of the clipping rule.
          mechanism: "gaussian" or "laplace".
          norm: Laplace after an L2 clip is accounted by its Gaussian-DP bound.
          group_noise_weights: of group-wise clipping.
          unit_reduction: how a patient's samples are joined, "mean" or "sum".
          threshold: None, or PrivateQuantile(...), NoisyHistogram(...), or PercentilePaper(...),
            which carries no guarantee.
          privacy_unit: "sample": one entry of the data set; patients are then not protected.
            "patient": all entries with one id, averaged and clipped together.
          privacy_unit_ids: an id per entry, or the key of the records that holds it.
          max_samples_per_unit: of a patient's entries, this many at most take part in a step,
            chosen at random.
          sampling: "poisson": each unit takes part with chance sample_rate, independently;
            "shuffled_unamplified": each takes part once an epoch, in a random step, and is
            accounted without amplification by sampling.
          sample_rate: None: the data_loader's batch_size over the number of units.
          max_batch_size: units beyond this many are dropped at random from a Poisson batch and
            accounted so (arXiv:2508.15089).
          loss_reduction: "mean": the noisy sum is divided by the expected batch size; "sum": not.
          physical_batch_size: entries processed at once; a step's batch comes in parts.
          memory_budget: see `per_sample_gradients`.
          strategy: see `per_sample_gradients`.

        Returns:
          The same module and optimizer, and a PrivateLoader.

        Raises:
          TypeError, ValueError: a bad setting. PrivacyError: a loader, sampler, module, optimizer
            or loss with which there would be no guarantee. No entry of the data set is read
            before, and nothing is written to the ledger.

        Guarantees:
          Every step is (epsilon, delta)-accounted for one unit added or removed, empty batches
          included, and is in the ledger before its noise is drawn.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        multiplier = _noise_multiplier(arguments.pop("noise_multiplier"))
        request = Request(**arguments)
        return self._start(request, self._check(request), multiplier, None)

    def make_private_with_epsilon(
        self,
        *,
        module: Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: Any,
        criterion: Callable[..., torch.Tensor] | None = None,
        probe: tuple[Any, ...] | None = None,
        clipping: str = "flat",
        stability_constant: float | None = None,
        mechanism: str = "gaussian",
        norm: str | None = None,
        group_noise_weights: Any = "equal",
        unit_reduction: str = "mean",
        threshold: Threshold | None = None,
        privacy_unit: str = "sample",
        privacy_unit_ids: str | Sequence[Hashable] | None = None,
        max_samples_per_unit: int | None = None,
        sampling: str = "poisson",
        sample_rate: float | None = None,
        max_batch_size: int | None = None,
        loss_reduction: str = "mean",
        physical_batch_size: int | None = None,
        memory_budget: float | int | None = None,
        strategy: str = "auto",
    ) -> tuple[Module, Optimizer, PrivateLoader]:
        """Make training private with the least noise that keeps all epochs within a budget.

        `target_epsilon` > 0 at `target_delta`, below 1 over the number of units, is what the whole
        ledger may have spent after `epochs` >= 1 passes over the loader; what it holds already
        counts. All other arguments and what is returned: see `make_private`.

        A run that is started again on its ledger with the same settings goes on with its noise and
        what is left of its steps. When they are used up, the loader ends, and refuses to start
        another epoch.

        Raises:
          As `make_private`; ValueError too where no noise keeps within the budget.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        target_epsilon, target_delta = (
            arguments.pop("target_epsilon"),
            accounting.check_delta(_NAME, "target_delta", arguments.pop("target_delta")),
        )
        epochs = _checks.positive_int("epochs", arguments.pop("epochs")) or 0
        if not epochs:
            raise TypeError(f"{_NAME}: epochs must be an int, got None")
        request = Request(**arguments)
        plan = self._check(request)
        num_units = plan.units.num_units
        if target_delta >= 1.0 / num_units:
            raise ValueError(
                f"{_NAME}: target_delta must be < 1 / {num_units}, one over the number of units, "
                f"got {target_delta:g}"
            )
        spends = epochs if plan.scheme != "poisson" else epochs * plan.steps_per_epoch
        budget = {
            "target_epsilon": float(target_epsilon),
            "target_delta": target_delta,
            "epochs": epochs,
            "spends": spends,
            "accountant": self.accountant,
        }
        multiplier = self._group.from_first(
            self._continued(request, plan, budget) or self._calibrated(request, plan, budget)
            if self._group.is_first
            else None
        )
        return self._start(request, plan, multiplier, budget)

    def get_epsilon(self, delta: float) -> float:
        """The epsilon of all that the ledger holds, at a delta; infinite without a guarantee."""
        return self.ledger.epsilon(delta, accountant=self.accountant)

    @property
    def steps(self) -> int:
        """Private steps begun, those of interrupted runs on the same ledger included."""
        self._require_started("steps")
        return self.ledger.spending(self._mechanism).steps

    @property
    def max_steps(self) -> int | None:
        """Private steps that the budget allows; None without a target."""
        steps, plan = self._require_started("max_steps")
        if steps.max_spends is None:
            return None
        return steps.max_spends * (1 if plan.scheme == "poisson" else plan.steps_per_epoch)

    @property
    def max_grad_norm(self) -> float | None:
        """The present threshold, which is public; None where it is group-wise or a percentile."""
        steps, _ = self._require_started("max_grad_norm")
        if steps.statistic is not None:
            return float(steps.statistic.bound)
        bound = steps.settings.bound
        single = isinstance(bound, (int, float)) or (
            isinstance(bound, torch.Tensor) and bound.dim() == 0
        )
        return float(bound) if single else None

    def report(self, delta: float) -> dict[str, Any]:
        """What is guaranteed, to whom, and what was spent; JSON-able (infinity is None)."""
        _, plan = self._require_started("report")
        return {
            **self.ledger.report(delta, accountant=self.accountant),
            "protects": plan.units.statement,
            "steps": self.steps,
            "max_steps": self.max_steps,
            "max_grad_norm": self.max_grad_norm,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside those of model and optimizer.

        The noise's key is not in it, see `NoiseSource.state_dict`; the samples' neither.
        """
        steps, _ = self._require_started("state_dict")
        assert self._sampling is not None
        return {
            "format": _FORMAT,
            "ledger": self.ledger.state_dict(),
            "mechanism": asdict(self.ledger.mechanisms[self._mechanism]),
            "noise": self._noise.state_dict(),
            "sampling": self._sampling.state_dict(),
            "threshold": None if steps.statistic is None else steps.statistic.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, after `make_private` with the same settings.

        The ledger is never rewound: steps taken after the checkpoint stay counted. A secure noise
        source goes on with a fresh key.

        Raises:
          ValueError: not an engine's state. PrivacyError: other settings, or a ledger that lacks
            what the checkpoint counts.
        """
        steps, _ = self._require_started("load_state_dict")
        assert self._sampling is not None
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"{_NAME}: state must be of format {_FORMAT}")
        own = asdict(self.ledger.mechanisms[self._mechanism])
        for part in ("privacy_unit", "description", "reasons", "event"):
            if state["mechanism"].get(part) != own[part]:
                raise PrivacyError(
                    f"{_NAME}: the checkpoint was made with other settings: "
                    f"{_first_difference(state['mechanism'].get(part), own[part], part)}"
                )
        if self._group.is_first or self.ledger.path is None:
            self.ledger.load_state_dict(state["ledger"])
        self._noise.load_state_dict(state["noise"])
        if not self._sampling.secure:
            # A secure source has a fresh key already, which the processes share.
            self._sampling.load_state_dict(state["sampling"])
        if steps.statistic is not None:
            steps.statistic.load_state_dict(state["threshold"])

    def _check(self, request: Request) -> SamplingPlan:
        if self._steps is not None:
            raise PrivacyError(
                f"{_NAME}: an engine makes one run private; make another one with "
                "PrivacyEngine(ledger=engine.ledger)"
            )
        if Group(self._process_group).size != self._group.size:
            raise PrivacyError(
                f"{_NAME}: make the engine after torch.distributed.init_process_group"
            )
        plan = request.check(self._group.size)
        if self._group.size > 1:
            state = self._group.from_first(self.ledger.state_dict())
            if not self._group.is_first:
                self.ledger.load_state_dict(state)
        return plan

    def _continued(
        self, request: Request, plan: SamplingPlan, budget: Mapping[str, Any]
    ) -> float | None:
        """The noise of an earlier start of the same run, if the ledger has one."""
        for noted in self.ledger.plans:
            if any(noted.get(name) != value for name, value in budget.items()):
                continue
            multiplier = float(noted["noise_multiplier"])
            mechanism = self._describe(request, plan, multiplier)
            if mechanism == noted["mechanism"]:
                self._refuse_overspending(request, plan, multiplier, budget)
                return multiplier
        return None

    def _refuse_overspending(
        self, request: Request, plan: SamplingPlan, multiplier: float, budget: Mapping[str, Any]
    ) -> None:
        """Other releases may have been made since the run was planned: is there enough left?"""
        event = request.step(multiplier, plan).event()
        spent = self.ledger.spent(conditional=bool(request.reasons(1.0, self._noise.secure)))
        own = sum(count for each, count in spent if each == event)
        others = [(each, count) for each, count in spent if count and each != event]
        if not others:
            return
        pairs = [*others, (event, max(own, budget["spends"]))]
        total = accounting.epsilon(pairs, budget["target_delta"], accountant=self.accountant)
        if total > budget["target_epsilon"]:
            raise PrivacyError(
                f"{_NAME}: target_epsilon {budget['target_epsilon']:g} must cover what the ledger "
                "counts beside this run, whose noise was chosen before: together they would cost "
                f"{total:.4g}"
            )

    def _calibrated(self, request: Request, plan: SamplingPlan, budget: Mapping[str, Any]) -> float:
        # Without a guarantee the noise is what it would be with one.
        void = bool(request.reasons(1.0, self._noise.secure))
        spent = self.ledger.spent(conditional=void)
        return accounting.calibrate(
            lambda z: [*spent, (request.step(z, plan).event(), budget["spends"])],
            budget["target_epsilon"],
            budget["target_delta"],
            accountant=self.accountant,
        )

    def _describe(
        self, request: Request, plan: SamplingPlan, noise_multiplier: float
    ) -> dict[str, Any]:
        statistic = request.statistic(noise_multiplier, plan)
        return {
            **request.description(plan, statistic),
            "noise_multiplier": noise_multiplier,
            "noise_source": "operating system" if self._noise.secure else "seeded",
            **_pure_epsilon(request, noise_multiplier),
        }

    def _start(
        self,
        request: Request,
        plan: SamplingPlan,
        noise_multiplier: float,
        budget: dict[str, Any] | None,
    ) -> tuple[Any, Any, PrivateLoader]:
        statistic = request.statistic(noise_multiplier, plan)
        description = self._describe(request, plan, noise_multiplier)
        event = request.step(noise_multiplier, plan).event()
        accounting.check_supported(event, self.accountant)
        once_per_epoch = plan.scheme != "poisson"
        settings = StepSettings(
            clip=request.clip_settings(),
            bound=request.bound,
            noise_multiplier=noise_multiplier
            if statistic is None
            else statistic.gradient_noise_multiplier,
            divisor=plan.expected_batch_size if request.loss_reduction == "mean" else None,
            engine={"memory_budget": request.memory_budget, "strategy": request.strategy},
            once_per_epoch=once_per_epoch,
        )
        # From here on something changes: the ledger, the optimizer, the weights of other processes.
        self._mechanism = self.ledger.register(
            event,
            privacy_unit=plan.units.name,
            description=description,
            reasons=request.reasons(noise_multiplier, self._noise.secure),
        )
        self._steps = PrivateSteps(
            request.module,
            settings,
            statistic,
            self.ledger,
            self._mechanism,
            self._noise,
            self._group,
        )
        self._plan = plan
        if budget is not None:
            self._steps.max_spends = budget["spends"]
            noted = {**budget, "noise_multiplier": noise_multiplier, "mechanism": description}
            if noted not in self.ledger.plans:
                self.ledger.plan(noted)
        request.optimizer.register_step_pre_hook(self._steps.before_optimizer_step)
        self._group.share(
            {**dict(request.module.named_parameters()), **dict(request.module.named_buffers())}
        )
        # One key for all processes, so that they draw the same units and take their shares.
        key = self._group.from_first(self._noise.spawn("sampling")._key())
        self._sampling = NoiseSource._keyed(key, secure=self._noise.secure)
        loader = PrivateLoader(
            request.data_loader,
            UnitSampler(plan, self._sampling),
            self._steps,
            steps_per_epoch=plan.steps_per_epoch,
            physical_batch_size=request.physical_batch_size,
            rank=self._group.rank,
            num_processes=self._group.size,
        )
        return request.module, request.optimizer, loader

    def _require_started(self, what: str) -> tuple[PrivateSteps, SamplingPlan]:
        if self._steps is None or self._plan is None:
            raise RuntimeError(f"{_NAME}: {what} is there after make_private")
        return self._steps, self._plan


def _noise_multiplier(value: Any) -> float:
    return _validate.number(_NAME, "noise_multiplier", value, minimum=0.0, maximum=1e6)


def _pure_epsilon(request: Request, noise_multiplier: float) -> dict[str, float]:
    """What one Laplace release costs by itself without delta, shown beside the accounting."""
    if request.mechanism != "laplace" or noise_multiplier == 0.0:
        return {}
    numbers = sum(p.numel() for p in _checks.trained_parameters(request.module).values())
    ratio = 1.0 if request.resolved_norm == "l1" else math.sqrt(numbers)
    return {"pure_epsilon_of_a_step": ratio / noise_multiplier}


def _first_difference(theirs: Any, ours: Any, path: str) -> str:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                return _first_difference(theirs.get(key), ours.get(key), f"{path}.{key}")
    return f"{path} was {theirs!r} and is {ours!r}"
