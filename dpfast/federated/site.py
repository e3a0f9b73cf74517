"""A site: what one hospital does in a round, whichever engine asks it to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.federated.weights import Weights, digest, load_weights, weights_of
from dpfast.ops import NoiseSource
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation.data import Data
from dpfast.segmentation.metrics import class_scores
from dpfast.segmentation.models import build_model
from dpfast.segmentation.run_folder import StateFolder
from dpfast.segmentation.run_morphology import RunMorphology, prepare_morphology
from dpfast.segmentation.runs import PlainRun, PrivateRun, Run
from dpfast.segmentation.settings import Settings
from dpfast.segmentation.training import (
    EVALUATION_BATCH,
    check_delta,
    make_criterion,
    make_optimizer,
    pick_device,
)

__all__ = ["BudgetSpentError", "Scores", "Site", "SiteFolder", "Update"]

# Per foreground class; None where no validation image has it.
Scores = dict[str, list[float | None]]
_SCORES = ("dice", "hausdorff95")


class BudgetSpentError(PrivacyError):
    """A site has spent what it was willing to spend and takes part in no further round."""


@dataclass(frozen=True)
class Update:
    """What a site gives away after a round; all of it is released.

    Attributes:
      site: its name.
      round: from 1.
      given: digest of the weights that it began with.
      weights: what it came to.
      privacy: its ledger's entry: epsilon, delta, unit, steps, ...; JSON-able.
    """

    site: str
    round: int
    given: str
    weights: Weights
    privacy: dict[str, Any]


class SiteFolder(StateFolder):
    """What a site keeps to itself between rounds, and over a crash."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

    @property
    def started(self) -> bool:
        """Whether a round was trained to its end."""
        return (self.path / "checkpoint.pt").is_file()


class Site:
    """A hospital with its own data, budget and ledger.

    Everything that it releases is in its ledger before. It refuses a round for which nothing is
    left of its budget. A round that is asked for again with the same weights is answered with the
    same update and costs nothing; one that was cut off is trained anew, and what was lost of it
    stays counted.

    Args:
      name: public.
      settings: as of `dpfast train` on the site's data; `training.epochs` counts all rounds.
      data: the site's own records.
      folder: the site's own, kept between rounds.
      local_epochs: passes over the site's data in a round.
      proximal_mu: weight of FedProx's pull towards the round's weights (arXiv:1812.06127), 0: none.
        It is added to the noisy gradient and looks at weights alone, so it costs no privacy.
      seed: of noise, sampling and shuffling, for tests alone: epsilon is infinite with it.

    Raises:
      ValueError, TypeError: a bad setting. PrivacyError: one with which there is no guarantee, or a
        folder that has lost what was released.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        data: Data,
        folder: SiteFolder,
        *,
        local_epochs: int = 1,
        proximal_mu: float = 0.0,
        seed: int | None = None,
    ) -> None:
        _validate.number("Site", "proximal_mu", proximal_mu, minimum=0.0, maximum=1e6)
        check_delta(settings.privacy, data)
        units = data.num_training[settings.privacy.privacy_unit]
        if settings.privacy.expected_batch_size > units:
            raise ValueError(
                f"Site: privacy.expected_batch_size must be <= {units}, the number of units of "
                f"{name}, got {settings.privacy.expected_batch_size}"
            )
        self.name, self._settings, self._data, self._folder = name, settings, data, folder
        self._local_epochs, self._proximal_mu, self._seed = local_epochs, proximal_mu, seed
        self._device = pick_device(settings.training.device)
        self._ledger = PrivacyLedger(folder.ledger) if settings.privacy.private else None
        self._morphology: RunMorphology | None = None
        self._looked_at = False
        self._state = folder.checkpoint(torch.device("cpu"))
        if self._state is not None:
            del self._state["update"]

    def train(self, round_number: int, weights: Weights) -> Update:
        """Train for a round.

        Args:
          round_number: from 1.
          weights: of the common model.

        Raises:
          ValueError: weights of another model, or numbers that are not finite.
          BudgetSpentError: nothing is left of the site's budget.
        """
        given = digest(weights)
        state = self._state
        if state is not None and (state["round"], state["given"]) == (round_number, given):
            kept = self._folder.checkpoint(torch.device("cpu"))
            assert kept is not None
            return self._update(round_number, given, _arrays(kept["update"]), state["privacy"])
        model = self._model(weights)
        run = self._start(model, round_number)
        try:
            return self._trained(run, round_number, given)
        finally:
            _let_go(model, run.optimizer)

    def _trained(self, run: Run, round_number: int, given: str) -> Update:
        """The round's steps; the update is on the disk when this returns."""
        if run.steps >= run.total_steps:
            raise BudgetSpentError(
                f"Site: round {round_number} must be covered by the budget of {self.name}, of "
                f"which nothing is left after {run.steps} steps"
            )
        if self._proximal_mu > 0.0:
            _pull(run.optimizer, self._proximal_mu)
        run.model.train()
        for _ in range(self._local_epochs):
            for _ in run.epoch():
                if run.steps >= run.total_steps:
                    break
            if run.steps >= run.total_steps:
                break
        update = self._update(round_number, given, weights_of(run.model), self._privacy(run))
        self._state = {
            "round": round_number,
            "given": given,
            "privacy": update.privacy,
            "run": run.state_dict(),
        }
        # The update is on the disk alone: in memory it would be a model for each site.
        tensors = {name: torch.from_numpy(each) for name, each in update.weights.items()}
        self._folder.write_checkpoint({**self._state, "update": tensors})
        return update

    def evaluate(self, weights: Weights) -> Scores:
        """Scores of weights on the site's own validation patients; they are not protected."""
        model = self._model(weights).eval()
        try:
            return self._scores(model)
        finally:
            _let_go(model)

    def _scores(self, model: nn.Module) -> Scores:
        classes = self._data.task.num_classes
        class_maps = self._prepared().class_maps
        parts = []
        # A generator of its own, for a DataLoader draws from it: training goes on as without this.
        batches = DataLoader(
            self._data.validation, batch_size=EVALUATION_BATCH, generator=torch.Generator()
        )
        with torch.no_grad():
            for batch in batches:
                found = class_maps(model(batch["image"].to(self._device)))
                parts.append(class_scores(found.cpu(), batch["label"], classes))
        means = {
            name: torch.cat([getattr(part, name) for part in parts]).nanmean(0).tolist()
            for name in _SCORES
        }
        return {name: [None if x != x else x for x in each] for name, each in means.items()}

    @property
    def morphology(self) -> dict[str, Any]:
        """What is done to scores and predictions; see `RunMorphology.report`."""
        return self._prepared().report

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _model(self, weights: Weights) -> nn.Module:
        chosen = self._settings.model
        model = build_model(
            chosen.name, self._data.task, chosen.arguments, weights_seed=chosen.weights_seed
        )
        load_weights(model, weights)
        return model.to(self._device)

    def _prepared(self) -> RunMorphology:
        if self._morphology is None:
            self._morphology = prepare_morphology(
                self._settings, self._data, self._folder, self._ledger
            )
        return self._morphology

    def _start(self, model: nn.Module, round_number: int) -> Run:
        """The run so far, with this round's model and a fresh optimizer."""
        training, privacy = self._settings.training, self._settings.privacy
        optimizer = make_optimizer(model, training)
        criterion = make_criterion(self._prepared())
        if self._seed is not None:
            torch.manual_seed(self._seed + round_number)
        run: Run
        if self._ledger is None:
            run = PlainRun(
                model, optimizer, criterion, self._data.training, privacy, training.epochs
            )
        else:
            run = PrivateRun(
                model,
                optimizer,
                criterion,
                self._data.training,
                self._data.task,
                privacy,
                training.epochs,
                self._ledger,
                # A fresh key in every round, and where there is a seed the state goes on.
                noise=None if self._seed is None else NoiseSource(self._seed),
                probe=not self._looked_at,
            )
            self._looked_at = True
        if self._state is not None:
            run.load_state_dict(self._state["run"])
        return run

    def _privacy(self, run: Run) -> dict[str, Any]:
        bound = run.max_grad_norm if isinstance(run, PrivateRun) else None
        return {**run.report(), "steps": run.steps, "max_grad_norm": bound}

    def _update(
        self, round_number: int, given: str, weights: Weights, privacy: Mapping[str, Any]
    ) -> Update:
        return Update(self.name, round_number, given, weights, dict(privacy))


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _let_go(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Free a round's tensors at once.

    MONAI's networks refer to themselves: until Python's collector comes by, each site asked would
    leave a model, its gradients and its optimizer's state in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = tensor.new_empty(0)
    if optimizer is not None:
        optimizer.state.clear()


def _pull(optimizer: torch.optim.Optimizer, mu: float) -> None:
    """Add mu (w - w0) to every gradient, where w0 is what the parameters are now."""
    start = {
        parameter: parameter.detach().clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }

    def add(*_: Any) -> None:
        with torch.no_grad():
            for parameter, before in start.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - before, alpha=mu)

    optimizer.register_step_pre_hook(add)
