"""The rounds of a federated run: ask, check, join, evaluate, keep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dpfast.errors import PrivacyError
from dpfast.federated.flower.arrays import to_arrays, to_weights
from dpfast.federated.flower.messages import evaluation, read_scores, read_update, weighted
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.site import Scores, Update
from dpfast.federated.strategies import (
    RunningMean,
    begins_with_a_mean,
    load_strategy_state,
    strategy_state,
)
from dpfast.federated.weights import Weights, digest, problem_with
from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import ConfigRecord, Message
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg

__all__ = ["MissingSitesError", "Observer", "Policy", "Rounds"]


class MissingSitesError(RuntimeError):
    """Fewer sites answered than the run is to go on with; the round can be asked for again."""


class Observer(Protocol):
    """Who is told how a run goes."""

    def started(self, sites: Iterable[str], rounds_done: int, rounds: int) -> None:
        """Before the first round."""

    def heard(self, round_number: int, site: str, status: str) -> None:
        """After each site's reply: "trained", "refused" or "failed"."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """After each round, with its line of rounds.jsonl."""


@dataclass(frozen=True)
class Policy:
    """What the server decides on its own.

    Attributes:
      rounds: of the whole run.
      min_sites: with fewer usable replies a round changes nothing and the run stops.
      weights: of each site, public; empty: all the same.
      evaluate_every: rounds between evaluations; the last round is always evaluated.
      timeout: seconds that replies are waited for.
    """

    rounds: int
    min_sites: int
    weights: Mapping[str, float]
    evaluate_every: int = 1
    timeout: float = 3600.0


class Rounds:
    """The server's side of a run, the same on every engine.

    Replies are taken in the order of the sites' names, whenever they came, so that the sum has the
    same bits on every engine. A reply that is not of a known site, of this round and of these
    weights, with finite numbers of the model's shapes, is left out and said so.

    Args:
      grid: Flower's.
      sites: names by nodes, as the grid authenticates them.
      strategy: joins the weights.
      policy: see there.
      weights: initial, public.
      folder: of the run; goes on where its checkpoint is.
      server_epsilon: what the server's own ledger says, where whole sites are protected; None: the
        largest of the sites', whose patients are not the same.
    """

    def __init__(
        self,
        grid: Grid,
        sites: Mapping[int, str],
        strategy: FedAvg,
        policy: Policy,
        weights: Weights,
        folder: FederatedFolder,
        server_epsilon: Callable[[], float] | None = None,
    ) -> None:
        self._grid, self._sites, self._strategy = grid, dict(sites), strategy
        self._policy, self._folder = policy, folder
        self._server_epsilon = server_epsilon
        self.weights: Weights = dict(weights)
        self.lines: list[dict[str, Any]] = []
        self._epsilons: dict[str, float] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        state = folder.checkpoint()
        if state is not None:
            self.weights = {name: each.numpy() for name, each in state["weights"].items()}
            load_strategy_state(strategy, state["strategy"])
            self.lines = state["lines"]
            self._epsilons = state["epsilons"]
            self._entries = state["entries"]

    def run(self, observer: Observer) -> None:
        """All rounds that are left.

        Raises:
          MissingSitesError: too few sites answered. What was done is kept: started again, the run
            goes on with that round, and sites that had finished it answer without spending more.
        """
        observer.started(sorted(self._sites.values()), len(self.lines), self._policy.rounds)
        for number in range(len(self.lines) + 1, self._policy.rounds + 1):
            line = self._round(number, observer)
            self.lines.append(line)
            self._folder.write_checkpoint(
                {
                    "weights": {k: torch.from_numpy(v.copy()) for k, v in self.weights.items()},
                    "strategy": strategy_state(self._strategy),
                    "epsilons": self._epsilons,
                },
                self.lines,
                self._entries,
            )
            observer.finished_round(line)

    def epsilon(self) -> float:
        """What has been spent so far, by whoever has spent most."""
        if self._server_epsilon is not None:
            return self._server_epsilon()
        return max(self._epsilons.values(), default=math.inf)

    def _round(self, number: int, observer: Observer) -> dict[str, Any]:
        began = time.monotonic()
        given = digest(self.weights)
        arrays = to_arrays(self.weights)
        requests = list(self._strategy.configure_train(number, arrays, ConfigRecord(), self._grid))
        asked = {self._sites[each.metadata.dst_node_id] for each in requests}
        told = {name: _untold("failed", "no reply") for name in sorted(asked)}
        collected = _Collected(begins_with_a_mean(self._strategy))
        for reply in self._replies(requests):
            self._take(number, given, *reply, collected, told)
            name = reply[1]
            if name in told:
                observer.heard(number, name, told[name]["status"])
        if collected.count < min(self._policy.min_sites, len(asked)):
            reasons = "; ".join(
                f"{name}: {each['reason']}"
                for name, each in told.items()
                if each["status"] != "trained"
            )
            raise MissingSitesError(
                f"Rounds: round {number} must have {self._policy.min_sites} sites' updates, got "
                f"{collected.count} ({reasons}); the weights are those of round {number - 1}"
            )
        joined, _ = self._strategy.aggregate_train(number, collected.messages())
        if joined is not None:
            self.weights = self._checked(to_weights(joined))
        evaluated = number % self._policy.evaluate_every == 0 or number == self._policy.rounds
        scores = self._evaluate(number) if evaluated else {}
        for name, each in scores.items():
            told.setdefault(name, _untold("not asked", None))["scores"] = each
        return {
            "round": number,
            "seconds": time.monotonic() - began,
            "sites": told,
            "scores": _mean(list(scores.values())) if scores else None,
            "epsilon": _spoken(self.epsilon()),
        }

    def _replies(self, requests: list[Message]) -> Iterator[tuple[Message, str | None]]:
        """Replies with their sites' names, in the order of the names.

        All at once, or, where the grid would hold them all in this process, one after the other.
        """
        ordered = sorted(requests, key=lambda each: self._sites[each.metadata.dst_node_id])
        single = getattr(self._grid, "one_at_a_time", False)
        for part in [[each] for each in ordered] if single else [ordered]:
            replies = self._grid.send_and_receive(part, timeout=self._policy.timeout)
            # What stands for a lost node comes from the server's own link, in reply to our message.
            sent = {
                each.metadata.message_id: self._sites[each.metadata.dst_node_id]
                for each in part
                if each.metadata.message_id
            }
            named = []
            for reply in replies:
                about = reply.metadata
                name = self._sites.get(about.src_node_id, sent.get(about.reply_to_message_id))
                named.append((reply, name))
            yield from sorted(named, key=lambda pair: pair[1] or "")

    def _take(
        self,
        number: int,
        given: str,
        reply: Message,
        name: str | None,
        collected: _Collected,
        told: dict[str, dict[str, Any]],
    ) -> None:
        """Put a reply where it belongs, or say why it cannot be used."""
        try:
            update = read_update(reply)
        except PrivacyError as error:
            status, reason = "refused", str(error)
        except ValueError as error:
            status, reason = "failed", str(error)
        else:
            problem = self._problem(number, given, name, update)
            if problem is None:
                assert name is not None
                collected.add(reply, update.weights, self._weight(name))
                self._note(name, update, told)
                return
            status, reason = "failed", problem
        if name in told:
            told[name] = _untold(status, reason)

    def _problem(self, number: int, given: str, name: str | None, update: Update) -> str | None:
        if name is None or update.site != name:
            return "another site's name"
        if (update.round, update.given) != (number, given):
            return "an answer to another request"
        return problem_with(update.weights, self.weights)

    def _weight(self, name: str) -> float:
        return float(self._policy.weights.get(name, 1.0))

    def _note(self, name: str, update: Update, told: dict[str, dict[str, Any]]) -> None:
        epsilon = update.privacy.get("epsilon")
        private = isinstance(epsilon, (int, float))
        self._epsilons[name] = float(epsilon) if private else math.inf  # type: ignore[arg-type]
        told[name] = {
            "status": "trained",
            "reason": None,
            "epsilon": _spoken(self._epsilons[name]),
            "steps": update.privacy.get("steps"),
            "max_grad_norm": update.privacy.get("max_grad_norm"),
            "scores": None,
        }
        self._entries[name] = dict(update.privacy)

    def _checked(self, weights: Weights) -> Weights:
        # A strategy may have widened what it averaged.
        narrowed = {k: v.astype(self.weights[k].dtype) for k, v in weights.items()}
        problem = problem_with(narrowed, self.weights)
        if problem is not None:
            raise ValueError(f"Rounds: a strategy must give weights of the model, got {problem}")
        return narrowed

    def _evaluate(self, number: int) -> dict[str, Scores]:
        requests = evaluation(to_arrays(self.weights), number, sorted(self._sites))
        found: dict[str, Scores] = {}
        for reply in self._grid.send_and_receive(requests, timeout=self._policy.timeout):
            name = self._sites.get(reply.metadata.src_node_id)
            if name is None:
                continue
            try:
                found[name] = read_scores(reply)
            except ValueError:
                continue  # a curve with a gap
        return dict(sorted(found.items()))


class _Collected:
    """The usable updates of a round: all of them, or, where that will do, their mean alone."""

    def __init__(self, mean_will_do: bool) -> None:
        self._mean = RunningMean() if mean_will_do else None
        self._messages: list[Message] = []
        self.count = 0

    def add(self, reply: Message, weights: Weights, weight: float) -> None:
        """Take one in; the order is that of the sites' names, and so are the sum's bits."""
        self.count += 1
        if self._mean is None:
            self._messages.append(weighted(reply, weights, weight))
            return
        self._mean.add(weights, weight)
        # Flower wants a message to take the mean from; whose it was no longer matters.
        self._messages = [reply]

    def messages(self) -> list[Message]:
        """What the strategy is to join."""
        if self._mean is None or not self._messages:
            return self._messages
        return [weighted(self._messages[0], *self._mean.result())]


def _untold(status: str, reason: str | None) -> dict[str, Any]:
    names = ("epsilon", "steps", "max_grad_norm", "scores")
    return {"status": status, "reason": reason, **dict.fromkeys(names)}


def _mean(scores: list[Scores]) -> Scores:
    """Over sites, each the same; a class that no site has is None."""
    means: Scores = {}
    for name in scores[0]:
        columns = zip(*(each[name] for each in scores), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        means[name] = [sum(each) / len(each) if each else None for each in known]
    return means


def _spoken(epsilon: float) -> float | str:
    return "infinite" if math.isinf(epsilon) else epsilon
