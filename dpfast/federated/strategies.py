"""How the server joins the sites' weights: Flower's strategies, and averages private by site."""

from __future__ import annotations

import inspect
import random
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import dp_accounting
import numpy as np
import torch

from dpfast import _validate
from dpfast.federated.flower.arrays import to_arrays, to_weights
from dpfast.federated.flower.messages import WEIGHT
from dpfast.federated.weights import Weights
from dpfast.ops import NoiseSource, clip_and_noise
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import (
        ArrayRecord,
        ConfigRecord,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.serverapp import Grid
    from flwr.serverapp import strategy as flower

__all__ = [
    "STRATEGIES",
    "PrivateSites",
    "RunningMean",
    "begins_with_a_mean",
    "load_strategy_state",
    "make_strategy",
    "strategy_state",
]

STRATEGIES = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedadagrad": flower.FedAdagrad,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
}
# Those that see no more of the replies than their weighted mean.
_OF_MEANS = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedadagrad", "fedyogi")
# What is ours to decide: every site in every round, evaluation by ourselves, public weights.
_OURS = {
    *("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes"),
    *("min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key"),
    *("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule", "self"),
}


def make_strategy(
    name: str, arguments: Mapping[str, Any] | None = None, *, num_sites: int
) -> flower.FedAvg:
    """One of Flower's strategies.

    Args:
      name: of STRATEGIES.
      arguments: its own, such as `eta` of "fedadam" or `num_malicious_nodes` of "krum".
      num_sites: all of which take part in each round.

    Raises:
      ValueError: an unknown name or argument, or a value that Flower refuses.
    """
    _validate.choice("make_strategy", "name", name, tuple(STRATEGIES))
    kind: Any = STRATEGIES[name]
    given = dict(arguments or {})
    known = sorted(set(inspect.signature(kind).parameters) - _OURS)
    for argument in given:
        if argument not in known:
            raise ValueError(
                f"make_strategy: arguments of {name} must be of {', '.join(known) or 'none'}, got "
                f"{argument!r}"
            )
    try:
        made: flower.FedAvg = kind(
            min_train_nodes=num_sites,
            min_available_nodes=num_sites,
            weighted_by_key=WEIGHT,
            **given,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"make_strategy: arguments of {name}: {error}") from error
    return made


def begins_with_a_mean(strategy: flower.FedAvg) -> bool:
    """Whether a strategy makes the same of one reply, the weighted mean, as of all of them."""
    return type(strategy) in {STRATEGIES[name] for name in _OF_MEANS}


class RunningMean:
    """A weighted mean of weights that come one after the other, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weight = 0.0
        self._kinds: dict[str, Any] = {}

    def add(self, weights: Weights, weight: float) -> None:
        """Take one in."""
        for name, array in weights.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(array.shape)
                self._kinds[name] = array.dtype
            self._sums[name] += array if weight == 1.0 else weight * array.astype(np.float64)
        self._weight += weight

    def result(self) -> tuple[dict[str, Any], float]:
        """The mean, and the weight of all."""
        mean = {
            name: (each / self._weight).astype(self._kinds[name])
            for name, each in self._sums.items()
        }
        return mean, self._weight


def strategy_state(strategy: flower.FedAvg) -> dict[str, Any]:
    """What a strategy carries from round to round, for checkpoints: arrays by attribute."""
    state: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, ArrayRecord):
            state[name] = {"record": _tensors(to_weights(value))}
        elif isinstance(value, dict) and value and _all_arrays(value.values()):
            state[name] = {"arrays": _tensors(value)}
        elif isinstance(value, list) and value and _all_arrays(value):
            state[name] = {"list": [torch.from_numpy(np.array(each)) for each in value]}
    return state


def load_strategy_state(strategy: flower.FedAvg, state: Mapping[str, Any]) -> None:
    """Go on from a checkpoint."""
    for name, held in state.items():
        kind, value = next(iter(held.items()))
        if kind == "list":
            setattr(strategy, name, [each.numpy() for each in value])
            continue
        arrays = {key: each.numpy() for key, each in value.items()}
        setattr(strategy, name, to_arrays(arrays) if kind == "record" else arrays)


def _all_arrays(values: Iterable[Any]) -> bool:
    return all(isinstance(each, np.ndarray) for each in values)


def _tensors(arrays: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(each)) for name, each in arrays.items()}


class PrivateSites(flower.FedAvg):
    """DP-FedAvg: whether a whole site took part is protected, by a server that all trust.

    A round asks each site with chance q. The sum of their changes, each clipped to S, gets Gaussian
    noise of standard deviation z S and is divided by q times the number of sites. All sites weigh
    the same. A site that fails adds nothing; the round is paid for in any case.

    Args:
      sites: by their nodes.
      max_update_norm: S, of a site's change of all weights together.
      noise_multiplier: z.
      sample_rate: q.
      ledger: of the server; its privacy unit is "site".
      seed: of sampling and noise, for tests alone: epsilon is infinite with it.

    References:
      McMahan et al. 2018, arXiv:1710.06963; DP_SPEC section 5.
    """

    def __init__(
        self,
        sites: Mapping[int, str],
        *,
        max_update_norm: float,
        noise_multiplier: float,
        sample_rate: float,
        ledger: PrivacyLedger,
        seed: int | None = None,
    ) -> None:
        super().__init__(min_train_nodes=0, min_available_nodes=0, weighted_by_key=WEIGHT)
        function = "PrivateSites"
        self._nodes = sorted(sites)
        self._max_update_norm = _validate.number(
            function, "max_update_norm", max_update_norm, minimum=0.0, maximum=1e6, exclusive=True
        )
        self._noise_multiplier = _validate.number(
            function, "noise_multiplier", noise_multiplier, minimum=0.0, maximum=1e6
        )
        self._rate = _validate.number(
            function, "sample_rate", sample_rate, minimum=0.0, maximum=1.0, exclusive=True
        )
        self._noise = NoiseSource() if seed is None else NoiseSource(seed)
        self._chance: random.Random = (
            secrets.SystemRandom() if seed is None else random.Random(seed)
        )
        self._given: dict[str, Any] = {}
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(self._noise_multiplier)
        if self._noise_multiplier == 0.0:
            event = dp_accounting.NonPrivateDpEvent()
        elif self._rate < 1.0:
            event = dp_accounting.PoissonSampledDpEvent(self._rate, event)
        self._ledger = ledger
        self._mechanism = ledger.register(
            event,
            privacy_unit="site",
            description={
                "what": "DP-FedAvg",
                "sites": len(self._nodes),
                "sample_rate": self._rate,
                "max_update_norm": self._max_update_norm,
                "noise_multiplier": self._noise_multiplier,
                "trusts": "the server",
            },
            reasons=[] if seed is None else ["seeded noise: whoever knows the seed can remove it"],
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower: requests to the sites that chance has chosen."""
        self._given = to_weights(arrays)
        config["server-round"] = server_round
        record: dict[str, Any] = {self.arrayrecord_key: arrays, self.configrecord_key: config}
        chosen = [node for node in self._nodes if self._chance.random() < self._rate]
        return list(self._construct_messages(RecordDict(record), chosen, MessageType.TRAIN))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See Flower: the noisy average, of no reply at all too."""
        updates = [to_weights(reply.content[self.arrayrecord_key]) for reply in replies]
        changes = {
            name: torch.from_numpy(
                np.stack([update[name] - given for update in updates])
                if updates
                else np.zeros((0, *given.shape), given.dtype)
            )
            for name, given in self._given.items()
        }
        self._ledger.record(self._mechanism)
        average: Any = clip_and_noise(
            changes,
            max_grad_norm=self._max_update_norm,
            noise_multiplier=self._noise_multiplier,
            expected_batch_size=self._rate * len(self._nodes),
            noise=self._noise,
        )
        return to_arrays(
            {name: given + average[name].numpy() for name, given in self._given.items()}
        ), None
