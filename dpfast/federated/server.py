"""The server's side of a run, from settings to finished rounds, the same on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch

from dpfast.federated.rounds import Observer, Policy, Rounds
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.settings import FederatedSettings
from dpfast.federated.strategies import PrivateSites, make_strategy
from dpfast.federated.weights import load_weights, weights_of
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.models import build_model
from dpfast.segmentation.task import SegmentationTask

with needs_extra("dpfast federate", extra="federated"):
    from flwr.serverapp import Grid

__all__ = ["Server", "check_site_names"]


def check_site_names(settings: FederatedSettings, names: list[str]) -> None:
    """Refuse weights of sites that are not there.

    Raises:
      ValueError: such a weight.
    """
    unknown = sorted(set(settings.federation.site_weights) - set(names))
    if unknown:
        raise ValueError(
            f"federation.site_weights must name sites, {', '.join(sorted(names))}, got {unknown[0]}"
        )


class Server:
    """What joins the sites' weights; used as a context, which keeps the server's ledger.

    Args:
      settings: of the run.
      task: that the model is for.
      folder: of the run, started.
      grid: brings messages to nodes.
      nodes: the sites' names by node.
      timeout: seconds that replies are waited for.
    """

    def __init__(
        self,
        settings: FederatedSettings,
        task: SegmentationTask,
        folder: FederatedFolder,
        grid: Grid,
        nodes: Mapping[int, str],
        *,
        timeout: float = 3600.0,
    ) -> None:
        check_site_names(settings, list(nodes.values()))
        self._settings, self._task, self._folder = settings, task, folder
        self._grid, self._nodes, self._timeout = grid, dict(nodes), timeout
        self._ledger: PrivacyLedger | None = None

    def __enter__(self) -> Server:
        if self._settings.site_privacy is not None:
            self._ledger = PrivacyLedger(self._folder.server_ledger)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def run(self, observer: Observer) -> tuple[torch.nn.Module, Rounds]:
        """All rounds that are left; the model with the last weights.

        Raises:
          MissingSitesError: see `Rounds.run`.
        """
        rounds = self._rounds()
        rounds.run(observer)
        model = self._model()
        load_weights(model, rounds.weights)
        return model, rounds

    def _rounds(self) -> Rounds:
        settings, ledger = self._settings, self._ledger
        federation, promise = settings.federation, settings.site_privacy
        server_epsilon = None
        if promise is None or ledger is None:
            arguments = dict(federation.strategy_arguments)
            if federation.strategy == "fedprox":
                arguments["proximal_mu"] = settings.training.proximal_mu
            strategy = make_strategy(federation.strategy, arguments, num_sites=len(self._nodes))
        else:
            delta = promise.target_delta
            strategy = PrivateSites(
                self._nodes,
                max_update_norm=promise.max_update_norm,
                noise_multiplier=promise.noise_multiplier,
                sample_rate=promise.sample_rate,
                ledger=ledger,
                seed=federation.seed,
            )

            def server_epsilon() -> float:
                return ledger.epsilon(delta)

        policy = Policy(
            rounds=federation.rounds,
            min_sites=federation.min_sites or len(self._nodes),
            weights=federation.site_weights,
            evaluate_every=federation.evaluate_every,
            timeout=self._timeout,
        )
        return Rounds(
            self._grid,
            self._nodes,
            strategy,
            policy,
            weights_of(self._model()),
            self._folder,
            server_epsilon,
        )

    def _model(self) -> torch.nn.Module:
        chosen = self._settings.model
        return build_model(
            chosen.name, self._task, chosen.arguments, weights_seed=chosen.weights_seed
        )
