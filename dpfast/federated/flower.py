"""Between our sites and Flower's messages; the only module that touches Flower's inner parts.

A request carries the common weights and the round's number. A reply carries the site's weights, and
beside them who it is, what it was given and its ledger's entry; or, where a site refuses, the
reason. How much a site counts is the server's business and in no reply.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpfast.errors import PrivacyError
from dpfast.federated.site import Scores, Site, Update
from dpfast.federated.weights import Weights
from dpfast.segmentation._extras import needs_extra

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "WEIGHT",
    "InProcessGrid",
    "client_app",
    "evaluation",
    "read_scores",
    "read_update",
    "to_arrays",
    "to_weights",
    "weighted",
]

# Flower tells of each round on its own; people see ours.
logging.getLogger("flwr").setLevel(logging.ERROR)

_LOG = logging.getLogger("dpfast.federated")
WEIGHT = "weight"
_ARRAYS, _CONFIG, _METRICS, _SITE = "arrays", "config", "metrics", "site"
_ROUND = "server-round"
_SERVER_NODE, _RUN, _TASK = 1, 1, 1


def to_arrays(weights: Weights) -> ArrayRecord:
    """Weights as Flower sends them."""
    return ArrayRecord({name: Array(np.ascontiguousarray(each)) for name, each in weights.items()})


def to_weights(arrays: Any) -> dict[str, Any]:
    """The reverse.

    Raises:
      ValueError: not an ArrayRecord.
    """
    if not isinstance(arrays, ArrayRecord):
        raise ValueError(f"to_weights: arrays must be an ArrayRecord, got {type(arrays).__name__}")
    return {name: each.numpy() for name, each in arrays.items()}


def evaluation(weights: ArrayRecord, round_number: int, nodes: Iterable[int]) -> list[Message]:
    """Requests for scores."""
    config = ConfigRecord({_ROUND: round_number})
    content = RecordDict({_ARRAYS: weights, _CONFIG: config})
    return [Message(content, node, MessageType.EVALUATE) for node in nodes]


def client_app(find_site: Callable[[Context], Site]) -> ClientApp:
    """Flower's side of a site.

    Args:
      find_site: from Flower's context, which knows the node, to its site.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = find_site(context)
        round_number = int(str(message.content.config_records[_CONFIG][_ROUND]))
        try:
            update = site.train(round_number, to_weights(message.content[_ARRAYS]))
        except PrivacyError as error:
            return _without_weights(message, site.name, "refused", str(error))
        except Exception as error:
            # What went wrong may name files or patients: the whole of it is for the site alone.
            _LOG.exception("%s: round %d failed", site.name, round_number)
            return _without_weights(message, site.name, "failed", type(error).__name__)
        about: dict[str, Any] = {
            "name": update.site,
            "status": "trained",
            "round": update.round,
            "given": update.given,
            "privacy": json.dumps(update.privacy),
        }
        content = RecordDict(
            {
                _ARRAYS: to_arrays(update.weights),
                _METRICS: MetricRecord({WEIGHT: 1.0}),
                _SITE: ConfigRecord(about),
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site = find_site(context)
        scores = site.evaluate(to_weights(message.content[_ARRAYS]))
        about = ConfigRecord({"name": site.name, "scores": json.dumps(scores)})
        return Message(RecordDict({_SITE: about}), reply_to=message)

    return app


def _without_weights(message: Message, site: str, status: str, reason: str) -> Message:
    about = ConfigRecord({"name": site, "status": status, "reason": reason})
    return Message(RecordDict({_SITE: about}), reply_to=message)


def read_update(message: Message) -> Update:
    """A site's reply.

    Raises:
      PrivacyError: the site refused. ValueError: it failed, or the reply is not one.
    """
    about = _about(message)
    if about.get("status") == "refused":
        raise PrivacyError(str(about.get("reason")))
    if about.get("status") == "failed":
        raise ValueError(f"{about.get('reason')!s}; the site's log has the rest")
    try:
        return Update(
            site=str(about["name"]),
            round=int(str(about["round"])),
            given=str(about["given"]),
            weights=to_weights(message.content[_ARRAYS]),
            privacy=json.loads(str(about["privacy"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a reply without its parts: {type(error).__name__}") from error


def read_scores(message: Message) -> Scores:
    """A site's scores.

    Raises:
      ValueError: it failed, or the reply is not one.
    """
    try:
        scores: Scores = json.loads(str(_about(message)["scores"]))
        if {type(each) for each in scores.values()} != {list}:
            raise TypeError("scores")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"a reply without its scores: {error}") from error
    return scores


def weighted(message: Message, weights: Weights, weight: float) -> Message:
    """A reply as a strategy is to see it: checked weights, and the server's own say of how much."""
    content = RecordDict({_ARRAYS: to_arrays(weights), _METRICS: MetricRecord({WEIGHT: weight})})
    return _like(message, content)


def _like(message: Message, content: RecordDict) -> Message:
    """Another content from and to the same; Flower has no public way to say so."""
    make: Any = Message
    copied: Message = make(content=content, metadata=message.metadata)
    return copied


def _about(message: Message) -> ConfigRecord:
    if message.has_error():
        raise ValueError(message.error.reason or f"error {message.error.code}")
    about = message.content.get(_SITE)
    if not isinstance(about, ConfigRecord):
        raise ValueError("a reply that does not say which site it is from")
    return about


class InProcessGrid(Grid):
    """Flower's grid with every site in this process, one after the other.

    Sites get real messages and give real replies. An exception at a site becomes the error reply
    that a deployment would bring.

    Args:
      sites: by name; nodes are numbered from 2 in the order of the names.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.nodes = {2 + number: name for number, name in enumerate(sorted(sites))}
        self._sites = dict(sites)
        self._app = client_app(lambda context: self._sites[self.nodes[context.node_id]])
        self._replies: dict[str, Message] = {}
        self.set_run(Run.create_empty(_RUN))

    def set_run(self, run: Run) -> None:
        """See Flower; the identity is the process's, so that there is one run in it at a time."""
        self._run = run
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = _SERVER_NODE
        TaskIdentity.task_id = _TASK

    @property
    def run(self) -> Run:
        """See Flower."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See Flower."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Sequence[int]:
        """See Flower."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """See Flower; the sites do their work at once."""
        pushed = []
        for message in messages:
            number = str(len(self._replies))
            self._replies[number] = self._answer(message)
            pushed.append(number)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """See Flower."""
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """See Flower; nobody is waited for, so `timeout` does nothing."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        # A shallow copy: the same containers go to every site.
        own = _like(message, RecordDict(dict(message.content)))
        context = Context(_RUN, node, {}, RecordDict(), {})
        try:
            return self._app(own, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
